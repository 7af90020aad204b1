"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

import jax
import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.transport.prediction import Predict


def check_scale(scale: float) -> None:
    """Raise UserError for a scale below 1."""
    check(scale >= 1, f"cfg scale is {scale}; expected 1 (no guidance) or more")


def with_guidance(
    conditional: Predict,
    unconditional: Predict,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Predict:
    """Return the guided prediction u + scale (c - u) of c = conditional and u = unconditional.

    Only the first `channels` channels are guided (None: all); the published numbers guide three of
    the four latent channels, which the reference inherited from GLIDE. At times outside `interval`
    (Kynkaanniemi et al., arXiv 2404.07724) the prediction is c, and u is not computed. Raises
    UserError for a scale below 1.
    """
    check_scale(scale)
    if scale == 1:
        return conditional

    def mixed(x_bhwc: jax.Array, t_b: jax.Array, c: jax.Array) -> jax.Array:
        u = unconditional(x_bhwc, t_b)
        guided = u + scale * (c - u)
        if channels is None:
            return guided
        return jnp.concatenate([guided[..., :channels], c[..., channels:]], axis=-1)

    def unmixed(x_bhwc: jax.Array, t_b: jax.Array, c: jax.Array) -> jax.Array:
        return c

    def predict(x_bhwc: jax.Array, t_b: jax.Array) -> jax.Array:
        c = conditional(x_bhwc, t_b)
        if tuple(interval) == (0.0, 1.0):
            return mixed(x_bhwc, t_b, c)
        # Adaptive steps can give each sample its own time: compute u if any sample needs it.
        inside_b = (t_b >= interval[0]) & (t_b <= interval[1])
        guided = jax.lax.cond(jnp.any(inside_b), mixed, unmixed, x_bhwc, t_b, c)
        return jnp.where(inside_b.reshape(-1, *[1] * (c.ndim - 1)), guided, c)

    return predict
