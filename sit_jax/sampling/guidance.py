"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.transport.prediction import Predict


def check_scale(scale: float) -> None:
    """`UserError` below 1."""
    check(scale >= 1, f"cfg scale is {scale}; expected 1 (no guidance) or more")


def guide(conditional: Predict, unconditional: Predict, scale: float, channels: int | None = None) -> Predict:
    """u + scale (c - u) on the first `channels` channels (None: all); the others stay conditional.

    The published numbers guide three of the four latent channels, which the reference inherited from GLIDE.
    """
    check_scale(scale)
    if scale == 1:
        return conditional

    def guided(x_bhwc, t_b):
        c, u = conditional(x_bhwc, t_b), unconditional(x_bhwc, t_b)
        mixed = u + scale * (c - u)
        return mixed if channels is None else jnp.concatenate([mixed[..., :channels], c[..., channels:]], axis=-1)

    return guided
