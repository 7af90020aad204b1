"""A part of a data set is a sample of it: stratified, nested, and a function of the seed."""

import numpy as np
import pytest

from sit_jax.data.subset import draw_order, uniform_order

SORTED = np.repeat(np.arange(3, dtype=np.int32), 20)  # as a folder of class folders lists them
UNBALANCED = np.repeat(np.arange(3, dtype=np.int32), [100, 10, 1])
MANY_CLASSES = np.repeat(np.arange(1000, dtype=np.int32), 13)
SHUFFLED = np.random.default_rng(0).permutation(UNBALANCED)


def counts(labels, size, seed=0):
    return np.bincount(labels[draw_order(labels, seed)[:size]], minlength=labels.max() + 1)


@pytest.mark.parametrize("labels", [SORTED, UNBALANCED, MANY_CLASSES, SHUFFLED])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_index_is_drawn_once(labels, seed):
    order = draw_order(labels, seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(labels)))
    np.testing.assert_array_equal(draw_order(labels, seed), order)  # on every host


def test_equal_classes_are_equally_frequent():
    assert counts(SORTED, 30).tolist() == [10, 10, 10]
    assert counts(SORTED, 3).tolist() == [1, 1, 1]
    assert counts(SORTED, 60).tolist() == [20, 20, 20]


@pytest.mark.parametrize("labels", [SORTED, UNBALANCED, MANY_CLASSES, SHUFFLED])
def test_each_prefix_has_each_class_in_proportion(labels):
    sizes = np.bincount(labels)
    for size in range(1, len(labels), 1 + len(labels) // 50):
        expected = size * sizes / len(labels)
        assert np.abs(counts(labels, size) - expected).max() < 2


def test_a_few_of_many_classes_are_chosen_by_the_seed():
    first = MANY_CLASSES[draw_order(MANY_CLASSES, 0)[:8]]
    second = MANY_CLASSES[draw_order(MANY_CLASSES, 1)[:8]]
    assert len(set(first)) == len(set(second)) == 8 and set(first) != set(second)
    assert np.mean(first) > 100  # not the first classes
    assert (counts(MANY_CLASSES, 1000) == 1).all()


def test_another_seed_draws_other_images_of_the_same_classes():
    first, second = (draw_order(SORTED, seed)[:30] for seed in (0, 1))
    assert len(set(first) & set(second)) < 25
    assert counts(SORTED, 30, seed=1).tolist() == [10, 10, 10]


def test_images_within_a_class_are_drawn_uniformly():
    drawn = np.concatenate([draw_order(SORTED, seed)[:30] for seed in range(200)])
    times = np.bincount(drawn, minlength=60)  # each 100 times on average, with deviation 7
    assert times.min() > 65 and times.max() < 135


def test_a_class_without_images_and_no_images_at_all():
    labels = np.array([2, 0, 2], np.int32)
    assert sorted(draw_order(labels, 0)) == [0, 1, 2]
    assert draw_order(np.zeros(0, np.int32), 0).tolist() == []


def test_without_labels_every_index_is_drawn_once_and_uniformly():
    order = uniform_order(60, 0)
    assert sorted(order) == list(range(60))
    np.testing.assert_array_equal(uniform_order(60, 0), order)
    drawn = np.concatenate([uniform_order(60, seed)[:30] for seed in range(200)])
    times = np.bincount(drawn, minlength=60)  # each 100 times on average, with deviation 7
    assert times.min() > 65 and times.max() < 135
    assert uniform_order(0, 0).tolist() == []
