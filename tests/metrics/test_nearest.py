"""Nearest neighbours, against all distances at once."""

import numpy as np
import pytest

from sit_jax.metrics.neighbours import nearest


def test_the_nearest_row_and_its_distance():
    random = np.random.default_rng(0)
    a = random.normal(size=(23, 5)).astype(np.float32)
    b = random.normal(size=(40, 5)).astype(np.float32)
    b[7] = a[3]
    distances = np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=2))
    distance, index = nearest(a, b)
    np.testing.assert_array_equal(index, distances.argmin(axis=1))
    np.testing.assert_allclose(distance, distances.min(axis=1), rtol=1e-12)
    assert distance[3] == 0 and index[3] == 7


def test_a_small_distance_far_from_the_origin_keeps_its_digits():
    b = np.full((3, 4), 1000.0)
    b[:, 0] += [0.0, 1e-3, 5.0]
    distance, index = nearest(b[:1] + [9e-4, 0, 0, 0], b)
    assert index[0] == 1 and distance[0] == pytest.approx(1e-4, rel=1e-6)


def test_the_first_of_equal_rows_counts():
    rows = np.ones((4, 2))
    assert nearest(rows, rows)[1].tolist() == [0, 0, 0, 0]
