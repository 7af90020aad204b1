"""Streaming moments: np.cov's values for any split into batches, and what they refuse."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics.moments import Moments, feature_statistics


def features(n=500, d=12, mean=0.0):
    rng = np.random.default_rng(0)
    return (mean + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))).astype(np.float64)


def added(rows, borders):
    moments = Moments()
    for batch in np.split(rows, borders):
        moments.add(batch)
    return moments.statistics()


@pytest.mark.parametrize(
    "borders",
    [[], [1], [499], [100, 200, 300], [0, 0, 7], list(range(1, 500))],
    ids=["one", "first-row", "last-row", "even", "empty-batches", "single-rows"],
)
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_equal_np_cov_whatever_the_batches(borders, mean):
    rows = features(mean=mean)
    statistics = added(rows, borders)
    expected = np.cov(rows, rowvar=False)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(statistics.covariance_dd, expected, atol=1e-12 * scale, rtol=0)
    np.testing.assert_allclose(statistics.mean_d, rows.mean(axis=0), atol=1e-13)
    assert statistics.count == 500


@pytest.mark.parametrize("borders", [[], [1, 2, 250], list(range(1, 500))])
def test_a_large_mean_costs_no_digits(borders):
    """The rows are exact in float64, so moving them by 1e6 must not change the covariance."""
    small = np.round(features(), 3) * 1024  # multiples of 1/1024 after the division below
    small = np.round(small) / 1024
    moved = added(small + 1e6, borders)
    expected = np.cov(small, rowvar=False)
    np.testing.assert_allclose(moved.covariance_dd, expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(moved.mean_d - 1e6, small.mean(axis=0), atol=1e-9)


def test_float32_rows_sorted_by_class_are_summed_in_float64():
    rng = np.random.default_rng(1)
    classes = np.repeat([0, 100, -100], 2000)[:, None]
    rows = (classes + rng.normal(size=(6000, 3))).astype(np.float32)
    statistics = added(rows, [2000, 4000])
    expected = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(statistics.covariance_dd, expected, rtol=1e-12)


def test_rows_that_are_not_finite_are_named_and_change_nothing():
    moments = Moments()
    moments.add(features(10))
    bad = features(10)
    bad[3, 2] = np.nan
    bad[7, 0] = np.inf
    with pytest.raises(UserError, match="features are nan or inf in row 13, 17; expected finite"):
        moments.add(bad)
    assert moments.statistics().count == 10
    bad[:] = np.nan
    with pytest.raises(UserError, match="in row 10, 11, 12, 13, 14 and 5 more"):
        moments.add(bad)


def test_large_float32_rows_are_not_taken_for_inf():
    rows = np.full((2, 4), 3e38, np.float32)
    rows[1] = 0
    assert np.isfinite(feature_statistics(rows).covariance_dd).all()


def test_another_width_one_row_and_a_wrong_shape_are_refused():
    moments = Moments()
    moments.add(np.zeros((1, 3)))
    with pytest.raises(UserError, match="features have width 4; expected 3, as the earlier ones"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(UserError, match="1 features have no covariance; expected 2 or more"):
        moments.statistics()
    with pytest.raises(UserError, match="0 features have no covariance"):
        Moments().statistics()
    with pytest.raises(UserError, match=r"shape \(3,\); expected \[images, width\]"):
        moments.add(np.zeros(3))
