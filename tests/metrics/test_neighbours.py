"""Precision, recall and nearest rows: the reference's values, and float64's decisions."""

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.metrics import neighbours
from sit_jax.metrics.neighbours import nearest, precision_recall
from tests import goldens


def squares(a, b):
    """Return all squared distances in float64, by differences."""
    return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=2)


def share_within(a, b, k):
    """Return the share of rows of a in the manifold of b, as the paper defines it."""
    radii = np.sort(squares(b, b), axis=1)[:, k]  # at place 0 is the row itself
    return (squares(a, b) <= radii).any(axis=1).mean()


@pytest.mark.parametrize(
    "case", goldens.cases("metrics", "precision_recall"), ids=lambda case: case["name"]
)
def test_equals_the_reference_evaluators(case):
    """ADM's suite has distances in float16 where they fit; ours are the exact rule's."""
    arrays = goldens.load("metrics")[1]
    scale = np.float32(case.get("features_multiplied_by", 1))
    real, fake = arrays[case["ref"]] * scale, arrays[case["gen"]] * scale
    precision, recall = precision_recall(real, fake, case["k"])
    # torch-fidelity's shares are float32.
    assert precision == pytest.approx(case.get("precision_float64", case["precision"]), rel=1e-7)
    assert recall == pytest.approx(case.get("recall_float64", case["recall"]), rel=1e-7)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("mean", [0, 1000])
def test_equal_the_definition_over_several_blocks(monkeypatch, k, mean):
    """Copies of real rows, and real rows that occur often enough to have radius 0."""
    monkeypatch.setattr(neighbours, "_ROWS", 64)
    monkeypatch.setattr(neighbours, "_COLUMNS", 96)
    rng = np.random.default_rng(0)
    real = (mean + rng.normal(size=(300, 6))).astype(np.float32)
    fake = (mean + rng.normal(size=(170, 6)) * 1.5).astype(np.float32)
    real[100:120] = real[0]
    fake[:10] = real[95:105]
    fake[10:20] = np.nextafter(real[95:105], np.float32(np.inf))
    expected = share_within(fake, real, k), share_within(real, fake, k)
    assert precision_recall(real, fake, k) == expected


def test_rows_that_float32_cannot_tell_apart_are_ordered_by_float64():
    """All rows are about 1e-6 apart at distance 1, far below the rounding of a product."""
    rng = np.random.default_rng(0)
    real = (np.eye(8)[0] + 1e-6 * rng.normal(size=(80, 8))).astype(np.float32)
    fake = (-np.eye(8)[0] + 1e-6 * rng.normal(size=(70, 8))).astype(np.float32)
    distance, index = nearest(fake, real)
    np.testing.assert_array_equal(index, squares(fake, real).argmin(axis=1))
    np.testing.assert_allclose(distance, np.sqrt(squares(fake, real).min(axis=1)), rtol=1e-15)
    assert precision_recall(real, fake) == (0, 0)
    both = np.concatenate([real, fake])
    expected = share_within(fake, both, 3), share_within(both, fake, 3)
    assert precision_recall(both, fake) == expected


def test_nearest_row_of_a_copy_is_the_first_at_distance_0():
    rng = np.random.default_rng(0)
    b = (1e3 + rng.normal(size=(5000, 16))).astype(np.float32)
    b[[7, 4100]] = b[4999]
    a = b[[4999, 7, 4100, 123]]
    distance, index = nearest(a, b)
    np.testing.assert_array_equal(index, [7, 7, 7, 123])
    np.testing.assert_array_equal(distance, 0)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (1025, 4097)])
def test_sizes_around_those_of_a_block(n, m):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(m, 3))
    distance, index = nearest(a, b)
    expected = squares(a, b)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, np.sqrt(expected.min(axis=1)), rtol=1e-15)


def test_the_bound_on_rounding_holds():
    """No bound may exceed the score in float64, or a nearer row could be missed."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 2048)).astype(np.float32)
    b = (a[:40] + 10.0 ** rng.uniform(-8, 0, (40, 1)) * rng.normal(size=(40, 2048))).astype(
        np.float32
    )
    offsets = rng.uniform(0, 1000, 40)
    bounds, index = neighbours._candidates(a, b, offsets, 40, False)
    scores = np.take_along_axis(squares(a, b), index, axis=1) - offsets[index]
    assert (bounds <= scores + 1e-12).all()
    # They are near it too: few rows need all of b in float64.
    assert (scores - bounds < 6e-4 * 2 * 2048).all()


def test_bad_input_is_refused():
    rows = np.random.default_rng(0).normal(size=(9, 3))
    with pytest.raises(UserError, match="k=3 with 3 real images; expected 1 to 2"):
        precision_recall(rows[:3], rows)
    with pytest.raises(UserError, match="k=9 with 9 real images; expected 1 to 8"):
        precision_recall(rows, rows, 9)
    with pytest.raises(UserError, match="k=4 with 4 samples; expected 1 to 3"):
        precision_recall(rows, rows[:4], 4)
    with pytest.raises(UserError, match="features of width 2 and 3; expected the same width"):
        precision_recall(rows, rows[:, :2])
    with pytest.raises(UserError, match="9 and 0 rows; expected 1 or more"):
        nearest(rows, rows[:0])
    rows[4] = np.nan
    with pytest.raises(UserError, match="features of the samples are nan or inf in row 4"):
        precision_recall(np.zeros((9, 3)), rows)
