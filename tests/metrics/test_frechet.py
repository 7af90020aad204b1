"""The Frechet distance against the reference evaluators and closed forms; bias and error too."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics.frechet import frechet_bias, frechet_distance, frechet_standard_error
from sit_jax.metrics.moments import FeatureStatistics, feature_statistics
from tests import goldens


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def gaussian(values, axes=None, mean=0.0):
    """Return the statistics with these eigenvalues along these axes."""
    axes = rotation(len(values)) if axes is None else axes
    return FeatureStatistics(np.full(len(values), mean), (axes * values) @ axes.T)


@pytest.mark.parametrize("case", goldens.cases("metrics", "frechet"), ids=lambda c: c["name"])
def test_equals_the_reference_evaluators(case):
    arrays = goldens.load("metrics")[1]
    a, b = (feature_statistics(arrays[case[side]]) for side in "ab")
    # pytorch-fid's means are float64, as ours. With fewer rows than dimensions it takes the root of
    # a singular product.
    rel = 1e-9 if case["name"] != "few" else 1e-6
    assert frechet_distance(a, b) == pytest.approx(case["pytorch_fid"], rel=rel, abs=1e-9)


def test_statistics_are_the_reference_evaluators():
    case = goldens.cases("metrics", "frechet")[0]
    arrays = goldens.load("metrics")[1]
    for side in "ab":
        ours = feature_statistics(arrays[case[side]])
        np.testing.assert_allclose(ours.mean_d, arrays[case["statistics"][f"mu_{side}"]], rtol=1e-9)
        np.testing.assert_allclose(
            ours.covariance_dd, arrays[case["statistics"][f"sigma_{side}"]], atol=1e-12
        )


DECAYS = {
    "flat": np.ones(40),
    "power": np.arange(1, 41) ** -2.0,
    "steep": np.exp(-0.7 * np.arange(40)),  # to 1e-12
    "singular": np.r_[np.arange(1, 21) ** -1.0, np.zeros(20)],
    "zero": np.zeros(40),
}


@pytest.mark.parametrize("b", DECAYS)
@pytest.mark.parametrize("a", DECAYS)
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_closed_form_of_commuting_gaussians(a, b, scale):
    """The axes are the same, the eigenvalues of b in reverse order."""
    values_a, values_b = scale * DECAYS[a], scale * DECAYS[b][::-1]
    expected = 40 * 0.25 * scale + np.sum((np.sqrt(values_a) - np.sqrt(values_b)) ** 2)
    distance = frechet_distance(gaussian(values_a), gaussian(values_b, mean=0.5 * np.sqrt(scale)))
    assert distance == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_gaussian_is_at_distance_0_from_itself(decay):
    a = gaussian(DECAYS[decay])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decay", ["flat", "power", "steep", "singular"])
def test_near_gaussians_keep_their_digits(decay):
    """B = (1 + 1e-4)^2 A is at distance 1e-8 tr(A), where rounding of 1e-14 would be 1e-6."""
    a = gaussian(DECAYS[decay])
    b = FeatureStatistics(a.mean_d, (1 + 1e-4) ** 2 * a.covariance_dd)
    assert frechet_distance(a, b) == pytest.approx(1e-8 * np.trace(a.covariance_dd), rel=1e-6)


def test_ranks_below_the_dimension_equal_the_root_of_the_product():
    """Ranks 7 and 12 of 20 dimensions in general position, against the symmetric root."""
    rng = np.random.default_rng(0)
    rows_a, rows_b = rng.normal(size=(8, 20)), rng.normal(size=(13, 20))
    a, b = feature_statistics(rows_a), feature_statistics(rows_b)
    values, vectors = np.linalg.eigh(a.covariance_dd)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    squares = np.sort(np.linalg.eigvalsh(root @ b.covariance_dd @ root))[-7:]
    expected = (
        np.sum((a.mean_d - b.mean_d) ** 2)
        + np.trace(a.covariance_dd + b.covariance_dd)
        - 2 * np.sqrt(squares).sum()
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [4, 12, 47, 48, 49, 60, 150, 600])
@pytest.mark.parametrize("decay", ["flat", "power"])
def test_bias_is_the_mean_distance_of_draws(decay, n):
    """48 dimensions: from far fewer draws than dimensions to far more."""
    values = np.ones(48) if decay == "flat" else np.arange(1, 49) ** -1.2
    truth = FeatureStatistics(np.zeros(48), np.diag(values))
    rng = np.random.default_rng(0)
    distances = [
        frechet_distance(feature_statistics(rng.normal(size=(n, 48)) * np.sqrt(values)), truth)
        for _ in range(150)
    ]
    error = np.std(distances) / np.sqrt(150)
    assert abs(frechet_bias(truth, n) - np.mean(distances)) < 0.01 * np.mean(distances) + 4 * error


def test_bias_of_many_draws_is_the_second_order_of_the_distance():
    """tr(S) / n + sum_ij E[E_ij^2] / (2 (l_i + l_j)), E[E_ij^2] = l_i l_j (1 + d_ij) / n."""
    values = np.arange(1, 31) ** -1.5
    pairs = np.outer(values, values) * (1 + np.eye(30)) / (2 * np.add.outer(values, values))
    n = 10**5
    expected = (values.sum() + pairs.sum()) / n
    assert frechet_bias(gaussian(values), n) == pytest.approx(expected, rel=2e-3)


def test_bias_of_special_spectra():
    """No spread has none; one dimension 3 / 2n; units and dead features change nothing."""
    assert frechet_bias(gaussian(np.zeros(5)), 10) == 0
    one = frechet_bias(gaussian(np.array([4.0])), 1000)
    assert one == pytest.approx(4 / 1000 + 4 / (2 * 1000), rel=0.01)
    values = np.r_[np.arange(1, 9) ** -1.0, np.zeros(8)]
    small = frechet_bias(gaussian(values), 20)
    assert frechet_bias(gaussian(1e6 * values), 20) == pytest.approx(1e6 * small)
    assert frechet_bias(gaussian(values[:8]), 20) == pytest.approx(small)
    with pytest.raises(UserError, match="1 samples have no covariance; expected 2 or more"):
        frechet_bias(gaussian(values), 1)


def skewed(n, d, seed=0):
    """Return features that are not Gaussian, as a network's are not."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 0.5, 0)


@pytest.mark.parametrize(("n", "rank"), [(60, 6), (60, 3), (5, 6)], ids=["full", "target", "rows"])
def test_standard_error_is_that_of_the_exact_influences(n, rank):
    """The influence of a row is the derivative of the distance by its weight."""
    features = skewed(n, 6)
    reference = feature_statistics(skewed(rank + 1, 6, seed=1) + 0.3)
    statistics = feature_statistics(features)
    mean = statistics.mean_d
    covariance = np.cov(features, rowvar=False, bias=True)

    def distance(row, step):
        """Return the distance of (1 - step) times the features and step times the row."""
        moved = np.outer(row - mean, row - mean)
        mixed = (1 - step) * covariance + step * (1 - step) * moved
        return frechet_distance(FeatureStatistics(mean + step * (row - mean), mixed), reference)

    step = 1e-4
    influences = [(distance(row, step) - distance(row, -step)) / (2 * step) for row in features]
    ours = frechet_standard_error(features, FeatureStatistics(mean, covariance), reference)
    assert ours == pytest.approx(np.std(influences) / np.sqrt(n), rel=1e-3)


def test_standard_error_is_the_bootstrap_s_and_that_of_new_samples():
    n = 800
    reference = feature_statistics(skewed(5000, 5, seed=1))
    features = skewed(n, 5)
    ours = frechet_standard_error(features, feature_statistics(features), reference)
    rng = np.random.default_rng(2)
    resampled = [
        frechet_distance(feature_statistics(features[rng.integers(n, size=n)]), reference)
        for _ in range(400)
    ]
    # 400 repetitions know a standard deviation to about 4 %.
    assert ours == pytest.approx(np.std(resampled), rel=0.15)


def test_bad_input_is_refused():
    a, b = gaussian(np.ones(3)), gaussian(np.ones(4))
    with pytest.raises(UserError, match="features of width 3 and 4; expected the same width: use"):
        frechet_distance(a, b)
    covariance = np.eye(3)
    covariance[2, 1] = np.nan
    with pytest.raises(UserError, match="feature statistics have nan or inf; expected finite"):
        frechet_distance(a, FeatureStatistics(a.mean_d, covariance))
    with pytest.raises(UserError, match="features of width 3 and 4; expected the same width"):
        frechet_standard_error(np.zeros((5, 3)), a, b)
    with pytest.raises(UserError, match="features are nan or inf in row 1"):
        frechet_standard_error(np.array([[0.0] * 3, [np.nan] * 3]), a, a)
    with pytest.raises(UserError, match="1 features have no covariance; expected 2 or more"):
        feature_statistics(np.zeros((1, 3)))
