"""The linear layer, whose gradients come in the type its parameters are handed in.

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
    """y = x W + b over the last axis of [n, i]: [n, o...] in `dtype`. W [i, o...] and b [o...] are float32.

    The initial spread of a kernel of several axes is that of the fused matrix.
    """

    features: int | tuple[int, ...]
    dtype: Any = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x_ni: jax.Array) -> jax.Array:
        features = (self.features,) if isinstance(self.features, int) else self.features
        inputs = x_ni.shape[-1]

        def fused(key):
            return self.kernel_init(key, (inputs, math.prod(features))).reshape(inputs, *features)

        kernel = self.param("kernel", fused)
        bias = self.param("bias", nn.initializers.zeros_init(), features)
        return affine(x_ni.astype(self.dtype), kernel, bias)


def affine(x_ni: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x W + b in the type of x; the gradients of W and b are summed, and come, in their own types.

    The rule of a plain product would round them to the type of x, and devices would then add up what is rounded.
    """
    passes = precision(x_ni.dtype)

    def product(kernel, bias):
        kernel, bias = kernel.astype(x_ni.dtype), bias.astype(x_ni.dtype)
        return lax.dot_general(x_ni, kernel, (((1,), (0,)), ((), ())), passes) + bias

    if kernel.dtype == x_ni.dtype:
        return product(kernel, bias)

    @jax.custom_vjp
    def zero(x_ni, kernel, bias):
        return jnp.zeros((len(x_ni), *bias.shape), x_ni.dtype)

    def outer(x_ni, gradient):
        return lax.dot_general(x_ni, gradient, (((0,), (0,)), ((), ())), passes, kernel.dtype)

    def cast_outer(x_ni, gradient):
        return outer(x_ni.astype(kernel.dtype), gradient.astype(kernel.dtype))

    def backward(x_ni, gradient):
        # XLA has no such product of large bfloat16 matrices on a CPU ("Unsupported element type for DotThunk").
        of_kernel = lax.platform_dependent(x_ni, gradient, cpu=cast_outer, default=outer)
        return jnp.zeros_like(x_ni), of_kernel, gradient.sum(0, dtype=bias.dtype)

    zero.defvjp(lambda x_ni, kernel, bias: (zero(x_ni, kernel, bias), x_ni), backward)
    # Beside the product, which can so be differentiated forwards with respect to x, as a likelihood is.
    return product(*lax.stop_gradient((kernel, bias))) + zero(lax.stop_gradient(x_ni), kernel, bias)
