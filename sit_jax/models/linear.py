"""Linear layers, whose gradients have the dtype of their parameters.

Shape suffixes: n rows, i inputs, o outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from sit_jax.precision import precision

_MANY = 2048  # rows, from which on the transposition of W costs less than it saves
_PARTS = 8  # of the rows, each with a product of its own
_TILES = 132  # of 128 x 128 outputs: one for each core of an H100
OUTPUT = "linear output"  # the name under which a remat policy may save the outputs


class Linear(nn.Module):
    """y = x W + b: [n, i] -> [n, o] in `dtype`. W [i, o] and b [o] are float32.

    If not `named`, the caller gives the output its name. For `equal_ni` see `affine`.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    named: bool = True

    @nn.compact
    def __call__(self, x_ni: jax.Array, equal_ni: jax.Array | None = None) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x_ni.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        y_no = affine(x_ni.astype(self.dtype), kernel, bias, equal_ni)
        return checkpoint_name(y_no, OUTPUT) if self.named else y_no


class SplitLinear(nn.Module):
    """Linear layers of one input, with their parameters in one array: [n, i] -> k times [n, o...].

    W [i, k, o...] and b [k, o...] are float32, where features = (k, o...). W is initialised as one
    matrix [i, k*prod(o)] would be. One product would be as fast as k, but its outputs lie beside
    each other, and a kernel that takes them separately would need copies.
    """

    features: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_ni: jax.Array) -> list[jax.Array]:
        inputs = x_ni.shape[-1]
        parts, *shape = self.features

        def fused(key: jax.Array) -> jax.Array:
            matrix = nn.initializers.xavier_uniform()(key, (inputs, math.prod(self.features)))
            return matrix.reshape(inputs, *self.features)

        kernel = self.param("kernel", fused)
        bias = self.param("bias", nn.initializers.zeros_init(), self.features)
        x_ni = x_ni.astype(self.dtype)
        # Two axes each, so that XLA adds the bias within the product.
        outputs = [
            checkpoint_name(affine(x_ni, kernel_io.reshape(inputs, -1), bias_o.reshape(-1)), OUTPUT)
            for kernel_io, bias_o in zip(
                jnp.split(kernel, parts, axis=1), jnp.split(bias, parts), strict=True
            )
        ]
        return [output.reshape(-1, *shape) for output in outputs]


@jax.custom_jvp
def _in_place_of(x: jax.Array, equal: jax.Array) -> jax.Array:
    """Return `equal`, with the derivatives of x."""
    return equal


@_in_place_of.defjvp
def _in_place_of_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _in_place_of(*primals), tangents[0]


def affine(
    x_ni: jax.Array, kernel: jax.Array, bias: jax.Array, equal_ni: jax.Array | None = None
) -> jax.Array:
    """Return x W + b in the dtype of x.

    Gradients of W and b are accumulated and returned in their own dtype (float32). A plain bfloat16
    product would round them to bfloat16 before devices sum them.

    `equal_ni` is x computed in another way, without derivatives. A bfloat16 product may take it;
    every derivative is of x and computed from x.
    """

    def product(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return matmul(x_ni, kernel.astype(x_ni.dtype)) + bias.astype(x_ni.dtype)

    if kernel.dtype == x_ni.dtype:
        return product(x_ni, kernel, bias)

    # x [n, i] and y [n, o] are bfloat16, but dW = x^T dy [i, o] must come out in float32.
    # `product` computes y with W and b held constant, so it sends a gradient to x only.
    # `zero` adds zeros [n, o] to y; its backward rule returns dW and db in float32.
    # A custom_vjp around the product itself would forbid forward-mode derivatives in x, which the
    # likelihood needs; here x enters the custom_vjp through stop_gradient.
    @jax.custom_vjp
    def zero(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.zeros((len(x_ni), *bias.shape), x_ni.dtype)

    def forward(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        return zero(x_ni, kernel, bias), x_ni

    def backward(x_ni: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        kernel_gradient = weight_gradient(x_ni, gradient, kernel.dtype)
        bias_gradient = gradient.sum(0, dtype=bias.dtype)
        return jnp.zeros_like(x_ni), kernel_gradient, bias_gradient

    zero.defvjp(forward, backward)
    in_product_ni = x_ni if equal_ni is None else _in_place_of(x_ni, equal_ni)
    y_no = product(in_product_ni, *lax.stop_gradient((kernel, bias)))
    return y_no + zero(lax.stop_gradient(x_ni), kernel, bias)


def matmul(x_ni: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x W [n, o] for W [i, o] of the same dtype."""
    y_no = lax.dot_general(x_ni, kernel, (((1,), (0,)), ((), ())), precision(x_ni.dtype))
    if x_ni.dtype != jnp.float32 or len(x_ni) < _MANY:
        return y_no
    # Hopper's matrix units take TF32 operands only with the contracted axis contiguous in memory.
    # For many rows it is faster to transpose W first. The gradient of x, which is dy W^T, wants W
    # as it is, so derivatives are of the plain product.
    computed_no = lax.platform_dependent(
        *lax.stop_gradient((x_ni, kernel, y_no)),
        cuda=_matmul_transposed,
        default=lambda x_ni, kernel, y_no: y_no,
    )
    return _in_place_of(y_no, computed_no)


def _matmul_transposed(x_ni: jax.Array, kernel: jax.Array, _: jax.Array) -> jax.Array:
    kernel_oi = with_layout_constraint(kernel.T, Layout((0, 1)))  # else XLA undoes it
    return lax.dot_general(x_ni, kernel_oi, (((1,), (1,)), ((), ())), precision(x_ni.dtype))


def weight_gradient(x_ni: jax.Array, gradient_no: jax.Array, dtype: Any) -> jax.Array:
    """Return x^T dy [i, o] in `dtype`, in which it is accumulated."""
    outer = functools.partial(_outer, matmul_precision=precision(x_ni.dtype), dtype=dtype)
    # The tiles of a small [i, o] are too few for a GPU's cores, so they share its many rows.
    is_small = x_ni.shape[1] * gradient_no.shape[1] <= _TILES * 128**2
    is_long = len(x_ni) % _PARTS == 0 and len(x_ni) >= _PARTS * _MANY
    on_gpu = functools.partial(outer, parts=_PARTS) if is_small and is_long else outer
    # XLA on CPUs lacks float32 results of large bfloat16 products ("Unsupported element type for
    # DotThunk").
    return lax.platform_dependent(
        x_ni,
        gradient_no,
        cpu=lambda x_ni, gradient_no: outer(x_ni.astype(dtype), gradient_no.astype(dtype)),
        cuda=on_gpu,
        default=outer,
    )


def _outer(
    x_ni: jax.Array, gradient_no: jax.Array, matmul_precision: Any, dtype: Any, parts: int = 1
) -> jax.Array:
    """Return x^T dy as a sum over parts of the rows."""
    if parts == 1:
        rows = (((0,), (0,)), ((), ()))
        return lax.dot_general(x_ni, gradient_no, rows, matmul_precision, dtype)
    x_pni, gradient_pno = (
        array.reshape(parts, -1, array.shape[1]) for array in (x_ni, gradient_no)
    )
    rows_of_parts = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(x_pni, gradient_pno, rows_of_parts, matmul_precision, dtype).sum(0)
