"""log p of data by the probability-flow ODE, run from data to noise (instantaneous change of variables).

With dx/dt = v(x, t), d log p_t(x_t) / dt = -div v(x_t, t) along the path of x_t (Chen et al., arXiv 1806.07366, eq. 8),
so log p(x_1) = log N(x_0; 0, I) + the integral of div v from t=1 to t=0. div v is the trace of dv/dx: exact, or
Hutchinson's estimate eps . (dv/dx) eps with a probe of E[eps eps^T] = I (Grathwohl et al., arXiv 1810.01367, eq. 6).
n counts probes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name
from sit_jax.sampling import ode
from sit_jax.transport.interval import Interval
from sit_jax.transport.prediction import Predict

PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
_DIRECTIONS = 16  # of the exact trace at a time: memory is that of so many forward passes


def draw_probes(kind: str, keys_b: jax.Array, n: int, shape: tuple[int, ...]) -> jax.Array:
    """n probes for each sample, [n, b, *shape]; probe k of sample i depends on keys_b[i] and k alone.

    `UserError` for an unknown kind.
    """
    if kind not in PROBES:
        raise unknown_name("probe", kind, PROBES)

    def draw(k, key):
        return PROBES[kind](jax.random.fold_in(key, k), shape).astype(jnp.float32)

    return jax.vmap(lambda k: jax.vmap(lambda key: draw(k, key))(keys_b))(jnp.arange(n))


def divergence(
    velocity: Predict, x_bhwc: jax.Array, t_b: jax.Array, probes_nbhwc: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(v like x, div v [b]): the mean of Hutchinson's estimate over the probes, or exact where they are None.

    The exact one differentiates along every dimension in turn.
    """

    def along(direction):
        return jax.jvp(lambda x: velocity(x, t_b), (x_bhwc,), (direction,))

    def dot(a, b):
        return jnp.sum(a * b, axis=range(1, a.ndim))

    if probes_nbhwc is not None:
        v, derivative = jax.vmap(along, out_axes=(None, 0))(probes_nbhwc)
        return v, jnp.mean(jax.vmap(dot)(probes_nbhwc, derivative), axis=0)

    def diagonal(i):
        unit_hwc = jnp.zeros(x_bhwc[0].size, x_bhwc.dtype).at[i].set(1).reshape(x_bhwc.shape[1:])
        unit_bhwc = jnp.broadcast_to(unit_hwc, x_bhwc.shape)
        return dot(unit_bhwc, along(unit_bhwc)[1])

    diagonal_db = jax.lax.map(diagonal, jnp.arange(x_bhwc[0].size), batch_size=_DIRECTIONS)
    return velocity(x_bhwc, t_b), jnp.sum(diagonal_db, axis=0)


def log_prob(
    velocity: Predict,
    x_bhwc: jax.Array,
    interval: Interval,
    probes_nbhwc: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log p [b] in nats, the noise like x that flows to x, evaluations) under the flow of N(0, I) over `interval`.

    The probes stay the same along a trajectory, so an adaptive solver meets a smooth function; None takes the exact
    trace. An evaluation is one of the velocity with its divergence. `options` are those of `ode.solve`, whose steps
    heed the errors of x and of log p alike. An interval that ends before t=1 takes x as that time's data.
    """

    def field(state, t_b):
        return divergence(velocity, state[0], t_b, probes_nbhwc)

    backwards = interval[1], interval[0]
    (noise_bhwc, change_b), evaluations = ode.solve(
        field, (x_bhwc, jnp.zeros(len(x_bhwc))), backwards, **options
    )
    prior_b = jnp.sum(
        -(noise_bhwc**2) / 2 - math.log(2 * math.pi) / 2, axis=range(1, noise_bhwc.ndim)
    )
    return prior_b + change_b, noise_bhwc, evaluations
