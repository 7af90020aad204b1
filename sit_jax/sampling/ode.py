"""The probability-flow ODE dx/dt = v(x, t) (paper eq. 2), solved by diffrax."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sit_jax.errors import unknown_name
from sit_jax.transport.interval import Interval
from sit_jax.transport.prediction import Predict


@dataclasses.dataclass(frozen=True)
class _Solver:
    make: type
    adaptive: bool


SOLVERS = {
    "euler": _Solver(diffrax.Euler, adaptive=False),
    "heun": _Solver(diffrax.Heun, adaptive=False),
    "dopri5": _Solver(diffrax.Dopri5, adaptive=True),
}


def solve(
    velocity: Predict,
    x_bhwc: jax.Array,
    interval: Interval,
    *,
    solver: str,
    steps: int,
    atol: float,
    rtol: float,
) -> jax.Array:
    """x carried from interval[0] to interval[1] (backwards if that is smaller), like x_bhwc.

    euler and heun take `steps` equal steps. dopri5 chooses its steps by `atol` and `rtol` for every sample alone, so
    a sample does not depend on its neighbours. NaN where the solver gave up. `UserError` for an unknown solver.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    if SOLVERS[solver].adaptive:
        return _solve_each(velocity, x_bhwc, interval, SOLVERS[solver].make(), atol, rtol)

    def drift(t, x, _):
        return velocity(x, jnp.full(x.shape[:1], t))

    t0, t1 = interval
    controller = diffrax.StepTo(jnp.linspace(t0, t1, steps + 1))
    return _final(drift, SOLVERS[solver].make(), interval, None, x_bhwc, controller, steps)


def _solve_each(velocity, x_bhwc, interval, solver, atol, rtol):
    # Each sample has its own clock, while the network is still called on the whole batch at once: below vmap the rule
    # is what runs, and `one` itself only lends its shapes. What velocity closes over must be an argument there.
    closed = eqx.filter_closure_convert(velocity, x_bhwc, jnp.zeros(len(x_bhwc)))
    arrays, static = eqx.partition(closed, eqx.is_array)

    @custom_vmap
    def one(arrays, x_hwc, t):
        return jnp.zeros_like(x_hwc)

    @one.def_vmap
    def _(n, batched, arrays, x_bhwc, t_b):
        t_b = t_b if batched[2] else jnp.full((n,), t_b)
        return eqx.combine(arrays, static)(x_bhwc, t_b), True

    controller = diffrax.PIDController(rtol=rtol, atol=atol)

    def solve_one(x_hwc):
        def drift(t, x, _):
            return one(arrays, x, t)

        dt0 = _first_step(drift, x_hwc, interval, solver.order(None), atol, rtol)
        return _final(drift, solver, interval, dt0, x_hwc, controller, 16**4)

    return jax.vmap(solve_one)(x_bhwc)


def _first_step(drift, x, interval, order, atol, rtol):
    """A first step that an explicit Euler step suggests (Hairer, Norsett & Wanner, Solving ODEs I, section II.4).

    diffrax has it, but does not recognise its own wrapped terms as ODEs (0.7.2) and takes 0.01 whatever the drift.
    """
    t0, direction = jnp.float32(interval[0]), 1.0 if interval[1] > interval[0] else -1.0

    def size(a):
        return jnp.sqrt(jnp.mean((a / (atol + rtol * jnp.abs(x))) ** 2))

    f0 = drift(t0, x, None)
    h0 = jnp.where(jnp.minimum(size(x), size(f0)) < 1e-5, 1e-6, 0.01 * size(x) / size(f0))
    f1 = drift(t0 + direction * h0, x + direction * h0 * f0, None)
    change = jnp.maximum(size(f0), size(f1 - f0) / h0)
    h1 = (0.01 / jnp.maximum(change, 1e-15)) ** (1 / order)
    return direction * jnp.minimum(jnp.minimum(100 * h0, h1), abs(interval[1] - interval[0]))


def _final(drift, solver, interval, dt0, x, controller, max_steps):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(drift),
        solver,
        t0=jnp.float32(interval[0]),
        t1=jnp.float32(interval[1]),
        dt0=dt0,
        y0=x,
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,  # a host callback, which would keep the program out of the compilation cache
    )
    return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[0], jnp.nan)
