"""The distribution of training times."""

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name
from sit_jax.transport.interval import Interval

DISTRIBUTIONS = ("uniform", "logit-normal")


def rescale(interval: Interval, u: jax.Array) -> jax.Array:
    """Map u in [0, 1] linearly to [t0, t1]."""
    t0, t1 = interval
    return u * (t1 - t0) + t0


def training_times(
    key: jax.Array,
    n: int,
    interval: Interval,
    distribution: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> jax.Array:
    """Draw n times in [t0, t1], float32 [n].

    "logit-normal" is the sigmoid of a normal(mean, std) (Esser et al., arXiv 2403.03206, eq. 19).
    Here t=1 is data, so a positive mean gives more nearly clean images. Raises UserError for an
    unknown distribution.
    """
    if distribution == "uniform":
        return rescale(interval, jax.random.uniform(key, (n,), jnp.float32))
    if distribution == "logit-normal":
        logits = mean + std * jax.random.normal(key, (n,), jnp.float32)
        return rescale(interval, jax.nn.sigmoid(logits))
    raise unknown_name("time distribution", distribution, DISTRIBUTIONS)


def quantiles(
    interval: Interval,
    u: jax.Array,
    distribution: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
) -> jax.Array:
    """Return the times below which a share u in [0, 1] of the `training_times` lies, like u.

    Raises UserError for an unknown distribution.
    """
    if distribution == "uniform":
        return rescale(interval, u)
    if distribution == "logit-normal":
        return rescale(interval, jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u)))
    raise unknown_name("time distribution", distribution, DISTRIBUTIONS)
