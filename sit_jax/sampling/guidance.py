"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.errors import check
from sit_jax.transport.prediction import Predict

# (x [b, ...], t_b) -> (c, u), both like x: the conditional and the unconditional prediction.
PredictBoth = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def check_scale(scale: float) -> None:
    """Raise UserError for a scale below 1."""
    check(scale >= 1, f"cfg scale is {scale}; expected 1 (no guidance) or more")


def in_two_calls(conditional: Predict, unconditional: Predict) -> PredictBoth:
    """Return both predictions, each from its own network."""
    return lambda x, t_b: (conditional(x, t_b), unconditional(x, t_b))


def in_one_call(network: Callable, condition: Any, null: Any) -> PredictBoth:
    """Return both predictions of `network(x, t_b, condition)`, from one call on twice the rows.

    `condition` and `null` are pytrees of arrays [b, ...].
    """
    # Each row is followed by its unconditional twin, so that a device which holds some of the rows
    # holds their twins too, and a mesh moves nothing: [b, ...] -> [b, 2, ...] -> [2b, ...].
    twice = jax.tree.map(_interleave, condition, null)

    def both(x: jax.Array, t_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = network(_interleave(x, x), _interleave(t_b, t_b), twice)
        out = out.reshape(len(x), 2, *x.shape[1:])
        return out[:, 0], out[:, 1]

    return both


def is_faster_in_one_call(platform: str) -> bool:
    """Return True if one call for both halves is faster than two (cpu, gpu or tpu).

    It was on an H200, the more the smaller the batch. On two CPU cores it is 7 % faster at batch
    1, and 1 to 4 % slower at 4 and 16. The TPU compiler keeps the activations of one half in
    on-chip memory more often than those of both, and so moves less with two calls, except at small
    batches. tests/benchmarks/README.md has the figures.
    """
    return platform == "gpu"


def _interleave(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a0, b0, a1, b1, ... along the first axis."""
    return jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])


def with_guidance(
    conditional: Predict,
    both: PredictBoth,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Predict:
    """Return the guided prediction u + scale (c - u), where (c, u) = `both` and c = `conditional`.

    Only the first `channels` channels are guided (None: all); the published numbers guide three of
    the four latent channels, which the reference inherited from GLIDE. At times outside `interval`
    (Kynkaanniemi et al., arXiv 2404.07724) the prediction is c, and u is not computed. Raises
    UserError for a scale below 1.
    """
    check_scale(scale)
    if scale == 1:
        return conditional

    def mix(c: jax.Array, u: jax.Array) -> jax.Array:
        guided = u + scale * (c - u)
        if channels is None:
            return guided
        return jnp.concatenate([guided[..., :channels], c[..., channels:]], axis=-1)

    def unguided(x_bhwc: jax.Array, t_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = conditional(x_bhwc, t_b)
        return c, c

    def predict(x_bhwc: jax.Array, t_b: jax.Array) -> jax.Array:
        if tuple(interval) == (0.0, 1.0):
            return mix(*both(x_bhwc, t_b))
        # Adaptive steps can give each sample its own time: compute u if any sample needs it.
        inside_b = (t_b >= interval[0]) & (t_b <= interval[1])
        c, u = jax.lax.cond(jnp.any(inside_b), both, unguided, x_bhwc, t_b)
        return jnp.where(inside_b.reshape(-1, *[1] * (c.ndim - 1)), mix(c, u), c)

    return predict
