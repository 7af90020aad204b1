"""The Frechet distance between the Gaussians of two feature sets, in float64.

Heusel et al., arXiv 1706.08500, eq. 6.
"""

import dataclasses

import numpy as np

from sit_jax.errors import check


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian of a set of features."""

    mean_d: np.ndarray
    covariance_dd: np.ndarray  # unbiased: over n - 1


def feature_statistics(features_nd: np.ndarray) -> FeatureStatistics:
    """Return mean and covariance of the rows. Raises UserError for fewer than two rows."""
    features_nd = np.asarray(features_nd, np.float64)
    check(
        len(features_nd) >= 2, f"{len(features_nd)} features have no covariance; expected 2 or more"
    )
    covariance_dd = np.atleast_2d(np.cov(features_nd, rowvar=False))
    return FeatureStatistics(features_nd.mean(axis=0), covariance_dd)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2). They exist even if
    A B is singular: no offset on the diagonal, no imaginary part to drop.
    """
    roots_dd = _root(a.covariance_dd) @ _root(b.covariance_dd)
    root_trace = np.linalg.svd(roots_dd, compute_uv=False).sum()
    means = np.sum((a.mean_d - b.mean_d) ** 2)
    return float(means + np.trace(a.covariance_dd) + np.trace(b.covariance_dd) - 2 * root_trace)


def _root(covariance_dd: np.ndarray) -> np.ndarray:
    """Return the symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance_dd)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
