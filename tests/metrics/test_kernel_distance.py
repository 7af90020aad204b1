"""KID against torch-fidelity and against the sum that defines it."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics.kernel_distance import kernel_distance
from tests import goldens


@pytest.mark.parametrize("case", goldens.cases("metrics", "kid"), ids=lambda case: case["name"])
def test_equals_torch_fidelity(case):
    arrays = goldens.load("metrics")[1]
    fake = arrays[case["first"]][: case["first_rows"]]
    real = arrays[case["second"]][: case["second_rows"]]
    mean, std = kernel_distance(fake, real, case["subsets"], case["subset_size"])
    # torch-fidelity sums kernels in float32 and subtracts the sums.
    assert mean == pytest.approx(case["mean"], rel=5e-6)
    assert std == pytest.approx(case["std"], rel=1e-5, abs=1e-12)


def test_is_the_unbiased_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 3))

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    mean, std = kernel_distance(x, y, subsets=3, size=5)
    assert mean == pytest.approx(within - 2 * across)
    assert std == pytest.approx(0, abs=1e-12)


def test_is_0_on_average_for_one_distribution():
    rng = np.random.default_rng(0)
    distances = [kernel_distance(*rng.normal(size=(2, 50, 4)), 1, 50)[0] for _ in range(200)]
    error = np.std(distances) / np.sqrt(200)
    assert abs(np.mean(distances)) < 4 * error


def test_bad_input_is_refused():
    rows = np.zeros((30, 4))
    with pytest.raises(UserError, match="subsets of 1000 from 30 samples; expected 2 to 30"):
        kernel_distance(rows, np.zeros((2000, 4)))
    with pytest.raises(UserError, match="subsets of 31 from 30 real images; expected 2 to 30"):
        kernel_distance(np.zeros((40, 4)), rows, size=31)
    with pytest.raises(UserError, match="features of width 4 and 5; expected the same width"):
        kernel_distance(rows, np.zeros((30, 5)), size=10)
    with pytest.raises(UserError, match="features of the real images are nan or inf in row 2"):
        kernel_distance(rows, np.where(np.arange(30)[:, None] == 2, np.nan, rows), size=10)
