"""The probability-flow ODE dx/dt = v(x, t) (paper eq. 2), solved by diffrax.

A state may be any pytree of arrays [b, ...], so that `density` carries log p along with x.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from sit_jax.errors import check, unknown_name
from sit_jax.transport.interval import Interval

State = Any  # one array [b, ...], or a pytree of them
Steps = (
    int | Sequence[float] | None
)  # how many equal ones, or their times as fractions of the way, or the solver's own
Field = Callable[[State, jax.Array], State]  # (x, t_b) -> dx/dt like x

SOLVERS = {
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "ralston": diffrax.Ralston,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
ADAPTIVE = ("bosh3", "tsit5", "dopri5", "dopri8")  # those whose error estimate is worth steering by
ERROR_NORMS = ("sample", "batch")
_MAX_STEPS = 16**4


def check_solver(solver: str, steps: Steps, section: str = "sample") -> None:
    """`UserError` for an unknown solver, or one that cannot choose its own steps without a number of them.

    `section` is where the settings are, for the message.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    check(
        steps is not None or solver in ADAPTIVE,
        f"solver {solver!r} takes fixed steps only, so atol and rtol mean nothing to it; give {section}.steps, "
        f"or one of {', '.join(ADAPTIVE)}",
    )


def check_times(name: str, times: Sequence[float]) -> None:
    """`UserError` unless the fractions rise from 0 to 1."""
    rising = all(a < b for a, b in itertools.pairwise(times))
    check(
        len(times) >= 2 and rising and times[0] == 0 and times[-1] == 1,
        f"{name} is {tuple(times)}; expected fractions of the way from noise to data that rise from 0 to 1",
    )


def time_grid(interval: Interval, steps: int | Sequence[float], shift: float = 1.0) -> jax.Array:
    """The times of the steps from interval[0] to interval[1], float32: `steps` equal ones, or given as fractions u.

    t' = s u / (1 + (s - 1) u): a shift s > 1 spends more of the steps near data (Esser et al., arXiv 2403.03206, eq.
    23, in our direction of time). Backwards, the grid is the same one reversed. `UserError` for impossible fractions.
    """
    if isinstance(steps, int):
        u = jnp.linspace(0.0, 1.0, steps + 1)
    else:
        check_times("the grid of times", steps)
        u = jnp.array(steps, jnp.float32)
    low, high = jnp.minimum(*interval), jnp.maximum(*interval)
    times = low + (high - low) * shift * u / (1 + (shift - 1) * u)
    return jnp.where(interval[1] > interval[0], times, times[::-1])


def solve(
    field: Field,
    x: State,
    interval: Interval,
    *,
    solver: str,
    steps: Steps = None,
    shift: float = 1.0,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    error_norm: str = "sample",
    frames: int | None = None,
) -> tuple[State, jax.Array]:
    """x carried from interval[0] to interval[1] (backwards if that is smaller), and how often `field` was called.

    `steps` fixed ones on `time_grid`; or, with steps None, steps chosen by `atol` and `rtol`: for every sample alone
    ("sample", so that none depends on its neighbours) or by the RMS over the batch ("batch", as torchdiffeq). With
    `frames`, x is [b, frames, ...]: at that many equal times from the first to the last, interpolated between steps.
    NaN where the solver gave up. `UserError` for an unknown solver or one without an error estimate.
    """
    check_solver(solver, steps)
    made, n = SOLVERS[solver](), len(jax.tree.leaves(x)[0])

    def drift(t, x, _=None):
        return field(x, jnp.full((n,), t))

    if steps is not None:
        times = time_grid(interval, steps, shift)
        controller = diffrax.StepTo(times)
        x, taken = _diffeqsolve(
            drift, made, times[0], times[-1], None, x, controller, len(times) - 1, frames
        )
        return _samples_first(x, frames), _evaluations(made, taken)
    if error_norm not in ERROR_NORMS:
        raise unknown_name("error norm", error_norm, ERROR_NORMS)
    if error_norm == "sample":
        x, taken = _solve_each(field, x, interval, made, atol, rtol, frames)
    else:
        x, taken = _solve_adaptively(drift, x, interval, made, atol, rtol, frames)
        x = _samples_first(x, frames)
    return x, _evaluations(made, jnp.max(taken)) + 2  # the choice of the first step takes two


def _samples_first(x: State, frames: int | None) -> State:
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), x) if frames else x


def _solve_each(field, x, interval, solver, atol, rtol, frames):
    # Each sample has its own clock, while the network is still called on the whole batch at once: below vmap the rule
    # is what runs, and `one` itself only lends its shapes. What field closes over must be an argument there.
    closed = eqx.filter_closure_convert(field, x, jnp.zeros(len(jax.tree.leaves(x)[0])))
    arrays, static = eqx.partition(closed, eqx.is_array)

    @custom_vmap
    def one(arrays, x, t):
        return jax.tree.map(jnp.zeros_like, x)

    @one.def_vmap
    def _(n, batched, arrays, x, t_b):
        t_b = t_b if batched[2] else jnp.full((n,), t_b)
        return eqx.combine(arrays, static)(x, t_b), jax.tree.map(lambda _: True, x)

    def drift(t, x, _=None):
        return one(arrays, x, t)

    return jax.vmap(lambda x: _solve_adaptively(drift, x, interval, solver, atol, rtol, frames))(x)


def _solve_adaptively(drift, x, interval, solver, atol, rtol, frames):
    dt0 = _first_step(drift, x, interval, solver.order(None), atol, rtol)
    controller = diffrax.PIDController(rtol=rtol, atol=atol, norm=_norm)
    t0, t1 = map(jnp.float32, interval)
    return _diffeqsolve(drift, solver, t0, t1, dt0, x, controller, _MAX_STEPS, frames)


def _norm(x):
    """The largest RMS of the state's arrays: one number beside thousands of pixels is steered by like them."""
    return jnp.max(jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(x)]))


def _first_step(drift, x, interval, order, atol, rtol):
    """A first step that an explicit Euler step suggests (Hairer, Norsett & Wanner, Solving ODEs I, section II.4).

    diffrax has it, but does not recognise its own wrapped terms as ODEs (0.7.2) and takes 0.01 whatever the drift.
    """
    t0, direction = jnp.float32(interval[0]), 1.0 if interval[1] > interval[0] else -1.0

    def size(a):
        return _norm(jax.tree.map(lambda a, x: a / (atol + rtol * jnp.abs(x)), a, x))

    f0 = drift(t0, x)
    h0 = jnp.where(jnp.minimum(size(x), size(f0)) < 1e-5, 1e-6, 0.01 * size(x) / size(f0))
    f1 = drift(t0 + direction * h0, jax.tree.map(lambda x, f: x + direction * h0 * f, x, f0))
    change = jnp.maximum(size(f0), size(jax.tree.map(jnp.subtract, f1, f0)) / h0)
    h1 = (0.01 / jnp.maximum(change, 1e-15)) ** (1 / order)
    return direction * jnp.minimum(jnp.minimum(100 * h0, h1), abs(interval[1] - interval[0]))


def _diffeqsolve(drift, solver, t0, t1, dt0, x, controller, max_steps, frames):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(drift),
        solver,
        t0=t0,
        t1=t1,
        dt0=dt0,
        y0=x,
        stepsize_controller=controller,
        saveat=save_at(t0, t1, frames),
        max_steps=max_steps,
        throw=False,  # a host callback, which would keep the program out of the compilation cache
    )
    reached = solution.result == diffrax.RESULTS.successful
    x = jax.tree.map(lambda ys: jnp.where(reached, ys if frames else ys[0], jnp.nan), solution.ys)
    return x, solution.stats["num_steps"]


def save_at(t0: jax.Array, t1: jax.Array, frames: int | None) -> diffrax.SaveAt:
    """The end alone, or `frames` equal times from t0 to t1."""
    return diffrax.SaveAt(ts=jnp.linspace(t0, t1, frames)) if frames else diffrax.SaveAt(t1=True)


def _evaluations(solver, steps):
    """Calls of the drift in `steps` tried steps: one a stage; the last stage of some is the next step's first."""
    if isinstance(solver, diffrax.Euler):
        return steps
    tableau = solver.tableau
    return steps * (tableau.num_stages - 1) + 1 if tableau.fsal else steps * tableau.num_stages
