"""The Inception Score against the reference evaluators and its known values."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics.inception_score import inception_score
from tests import goldens


def golden(implementation):
    cases = goldens.cases("metrics", "inception_score")
    cases = [case for case in cases if case["implementation"] == implementation]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


@golden("adm")
def test_parts_of_fixed_size_equal_adm(case):
    arrays = goldens.load("metrics")[1]
    logits = arrays[case["activations"]] @ arrays[case["weight"]]
    size = case["split_size"]
    parts = [logits[start : start + size] for start in range(0, len(logits), size)]
    mean = np.mean([inception_score(part, 1)[0] for part in parts])
    assert mean == pytest.approx(case["value"], rel=1e-6)  # ADM's softmax is float32


@golden("torch_fidelity")
def test_equal_parts_equal_torch_fidelity(case):
    logits = goldens.load("metrics")[1][case["logits"]]
    mean, std = inception_score(logits, case["splits"])
    assert mean == pytest.approx(case["value"], rel=1e-6)
    assert std == pytest.approx(case["std"], rel=1e-6, abs=1e-12)


def test_sure_images_of_all_classes_score_the_number_of_classes():
    """The other probabilities underflow: 0 log 0 counts as 0."""
    logits = np.tile(1e4 * np.eye(7), (4, 1))
    assert inception_score(logits, 4) == pytest.approx((7, 0))


def test_images_that_look_alike_score_1():
    assert inception_score(np.tile([3.0, -2.0, 900.0], (30, 1))) == pytest.approx((1, 0))


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="10 splits of 3 images; expected 1 to 3 splits"):
        inception_score(np.zeros((3, 2)))
    with pytest.raises(UserError, match="logits are nan or inf in row 1"):
        inception_score(np.array([[0.0, 1.0], [np.nan, 0.0]]), 1)
