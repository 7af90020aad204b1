"""Linear layers, whose gradients have the dtype of their parameters.

Shape suffixes: n rows, i inputs, o outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint

from sit_jax.precision import precision

_TRANSPOSE_ROWS = 2048  # with fewer, W is used as it is; 4,096 and 32,768 were timed
# The names under which a remat policy may save what linear layers return, and what they and norms
# take.
OUTPUT = "linear output"
OPERAND = "operand"


class Linear(nn.Module):
    """y = x W + b: [n, i] -> [n, o] in `dtype`. W [i, o] and b [o] are float32.

    If not `named`, the caller must name the output, or a remat policy that saves outputs computes
    this one again. For `equal_ni` see `affine`.
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
def in_place_of(x: jax.Array, equal: jax.Array) -> jax.Array:
    """Return `equal`, with the derivatives of x."""
    return equal


@in_place_of.defjvp
def _in_place_of_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return in_place_of(*primals), tangents[0]


def affine(
    x_ni: jax.Array, kernel: jax.Array, bias: jax.Array, equal_ni: jax.Array | None = None
) -> jax.Array:
    """Return x W + b in the dtype of x.

    Gradients of W and b are accumulated and returned in their own dtype (float32). A plain bfloat16
    product would round them to bfloat16 before devices sum them.

    `equal_ni` is x computed in another way, without derivatives. Where the parameters have another
    dtype than x, the product takes it in place of x. Derivatives are those of x, computed from x.
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
    in_product_ni = x_ni if equal_ni is None else in_place_of(x_ni, equal_ni)
    y_no = product(in_product_ni, *lax.stop_gradient((kernel, bias)))
    return y_no + zero(lax.stop_gradient(x_ni), kernel, bias)


def matmul(x_ni: jax.Array, kernel: jax.Array) -> jax.Array:
    """Return x W [n, o] for W [i, o] of the same dtype."""
    is_large = x_ni.dtype == jnp.float32 and len(x_ni) >= _TRANSPOSE_ROWS
    return (_large_float32_matmul if is_large else _plain_matmul)(x_ni, kernel)


def _plain_matmul(x_ni: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.dot_general(x_ni, kernel, (((1,), (0,)), ((), ())), precision(x_ni.dtype))


@jax.custom_jvp
def _large_float32_matmul(x_ni: jax.Array, kernel: jax.Array) -> jax.Array:
    # Hopper's matrix units take TF32 operands only with the contracted axis contiguous in memory,
    # so W is transposed first. At "highest", which is not TF32, this is useless but cheap.
    return lax.platform_dependent(x_ni, kernel, cuda=_matmul_of_transposed, default=_plain_matmul)


def _matmul_of_transposed(x_ni: jax.Array, kernel: jax.Array) -> jax.Array:
    # XLA undoes a transposition without a layout, and without a barrier outside of loops.
    kernel_oi = lax.optimization_barrier(with_layout_constraint(kernel.T, Layout((0, 1))))
    return lax.dot_general(x_ni, kernel_oi, (((1,), (1,)), ((), ())), precision(x_ni.dtype))


def _large_float32_matmul_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Plain where derivatives are taken: the gradient of x, which is dy W^T, wants W as it is, and
    # XLA gives all uses of a W one layout.
    (x_ni, kernel), (dx_ni, dkernel) = primals, tangents
    y_no = _plain_matmul(x_ni, kernel)
    dy_no = jnp.zeros_like(y_no)
    if not isinstance(dx_ni, SymbolicZero):
        dy_no += _plain_matmul(dx_ni, kernel)
    if not isinstance(dkernel, SymbolicZero):
        dy_no += _plain_matmul(x_ni, dkernel)
    return y_no, dy_no


_large_float32_matmul.defjvp(_large_float32_matmul_jvp, symbolic_zeros=True)


def weight_gradient(x_ni: jax.Array, gradient_no: jax.Array, dtype: Any) -> jax.Array:
    """Return x^T dy [i, o] in `dtype`, in which it is accumulated."""
    rows = (((0,), (0,)), ((), ()))
    matmul_precision = precision(x_ni.dtype)

    def outer(x_ni: jax.Array, gradient_no: jax.Array) -> jax.Array:
        return lax.dot_general(x_ni, gradient_no, rows, matmul_precision, dtype)

    def cast_outer(x_ni: jax.Array, gradient_no: jax.Array) -> jax.Array:
        # XLA on CPUs lacks float32 results of large bfloat16 products ("Unsupported element type
        # for DotThunk").
        return outer(x_ni.astype(dtype), gradient_no.astype(dtype))

    return lax.platform_dependent(x_ni, gradient_no, cpu=cast_outer, default=outer)
