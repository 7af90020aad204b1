"""The linear layer, whose gradients have the dtype of its parameters.

Shape suffixes: n rows, i inputs, o outputs (of any number of axes: o...).
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from sit_jax.precision import precision


class Linear(nn.Module):
    """y = x W + b over the last axis: [n, i] -> [n, o...] in `dtype`.

    W [i, o...] and b [o...] are float32. A kernel of several output axes is initialised as the
    fused matrix [i, prod(o)] would be.
    """

    features: int | tuple[int, ...]
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x_ni: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        inputs = x_ni.shape[-1]

        def fused(key: jax.Array) -> jax.Array:
            return self.kernel_init(key, (inputs, math.prod(features))).reshape(inputs, *features)

        kernel = self.param("kernel", fused)
        bias = self.param("bias", nn.initializers.zeros_init(), features)
        return affine(x_ni.astype(self.dtype), kernel, bias)


def affine(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Return x W + b in the dtype of x.

    Gradients of W and b are accumulated and returned in their own dtype (float32). A plain bfloat16
    product would round them to bfloat16 before devices sum them.
    """
    matmul_precision = precision(x_ni.dtype)

    def product(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        kernel = kernel.astype(x_ni.dtype)
        bias = bias.astype(x_ni.dtype)
        return lax.dot_general(x_ni, kernel, (((1,), (0,)), ((), ())), matmul_precision) + bias

    if kernel.dtype == x_ni.dtype:
        return product(kernel, bias)

    # x [n, i] and y [n, o...] are bfloat16, but dW = x^T dy [i, o...] must come out in float32.
    # `product` computes y with W and b held constant, so it sends a gradient to x only.
    # `zero` adds zeros [n, o...] to y; its backward rule returns dW and db in float32.
    # A custom_vjp around the product itself would forbid forward-mode derivatives in x, which the
    # likelihood needs; here x enters the custom_vjp through stop_gradient.
    @jax.custom_vjp
    def zero(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.zeros((len(x_ni), *bias.shape), x_ni.dtype)

    def forward(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        return zero(x_ni, kernel, bias), x_ni

    def outer(x_ni: jax.Array, gradient: jax.Array) -> jax.Array:
        return lax.dot_general(
            x_ni, gradient, (((0,), (0,)), ((), ())), matmul_precision, kernel.dtype
        )

    def cast_outer(x_ni: jax.Array, gradient: jax.Array) -> jax.Array:
        return outer(x_ni.astype(kernel.dtype), gradient.astype(kernel.dtype))

    def backward(x_ni: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # XLA on CPUs lacks float32 results of large bfloat16 products ("Unsupported element type
        # for DotThunk").
        kernel_gradient = lax.platform_dependent(x_ni, gradient, cpu=cast_outer, default=outer)
        bias_gradient = gradient.sum(0, dtype=bias.dtype)
        return jnp.zeros_like(x_ni), kernel_gradient, bias_gradient

    zero.defvjp(forward, backward)
    y = product(*lax.stop_gradient((kernel, bias)))
    return y + zero(lax.stop_gradient(x_ni), kernel, bias)
