"""The Frechet distance between the Gaussians of two feature sets (Heusel et al., arXiv 1706.08500, eq. 6), float64."""

import dataclasses

import numpy as np

from sit_jax.errors import check


@dataclasses.dataclass(frozen=True)
class Moments:
    mean_d: np.ndarray
    covariance_dd: np.ndarray  # unbiased: over n - 1


def moments(features_nd: np.ndarray) -> Moments:
    """Mean and covariance of the rows. `UserError` for fewer than two."""
    features_nd = np.asarray(features_nd, np.float64)
    check(
        len(features_nd) >= 2, f"{len(features_nd)} features have no covariance; expected 2 or more"
    )
    return Moments(features_nd.mean(axis=0), np.atleast_2d(np.cov(features_nd, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2), which exist whether A B is singular or
    not: no offset on the diagonal, no imaginary part to drop.
    """
    root_trace = np.linalg.svd(
        _root(a.covariance_dd) @ _root(b.covariance_dd), compute_uv=False
    ).sum()
    means = np.sum((a.mean_d - b.mean_d) ** 2)
    return float(means + np.trace(a.covariance_dd) + np.trace(b.covariance_dd) - 2 * root_trace)


def _root(covariance_dd: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance_dd)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
