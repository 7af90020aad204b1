"""The table of labels: looked up as jnp.take does, with a gradient that is a product."""

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.models.embeddings import lookup

TABLE = jax.random.normal(jax.random.key(0), (6, 5))
ROWS = jnp.array([5, 0, 3, 3, 5, 5, 1])  # repeated, and row 2 and 4 never
GRADIENT = jax.random.normal(jax.random.key(1), (len(ROWS), TABLE.shape[1]))


def take(table_nd, row_b):
    return jnp.take(table_nd, row_b, axis=0)


def gradient(function, rows):
    return jax.vjp(lambda table: function(table, rows), TABLE)[1](GRADIENT)[0]


def test_lookup_is_exact_and_its_gradient_is_the_sum_over_equal_rows():
    np.testing.assert_array_equal(lookup(TABLE, ROWS), np.asarray(TABLE)[ROWS])
    expected = np.zeros(TABLE.shape)
    np.add.at(expected, np.asarray(ROWS), np.asarray(GRADIENT, np.float64))
    # A sum of at most 3 float32 values.
    np.testing.assert_allclose(gradient(lookup, ROWS), expected, rtol=0, atol=1e-6)
    assert not gradient(lookup, ROWS)[jnp.array([2, 4])].any()


def test_lookup_keeps_float32_whatever_the_precision_of_products():
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(jax.grad(lambda table: lookup(table, ROWS).sum())).lower(TABLE).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text


def test_rows_outside_the_table_are_those_of_take():
    """A row that does not exist is NaN and gets no gradient; a negative one counts from the end."""
    rows = jnp.array([6, -1, -7, 2, 1000, 0, -6])
    np.testing.assert_array_equal(lookup(TABLE, rows), take(TABLE, rows))
    assert jnp.isnan(lookup(TABLE, rows)).all(axis=1).tolist() == [
        True, False, True, False, True, False, False,
    ]  # fmt: skip
    np.testing.assert_allclose(gradient(lookup, rows), gradient(take, rows), rtol=1e-6)


def test_lookup_has_both_derivatives():
    """Forward mode too, which the likelihood needs of the network."""
    tangent = jax.random.normal(jax.random.key(2), TABLE.shape)

    def squares(function):
        return lambda table_nd: (function(table_nd, ROWS) ** 2).sum()

    for function in (lookup, jax.jit(lookup)):
        _, forward = jax.jvp(lambda table, f=function: f(table, ROWS), (TABLE,), (tangent,))
        np.testing.assert_allclose(forward, tangent[ROWS], rtol=1e-6)
        _, ours = jax.jvp(jax.grad(squares(function)), (TABLE,), (tangent,))
        _, expected = jax.jvp(jax.grad(squares(take)), (TABLE,), (tangent,))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
