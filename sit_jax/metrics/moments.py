"""The mean and covariance of features that come in batches, in float64.

Suffixes: n images, d features.
"""

import dataclasses

import numpy as np

from sit_jax.errors import check
from sit_jax.metrics.checks import check_features

_ROWS = 2048  # converted to float64 at a time, which bounds the memory


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian of a set of features."""

    mean_d: np.ndarray
    covariance_dd: np.ndarray  # unbiased: over n - 1
    count: int | None = None  # n; None where a file of statistics does not say


class Moments:
    """Mean and covariance of all rows added so far: the same for any split into batches.

    Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 2.1. All sums are of rows
    minus the first row. Features whose mean is large beside their spread lose no digits then.
    """

    def __init__(self) -> None:
        self._count = 0
        self._origin_d = np.zeros(0)
        self._mean_d = np.zeros(0)  # of rows minus the origin
        self._scatter_dd = np.zeros((0, 0))  # the sum of (x - mean) (x - mean)^T

    def add(self, features_nd: np.ndarray) -> None:
        """Add rows [n, d].

        Raises UserError, and adds none of them, if a row is not finite or has another width.
        """
        features_nd = np.asarray(features_nd)
        check_features(features_nd, first_row=self._count)
        n, d = features_nd.shape
        if n == 0:
            return
        if self._count == 0:
            self._origin_d = features_nd[0].astype(np.float64)
            self._mean_d = np.zeros(d)
            self._scatter_dd = np.zeros((d, d))
        check(
            d == len(self._mean_d),
            f"features have width {d}; expected {len(self._mean_d)}, as the earlier ones: use one "
            "extractor",
        )
        for start in range(0, n, _ROWS):
            self._merge(features_nd[start : start + _ROWS].astype(np.float64) - self._origin_d)

    def _merge(self, rows_nd: np.ndarray) -> None:
        n = len(rows_nd)
        mean_d = rows_nd.mean(axis=0)
        centred_nd = rows_nd - mean_d
        difference_d = mean_d - self._mean_d
        total = self._count + n
        self._scatter_dd += centred_nd.T @ centred_nd
        self._scatter_dd += np.outer(difference_d, difference_d * (self._count * n / total))
        self._mean_d += difference_d * (n / total)
        self._count = total

    def statistics(self) -> FeatureStatistics:
        """Return the statistics. Raises UserError for fewer than two rows."""
        check(
            self._count >= 2,
            f"{self._count} features have no covariance; expected 2 or more",
        )
        covariance_dd = self._scatter_dd / (self._count - 1)
        return FeatureStatistics(self._origin_d + self._mean_d, covariance_dd, self._count)


def feature_statistics(features_nd: np.ndarray) -> FeatureStatistics:
    """Return mean and covariance of the rows. Raises UserError for fewer than two rows."""
    moments = Moments()
    moments.add(features_nd)
    return moments.statistics()
