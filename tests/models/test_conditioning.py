"""Class labels as a condition: read from records, dropped, and replaced by the null label."""

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.models.conditioning import ClassLabels

LABELS = ClassLabels(10)


def test_label_dropout_is_a_function_of_its_key():
    labels_b = jnp.arange(10_000) % 10
    dropped_b = LABELS.drop(jax.random.key(1), labels_b, 0.1)
    np.testing.assert_array_equal(dropped_b, LABELS.drop(jax.random.key(1), labels_b, 0.1))
    assert ((dropped_b == labels_b) | (dropped_b == 10)).all()
    assert abs((dropped_b == 10).mean() - 0.1) < 4 * np.sqrt(0.09 / 10_000)
    np.testing.assert_array_equal(LABELS.drop(jax.random.key(1), labels_b, 0.0), labels_b)
    assert (LABELS.drop(jax.random.key(1), labels_b, 1.0) == 10).all()


def test_the_condition_of_records_is_their_label():
    records = {"image": np.zeros((2, 8, 8, 1), np.uint8), "label": np.array([3, 7], np.int32)}
    assert LABELS.from_records(records) is records["label"]


def test_the_null_condition_has_the_shape_and_type_of_the_labels():
    null_b = LABELS.null_like(jnp.array([3, 7], jnp.int32))
    np.testing.assert_array_equal(null_b, [10, 10])
    assert null_b.dtype == jnp.int32
