"""The Frechet distance against the reference evaluators' values and its closed form."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics.frechet import FeatureStatistics, feature_statistics, frechet_distance
from tests import goldens


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


def test_closed_form_of_commuting_gaussians():
    a = FeatureStatistics(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = FeatureStatistics(np.array([0.0, 0.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + 3**2)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_one_feature_has_no_covariance():
    with pytest.raises(UserError, match="1 features have no covariance; expected 2 or more"):
        feature_statistics(np.zeros((1, 3)))
