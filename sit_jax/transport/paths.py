"""Paths x_t = alpha_t x1 + sigma_t x0 from noise x0 to data x1 (paper, section 2.2; Table 1)."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name

Coefficient = Callable[[jax.Array], jax.Array]  # t of any shape -> like t


@dataclasses.dataclass(frozen=True)
class Path:
    """The four functions of time that define a path; `d_` is the derivative in t.

    The fields after them state where the path is singular.
    """

    name: str
    alpha: Coefficient
    d_alpha: Coefficient
    sigma: Coefficient
    d_sigma: Coefficient
    # alpha(0) > 0: the interval may start at t=0 whatever the network predicts.
    noise_remains_at_0: bool = False
    # alpha' and sigma' are finite on [0, 1]: velocity prediction needs no eps.
    velocity_is_bounded: bool = True
    # Default distance from a singular end of time, in training and in sampling.
    train_eps: float = 1e-3
    sample_eps: float = 1e-3


def _linear() -> Path:
    return Path(
        "Linear",
        alpha=lambda t: t,
        d_alpha=jnp.ones_like,
        sigma=lambda t: 1 - t,
        d_sigma=lambda t: -jnp.ones_like(t),
    )


def _gvp() -> Path:
    half_pi = math.pi / 2

    def alpha(t: jax.Array) -> jax.Array:
        return jnp.sin(half_pi * t)

    def sigma(t: jax.Array) -> jax.Array:
        # Equal to cos(pi t / 2), which in float32 is slightly negative at t=1, so that the square
        # root of D would be NaN.
        return jnp.sin(half_pi * (1 - t))

    return Path(
        "GVP",
        alpha=alpha,
        d_alpha=lambda t: half_pi * sigma(t),
        sigma=sigma,
        d_sigma=lambda t: -half_pi * alpha(t),
    )


def _vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Return the variance-preserving diffusion (Song et al., arXiv 2011.13456, eq. 33).

    Its time runs the other way there.
    """

    def log_alpha(t: jax.Array) -> jax.Array:
        return -((1 - t) ** 2) * (beta_max - beta_min) / 4 - (1 - t) * beta_min / 2

    def d_log_alpha(t: jax.Array) -> jax.Array:
        return (1 - t) * (beta_max - beta_min) / 2 + beta_min / 2

    def alpha(t: jax.Array) -> jax.Array:
        return jnp.exp(log_alpha(t))

    def sigma(t: jax.Array) -> jax.Array:
        # expm1: 1 - exp(2 log alpha) would lose every digit near t=1.
        return jnp.sqrt(-jnp.expm1(2 * log_alpha(t)))

    return Path(
        "VP",
        alpha=alpha,
        d_alpha=lambda t: alpha(t) * d_log_alpha(t),
        sigma=sigma,
        d_sigma=lambda t: -(alpha(t) ** 2) * d_log_alpha(t) / sigma(t),
        noise_remains_at_0=True,
        velocity_is_bounded=False,
        train_eps=1e-5,
    )


PATHS = {path.name: path for path in (_linear(), _gvp(), _vp())}


def path_by_name(name: str) -> Path:
    """Return the path of that name in PATHS. Raises UserError for an unknown name."""
    if name not in PATHS:
        raise unknown_name("path", name, PATHS)
    return PATHS[name]


def time_of_noise(path: Path, ratio: float) -> float:
    """Return the t at which sigma / alpha, which falls from noise to data, reaches `ratio`.

    Found by bisection.
    """
    low = 0.0
    high = 1.0
    for _ in range(30):
        t = (low + high) / 2
        if path.sigma(jnp.float32(t)) > ratio * path.alpha(jnp.float32(t)):
            low = t
        else:
            high = t
    return high


def expand_time(t_b: jax.Array, x: jax.Array) -> jax.Array:
    """Append axes of size 1 to t_b, so that it broadcasts against x [b, ...].

    A scalar t is returned as it is.
    """
    return t_b.reshape(t_b.shape + (1,) * (x.ndim - t_b.ndim)) if t_b.ndim else t_b


def interpolate(path: Path, x1: jax.Array, x0: jax.Array, t_b: jax.Array) -> jax.Array:
    """Return x_t = alpha x1 + sigma x0 (paper eq. 1). x1 data and x0 noise [b, ...], t_b [b]."""
    t = expand_time(t_b, x1)
    return path.alpha(t) * x1 + path.sigma(t) * x0


def target_velocity(path: Path, x1: jax.Array, x0: jax.Array, t_b: jax.Array) -> jax.Array:
    """Return u_t = alpha' x1 + sigma' x0, the velocity of `interpolate` (paper eq. 3)."""
    t = expand_time(t_b, x1)
    return path.d_alpha(t) * x1 + path.d_sigma(t) * x0


def drift_variance(path: Path, t: jax.Array) -> jax.Array:
    """Return (alpha'/alpha) sigma^2 - sigma sigma', the score's factor in the velocity.

    See the paper's eq. 6. It is infinite where alpha=0.
    """
    return path.d_alpha(t) / path.alpha(t) * path.sigma(t) ** 2 - path.sigma(t) * path.d_sigma(t)
