"""The network's elementwise functions, with derivatives written out.

Automatic differentiation gives the same derivatives to rounding. But it costs a GPU more kernels,
each of which reads and writes all tokens.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

STATISTICS = "norm statistics"  # the name under which a remat policy may keep them
_EPSILON = 1e-6


@jax.custom_jvp
def modulated_norm(x_btd: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array) -> jax.Array:
    """Apply LayerNorm without affine, then shift and scale, in float32; return the dtype of x."""
    return _modulated_norm(x_btd, shift_bd, scale_bd)[0]


@modulated_norm.defjvp
def _modulated_norm_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    dx_btd, dshift_bd, dscale_bd = (x.astype(jnp.float32) for x in tangents)
    y_btd, normalised_btd, inverse_bt1 = _modulated_norm(*primals)
    scale_bd = primals[2]
    projected_btd = (
        dx_btd
        - dx_btd.mean(-1, keepdims=True)
        - normalised_btd * (normalised_btd * dx_btd).mean(-1, keepdims=True)
    )
    dy_btd = (
        (1 + scale_bd[:, None]) * inverse_bt1 * projected_btd
        + normalised_btd * dscale_bd[:, None]
        + dshift_bd[:, None]
    )
    return y_btd, dy_btd.astype(y_btd.dtype)


def _modulated_norm(
    x_btd: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the output, the normalised x, and the inverse standard deviation of each token."""
    x = x_btd.astype(jnp.float32)
    mean_bt1 = checkpoint_name(x.mean(-1, keepdims=True), STATISTICS)
    variance_bt1 = jnp.square(x - mean_bt1).mean(-1, keepdims=True)
    inverse_bt1 = checkpoint_name(jax.lax.rsqrt(variance_bt1 + _EPSILON), STATISTICS)
    normalised_btd = (x - mean_bt1) * inverse_bt1
    y_btd = normalised_btd * (1 + scale_bd[:, None]) + shift_bd[:, None]
    return y_btd.astype(x_btd.dtype), normalised_btd, inverse_bt1


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return the tanh approximation of GELU (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)  # a form that XLA computes within the product before it


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # (1 + tanh(u)) / 2 is the logistic function of 2u, which XLA computes again where it needs it.
    # It keeps a tanh in memory.
    (x,) = primals
    (dx,) = tangents
    x32 = x.astype(jnp.float32)
    a = 2 * math.sqrt(2 / math.pi)
    b = 0.044715 * a
    gate = jax.nn.sigmoid(x32 * (a + b * x32**2))
    derivative = gate * (1 + (1 - gate) * x32 * (a + 3 * b * x32**2))
    return (x32 * gate).astype(x.dtype), derivative.astype(x.dtype) * dx


def gelu_of_product(product: jax.Array, activated: jax.Array) -> jax.Array:
    """Return GELU of a linear layer's output, without derivatives.

    `activated` is the same value. Only an NVIDIA GPU computes it again, within the product.
    """
    # `activated` comes from the output as a remat policy saves it. jax rounds a saved value that
    # the forward pass also uses (`reduce_precision`), and then XLA does not see that GELU follows
    # the product. So the forward pass takes this one, and `activated` is for the backward pass.
    return jax.lax.platform_dependent(
        *jax.lax.stop_gradient((product, activated)),
        cuda=lambda product, activated: gelu(product),
        default=lambda product, activated: activated,
    )
