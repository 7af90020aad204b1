"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

import jax
import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.transport.prediction import Predict


def check_scale(scale: float) -> None:
    """`UserError` below 1."""
    check(scale >= 1, f"cfg scale is {scale}; expected 1 (no guidance) or more")


def guide(
    conditional: Predict,
    unconditional: Predict,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Predict:
    """u + scale (c - u) on the first `channels` channels (None: all) at times in `interval`; else conditional.

    Outside the interval (Kynkaanniemi et al., arXiv 2404.07724) the unconditional half is not computed.
    The published numbers guide three of the four latent channels, which the reference inherited from GLIDE.
    """
    check_scale(scale)
    if scale == 1:
        return conditional

    def mixed(x_bhwc, t_b, c):
        u = unconditional(x_bhwc, t_b)
        both = u + scale * (c - u)
        return (
            both
            if channels is None
            else jnp.concatenate([both[..., :channels], c[..., channels:]], axis=-1)
        )

    def guided(x_bhwc, t_b):
        c = conditional(x_bhwc, t_b)
        if tuple(interval) == (0.0, 1.0):
            return mixed(x_bhwc, t_b, c)
        inside_b = (t_b >= interval[0]) & (t_b <= interval[1])
        some = jax.lax.cond(jnp.any(inside_b), mixed, lambda x_bhwc, t_b, c: c, x_bhwc, t_b, c)
        return jnp.where(inside_b.reshape(-1, *[1] * (c.ndim - 1)), some, c)

    return guided
