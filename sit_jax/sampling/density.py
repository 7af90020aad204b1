"""log p of data by the probability-flow ODE, run from data to noise.

With dx/dt = v(x, t), d log p_t(x_t) / dt = -div v(x_t, t) along the path of x_t (the instantaneous
change of variables; Chen et al., arXiv 1806.07366, eq. 8). So log p(x_1) = log N(x_0; 0, I) + the
integral of div v from t=1 to t=0. div v is the trace of dv/dx: exact, or Hutchinson's estimate
eps . (dv/dx) eps with a probe of E[eps eps^T] = I (Grathwohl et al., arXiv 1810.01367, eq. 6).

Shape suffixes: n probes, d dimensions of a sample.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name
from sit_jax.sampling import ode
from sit_jax.transport.interval import Interval
from sit_jax.transport.prediction import Predict

# (key, shape) -> a probe
PROBES: dict[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
    # Not jax.random.rademacher, whose draws are others when 64-bit types are enabled.
    "rademacher": lambda key, shape: jnp.where(
        jax.random.bernoulli(key, jnp.float32(0.5), shape), 1.0, -1.0
    ),
    "gaussian": lambda key, shape: jax.random.normal(key, shape, jnp.float32),
}
# Directions that the exact trace takes at once, with the memory of as many forward passes.
_DIRECTIONS = 16


def draw_probes(kind: str, keys_b: jax.Array, n: int, shape: tuple[int, ...]) -> jax.Array:
    """Draw n probes for each sample, float32 [n, b, *shape].

    Probe k of sample i depends only on keys_b[i] and k. Raises UserError for an unknown kind.
    """
    if kind not in PROBES:
        raise unknown_name("probe", kind, PROBES)

    def draw(k: jax.Array, key: jax.Array) -> jax.Array:
        return PROBES[kind](jax.random.fold_in(key, k), shape).astype(jnp.float32)

    return jax.vmap(lambda k: jax.vmap(lambda key: draw(k, key))(keys_b))(jnp.arange(n))


def divergence(
    velocity: Predict, x_bhwc: jax.Array, t_b: jax.Array, probes_nbhwc: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return v like x, and div v [b].

    div v is the mean of Hutchinson's estimates over the probes. Without probes it is exact, from
    one derivative per dimension.
    """

    def derivative(direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return v and (dv/dx) direction."""
        return jax.jvp(lambda x: velocity(x, t_b), (x_bhwc,), (direction,))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=range(1, a.ndim))

    if probes_nbhwc is not None:
        v_bhwc, products_nbhwc = jax.vmap(derivative, out_axes=(None, 0))(probes_nbhwc)
        return v_bhwc, jnp.mean(jax.vmap(dot)(probes_nbhwc, products_nbhwc), axis=0)

    def diagonal(i: jax.Array) -> jax.Array:
        """Return the diagonal element dv_i/dx_i of each sample, [b]."""
        unit_hwc = jnp.zeros(x_bhwc[0].size, x_bhwc.dtype).at[i].set(1).reshape(x_bhwc.shape[1:])
        unit_bhwc = jnp.broadcast_to(unit_hwc, x_bhwc.shape)
        return dot(unit_bhwc, derivative(unit_bhwc)[1])

    diagonal_db = jax.lax.map(diagonal, jnp.arange(x_bhwc[0].size), batch_size=_DIRECTIONS)
    return velocity(x_bhwc, t_b), jnp.sum(diagonal_db, axis=0)


def log_prob(
    velocity: Predict,
    x_bhwc: jax.Array,
    interval: Interval,
    probes_nbhwc: jax.Array | None,
    options: ode.OdeOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return log p of x under the flow of N(0, I) over `interval`, the noise and the evaluations.

    log p [b] is in nats; the noise, like x, is the one that flows to x; the evaluations are those
    of the velocity with its divergence. x belongs to the end of the interval, at t=1 or earlier.
    Without probes the trace is exact. The probes stay the same along a trajectory, so that an
    adaptive solver sees a smooth function; the errors of x and of log p both control its steps.
    """

    def field(state: ode.State, t_b: jax.Array) -> ode.State:
        return divergence(velocity, state[0], t_b, probes_nbhwc)

    # Carry x from data to noise, and with it the integral of div v.
    state = (x_bhwc, jnp.zeros(len(x_bhwc)))
    backwards = (interval[1], interval[0])
    (noise_bhwc, change_b), evaluations = ode.solve(field, state, backwards, options)
    # The density of the noise under N(0, I).
    log_normal = -(noise_bhwc**2) / 2 - math.log(2 * math.pi) / 2
    prior_b = jnp.sum(log_normal, axis=range(1, noise_bhwc.ndim))
    return prior_b + change_b, noise_bhwc, evaluations
