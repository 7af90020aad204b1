"""The linear layer is flax's in one dtype; with bfloat16 products its gradients stay float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.models import linear
from sit_jax.models.linear import Linear, SplitLinear, affine

X = jax.random.normal(jax.random.key(1), (64, 16))
KEY = jax.random.key(0)
XAVIER = nn.initializers.xavier_uniform()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Linear(8), nn.Dense(8, kernel_init=XAVIER)),
        (SplitLinear((3, 2, 4)), nn.DenseGeneral((3, 2, 4), kernel_init=XAVIER)),
    ],
)
def test_in_float32_it_is_flaxs(ours, theirs):
    params = ours.init(KEY, X)
    for a, b in zip(*map(jax.tree.leaves, (params, theirs.init(KEY, X))), strict=True):
        np.testing.assert_array_equal(a, b)
    y = ours.apply(params, X)
    y = jnp.stack(y, 1) if isinstance(ours, SplitLinear) else y
    # The products of a SplitLinear are narrower, so they may add up in another order.
    np.testing.assert_allclose(y, theirs.apply(params, X), rtol=1e-6, atol=1e-6)


def test_gradients_of_float32_parameters_are_not_rounded_to_bfloat16():
    """The operands are bfloat16 either way; only the last rounding of their sum differs."""
    kernel = jax.random.normal(KEY, (16, 8))
    bias = jnp.ones(8)
    x = X.astype(jnp.bfloat16)
    cotangent = jax.random.normal(jax.random.key(2), (64, 8)).astype(jnp.bfloat16)
    of_output, of_input = (np.asarray(a, np.float64) for a in (cotangent, x))
    exact = of_input.T @ of_output, of_output.sum(0)
    # One unit in the last place is 2^-24 of a float32, 2^-8 of a bfloat16.
    for dtype, least, most in ((jnp.float32, 0, 1e-6), (jnp.bfloat16, 1e-3, 2e-2)):
        _, pull = jax.vjp(lambda k, b: affine(x, k, b), kernel.astype(dtype), bias.astype(dtype))
        for gradient, want in zip(pull(cotangent), exact, strict=True):
            assert gradient.dtype == dtype
            error = np.abs(np.asarray(gradient, np.float64) - want).max() / np.abs(want).max()
            assert least <= error < most


def test_it_is_differentiated_in_both_directions():
    kernel = jax.random.normal(KEY, (16, 8))
    bias = jnp.ones(8)
    x = X.astype(jnp.bfloat16)
    out, forwards = jax.jvp(lambda x: affine(x, kernel, bias), (x,), (x,))
    np.testing.assert_array_equal(forwards, affine(x, kernel, jnp.zeros(8)))
    np.testing.assert_array_equal(
        out, affine(x, kernel.astype(jnp.bfloat16), bias.astype(jnp.bfloat16))
    )
    of_x = jax.grad(lambda x: affine(x, kernel, bias).astype(jnp.float32).sum())(x)
    want = np.broadcast_to(kernel.astype(jnp.bfloat16).astype(np.float32).sum(1), x.shape)
    # bfloat16: 8 bits of sums of 8.
    np.testing.assert_allclose(of_x.astype(np.float32), want, atol=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_float32_products_take_the_highest_precision(dtype):
    """A TPU's compiler refuses it for bfloat16 operands ("Bad lhs type")."""
    layer = Linear(8, jnp.dtype(dtype))
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(jax.grad(lambda p, x: layer.apply(p, x).astype(jnp.float32).sum())).lower(
            layer.init(KEY, X), X
        )
    assert ("HIGHEST" in lowered.as_text()) == (dtype == "float32")


def lowered(function, platform, *shapes, dtype):
    """Return the program of a function of arrays of these shapes for a platform, as text."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def gradients(x_ni, kernel, gradient_no):
    _, pull = jax.vjp(linear.matmul, x_ni, kernel)
    return pull(gradient_no)


@pytest.mark.parametrize(
    ("platform", "dtype", "rows", "count"),
    [
        ("cuda", "float32", 2048, 1),
        ("cuda", "float32", 2047, 0),
        ("cuda", "bfloat16", 2048, 0),
        ("cpu", "float32", 2048, 0),
        ("tpu", "float32", 2048, 0),
    ],
)
def test_only_float32_products_of_many_rows_transpose_w_on_nvidia(platform, dtype, rows, count):
    shapes = (rows, 8), (8, 4)
    assert lowered(linear.matmul, platform, *shapes, dtype=dtype).count("LayoutCon") == count
    assert "LayoutCon" not in lowered(gradients, platform, *shapes, (rows, 4), dtype=dtype)

    def tangents(x_ni, kernel):
        return jax.jvp(lambda x_ni: linear.matmul(x_ni, kernel), (x_ni,), (x_ni,))

    text = lowered(tangents, platform, *shapes, dtype=dtype)
    assert text.count("dot_general") == 2  # none of a tangent of W, which is zero
    assert "LayoutCon" not in text


def test_transposing_w_changes_nothing():
    kernel = jax.random.normal(KEY, (16, 8))
    np.testing.assert_allclose(
        linear._matmul_of_transposed(X, kernel), X @ kernel, rtol=1e-5, atol=1e-5
    )
    x = jnp.tile(X, (32, 1))
    assert len(x) == linear._TRANSPOSE_ROWS
    cotangent = jnp.tile(jax.random.normal(KEY, (64, 8)), (32, 1))
    of_x, of_kernel = gradients(x, kernel, cotangent)
    np.testing.assert_allclose(of_x, cotangent @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, x.T @ cotangent, rtol=1e-4, atol=1e-3)  # sums of 2048
    _, tangent = jax.jvp(lambda x: linear.matmul(x, kernel), (x,), (2 * x,))
    np.testing.assert_allclose(tangent, 2 * x @ kernel, rtol=1e-5, atol=1e-5)
