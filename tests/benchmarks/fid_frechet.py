"""Time the Frechet distance of 2048-d Gaussians against SciPy's root of the product of covariances.

Two pairs: both covariances of full rank, and one of them from 1,000 samples, which is singular.
Eigenvalues decay as i^-1.2 along random axes. A ratio is SciPy's time over ours; the lower quartile
must reach 5. Before the turns both are compared with the distance from the factors that made the
covariances (arrays whose products they are), in which no small eigenvalue has been lost. Where the
product is singular, SciPy's error is a few 1e-6: a root of an eigenvalue that should be 0.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np
import scipy

from sit_jax.metrics.frechet import frechet_distance
from sit_jax.metrics.moments import FeatureStatistics, feature_statistics
from tests.benchmarks import sides

TARGETS = {"full rank": 5.0, "singular": 5.0}
WIDTH = 2048
SAMPLES = 1000  # of the singular covariance


class Gaussian(NamedTuple):
    """Statistics, and a factor [r, d] with factor^T factor = covariance."""

    statistics: FeatureStatistics
    factor_rd: np.ndarray


def pairs() -> dict[str, tuple[Gaussian, Gaussian]]:
    """Return the pairs of Gaussians by name."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    root = axes * np.arange(1, WIDTH + 1) ** -0.6
    moved = root + 0.2 * rng.normal(size=(WIDTH, WIDTH)) @ root / np.sqrt(WIDTH)
    mean = 0.4 + 0.1 * rng.normal(size=WIDTH)
    other = mean + 0.005 * rng.normal(size=WIDTH)
    a = Gaussian(FeatureStatistics(mean, root @ root.T), root.T)
    b = Gaussian(FeatureStatistics(other, moved @ moved.T), moved.T)
    samples = other + rng.normal(size=(SAMPLES, WIDTH)) @ moved.T
    centred = (samples - samples.mean(axis=0)) / np.sqrt(SAMPLES - 1)
    return {"full rank": (a, b), "singular": (a, Gaussian(feature_statistics(samples), centred))}


def distance_by_factors(a: Gaussian, b: Gaussian) -> float:
    """Return the distance from the singular values of the product of the known factors."""
    root_trace = np.linalg.svd(a.factor_rd @ b.factor_rd.T, compute_uv=False).sum()
    means = np.sum((a.statistics.mean_d - b.statistics.mean_d) ** 2)
    return float(means + np.sum(a.factor_rd**2) + np.sum(b.factor_rd**2) - 2 * root_trace)


def distance_by_sqrtm(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the distance by pytorch-fid's route, without its offset for roots that fail."""
    root = scipy.linalg.sqrtm(a.covariance_dd @ b.covariance_dd)
    assert np.isfinite(root).all()
    traces = np.trace(a.covariance_dd) + np.trace(b.covariance_dd) - 2 * np.trace(root.real)
    return float(np.sum((a.mean_d - b.mean_d) ** 2) + traces)


def _calls(distance) -> sides.Calls:
    return {
        name: lambda a=a.statistics, b=b.statistics: distance(a, b)
        for name, (a, b) in pairs().items()
    }


SIDES = {
    "scipy": lambda options: _calls(distance_by_sqrtm),
    "ours": lambda options: _calls(frechet_distance),
}


def run(parser: argparse.ArgumentParser) -> None:
    """Print the distances and the table."""
    if "--side" not in sys.argv:
        print(f"scipy {scipy.__version__}, numpy {np.__version__}")
        for name, (a, b) in pairs().items():
            exact = distance_by_factors(a, b)
            print(f"{name}: {exact:.9g} by the factors; relative error", end=" ")
            for side, distance in (("scipy", distance_by_sqrtm), ("ours", frechet_distance)):
                error = abs(distance(a.statistics, b.statistics) / exact - 1)
                print(f"{side} {error:.1e}", end=" ", flush=True)
            print()
    sides.run(parser, SIDES, TARGETS, memory=False)
