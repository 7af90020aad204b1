"""The probability-flow ODE dx/dt = v(x, t) (paper eq. 2), solved by diffrax."""

import dataclasses

import diffrax
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

    euler and heun take `steps` equal steps. dopri5 chooses its steps by `atol` and `rtol` for every sample alone, so a sample
    does not depend on its neighbours. `UserError` for an unknown solver.
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
    # Each sample has its own clock, while the network is still called on the whole batch at once.
    @custom_vmap
    def one(x_hwc, t):
        return velocity(x_hwc[None], t[None])[0]

    @one.def_vmap
    def _(n, batched, x_bhwc, t_b):
        return velocity(x_bhwc, t_b if batched[1] else jnp.full((n,), t_b)), True

    controller = diffrax.PIDController(rtol=rtol, atol=atol)

    def solve_one(x_hwc):
        return _final(lambda t, x, _: one(x, t), solver, interval, None, x_hwc, controller, 16**4)

    return jax.vmap(solve_one)(x_bhwc)


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
    )
    return solution.ys[0]
