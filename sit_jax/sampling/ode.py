"""The probability-flow ODE dx/dt = v(x, t) (paper eq. 2), solved by diffrax.

A state may be any pytree of arrays [b, ...], so that `density` carries log p along with x.
"""

import dataclasses
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

State = Any  # an array [b, ...], or a pytree of them
# The number of equal steps, or their times as fractions of the interval; None: the solver chooses.
Steps = int | Sequence[float] | None
Field = Callable[[State, jax.Array], State]  # (x, t_b) -> dx/dt like x
Drift = Callable[..., State]  # diffrax's form of a field: (t, x, args) -> dx/dt like x
Solver = diffrax.Euler | diffrax.AbstractERK  # explicit Runge-Kutta methods

SOLVERS: dict[str, type[Solver]] = {
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "ralston": diffrax.Ralston,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}
ADAPTIVE = ("bosh3", "tsit5", "dopri5", "dopri8")  # their error estimates can choose the steps
ERROR_NORMS = ("sample", "batch")
_MAX_STEPS = 16**4


@dataclasses.dataclass(frozen=True)
class OdeOptions:
    """A solver with its steps, or with the tolerances that choose them."""

    solver: str = "dopri5"  # a name in SOLVERS
    steps: Steps = None  # None: steps chosen by the tolerances
    shift: float = 1.0  # of `time_grid`
    atol: float = 1e-6
    rtol: float = 1e-3
    error_norm: str = "sample"  # a name in ERROR_NORMS


def check_solver(solver: str, steps: Steps, section: str = "sample") -> None:
    """Raise UserError for an unknown solver, or one that needs `steps` and has none.

    `section` names the settings' section in the message.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    check(
        steps is not None or solver in ADAPTIVE,
        f"solver {solver!r} takes fixed steps only and ignores atol and rtol; give "
        f"{section}.steps, or one of {', '.join(ADAPTIVE)}",
    )


def check_times(name: str, times: Sequence[float]) -> None:
    """Raise UserError unless the fractions rise from 0 to 1."""
    rising = all(a < b for a, b in itertools.pairwise(times))
    check(
        len(times) >= 2 and rising and times[0] == 0 and times[-1] == 1,
        f"{name} is {tuple(times)}; expected fractions of the way from noise to data that rise "
        "from 0 to 1",
    )


def time_grid(
    interval: tuple[float | jax.Array, float | jax.Array],
    steps: int | Sequence[float],
    shift: float = 1.0,
) -> jax.Array:
    """Return the float32 times of the steps from interval[0] to interval[1], both included.

    `steps` is the number of equal steps, or their times as fractions u of the interval. Then
    u' = s u / (1 + (s - 1) u): a shift s > 1 spends more of the steps near data (Esser et al.,
    arXiv 2403.03206, eq. 23, in our direction of time). A backward interval has the same grid in
    reverse order. Raises UserError for fractions that do not rise from 0 to 1.
    """
    if isinstance(steps, int):
        u = jnp.linspace(0.0, 1.0, steps + 1)
    else:
        check_times("the grid of times", steps)
        u = jnp.array(steps, jnp.float32)
    low = jnp.minimum(*interval)
    high = jnp.maximum(*interval)
    times = low + (high - low) * shift * u / (1 + (shift - 1) * u)
    return jnp.where(interval[1] > interval[0], times, times[::-1])


def solve(
    field: Field, x: State, interval: Interval, options: OdeOptions, frames: int | None = None
) -> tuple[State, jax.Array]:
    """Carry x from interval[0] to interval[1] (backwards if that is smaller).

    Return x, NaN where the solver gave up, and the number of calls of `field`.

    - With `options.steps`, the steps are those of `time_grid`.
    - Without, `atol` and `rtol` choose them: for each sample on its own (error norm "sample", so
      that no sample depends on its neighbours), or by the RMS over the batch ("batch", as
      torchdiffeq does).
    - With `frames`, x is [b, frames, ...]: the states at that many equal times, both ends
      included, interpolated between steps.

    Raises UserError for an unknown solver or error norm, and for a solver that has neither steps
    nor an error estimate.
    """
    check_solver(options.solver, options.steps)
    solver = SOLVERS[options.solver]()
    n = len(jax.tree.leaves(x)[0])

    def drift(t: jax.Array, x: State, _: Any = None) -> State:
        return field(x, jnp.full((n,), t))

    if options.steps is not None:
        times = time_grid(interval, options.steps, options.shift)
        controller = StepTo(times)
        x, taken = _diffeqsolve(
            drift, solver, times[0], times[-1], None, x, controller, len(times) - 1, frames
        )
        return _samples_first(x, frames), _evaluations(solver, taken)
    if options.error_norm not in ERROR_NORMS:
        raise unknown_name("error norm", options.error_norm, ERROR_NORMS)
    if options.error_norm == "sample":
        x, taken = _solve_each(field, x, interval, solver, options, frames)
    else:
        x, taken = _solve_adaptively(drift, x, interval, solver, options, frames)
        x = _samples_first(x, frames)
    # All samples run until the slowest has finished. Choosing the first step took two calls.
    return x, _evaluations(solver, jnp.max(taken)) + 2


def _samples_first(x: State, frames: int | None) -> State:
    """Move diffrax's leading axis of times behind the samples: [frames, b, ...] -> [b, frames]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), x) if frames else x


def _solve_each(
    field: Field,
    x: State,
    interval: Interval,
    solver: Solver,
    options: OdeOptions,
    frames: int | None,
) -> tuple[State, jax.Array]:
    """Solve with separate steps for each sample, but one call of `field` for all of them."""
    # vmap over the samples gives each one a solver: a state x [...], a time t [] and a step size.
    # Where the solver calls `field_of_sample`, custom_vmap makes vmap run the rule `field_of_batch`
    # instead, with the x [b, ...] and t [b] of all samples: one call of the network on a batch.
    # The body of `field_of_sample` is only traced, and never runs; it declares that the result has
    # the shapes of x. The rule must not capture traced arrays (weights, labels), so closure_convert
    # makes those that `field` captured arguments.
    times_b = jnp.zeros(len(jax.tree.leaves(x)[0]))
    closed = eqx.filter_closure_convert(field, x, times_b)
    arrays, static = eqx.partition(closed, eqx.is_array)

    @custom_vmap
    def field_of_sample(arrays: Any, x: State, t: jax.Array) -> State:
        return jax.tree.map(jnp.zeros_like, x)

    @field_of_sample.def_vmap
    def field_of_batch(
        n: int, batched: Sequence[Any], arrays: Any, x: State, t: jax.Array
    ) -> tuple[State, Any]:
        t_b = t if batched[2] else jnp.full((n,), t)  # the first t is one for all samples
        return eqx.combine(arrays, static)(x, t_b), jax.tree.map(lambda _: True, x)

    def drift(t: jax.Array, x: State, _: Any = None) -> State:
        return field_of_sample(arrays, x, t)

    def solve_sample(x: State) -> tuple[State, jax.Array]:
        return _solve_adaptively(drift, x, interval, solver, options, frames)

    return jax.vmap(solve_sample)(x)


def _solve_adaptively(
    drift: Drift,
    x: State,
    interval: Interval,
    solver: Solver,
    options: OdeOptions,
    frames: int | None,
) -> tuple[State, jax.Array]:
    """Solve with steps chosen by the tolerances; return x and the number of steps tried."""
    order = solver.order(None)
    assert order is not None, "every solver in SOLVERS has an order"
    dt0 = _first_step(drift, x, interval, order, options.atol, options.rtol)
    controller = diffrax.PIDController(rtol=options.rtol, atol=options.atol, norm=_norm)
    t0, t1 = map(jnp.float32, interval)
    return _diffeqsolve(drift, solver, t0, t1, dt0, x, controller, _MAX_STEPS, frames)


def _norm(x: State) -> jax.Array:
    """Return the largest RMS of the state's arrays.

    With it, the scalar log p controls the step size as much as the image does.
    """
    # The barriers keep XLA from fusing the sums with what comes before and after them, which would
    # round them differently on one device and on several.
    x = jax.lax.optimization_barrier(x)
    norm = jnp.max(jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(x)]))
    return jax.lax.optimization_barrier(norm)


def _first_step(
    drift: Drift, x: State, interval: Interval, order: int, atol: float, rtol: float
) -> jax.Array:
    """Return a first step (Hairer, Norsett & Wanner, Solving ODEs I, section II.4).

    diffrax implements it, but does not recognise its own wrapped terms as ODEs (0.7.2), and then
    takes 0.01 whatever the drift.
    """
    t0 = jnp.float32(interval[0])
    direction = 1.0 if interval[1] > interval[0] else -1.0

    def size(a: State) -> jax.Array:
        """Return the norm of `a` in units of the tolerance at x."""
        return _norm(jax.tree.map(lambda a, x: a / (atol + rtol * jnp.abs(x)), a, x))

    # An Euler step that moves x by about 1 % of its size.
    f0 = drift(t0, x)
    h0 = jnp.where(jnp.minimum(size(x), size(f0)) < 1e-5, 1e-6, 0.01 * size(x) / size(f0))
    # The change of the drift over that step estimates the second derivative of x.
    f1 = drift(t0 + direction * h0, jax.tree.map(lambda x, f: x + direction * h0 * f, x, f0))
    change = jnp.maximum(size(f0), size(jax.tree.map(jnp.subtract, f1, f0)) / h0)
    # The step at which a method of this order is expected to err by 1 % of the tolerance.
    h1 = (0.01 / jnp.maximum(change, 1e-15)) ** (1 / order)
    return direction * jnp.minimum(jnp.minimum(100 * h0, h1), abs(interval[1] - interval[0]))


class StepTo(diffrax.StepTo):
    """Steps to given times, which must run from t0 to t1 in order, as those of `time_grid` do.

    diffrax checks that again in the compiled program, with callbacks to the host. They would keep
    the program out of the compilation cache, and jax cannot compile them for a GPU that is absent.
    """

    def wrap(self, direction: Any) -> "StepTo":
        """Return the times in the direction 1 or -1."""
        return StepTo(ts=self.ts * direction)

    def init(self, *_: Any) -> tuple[jax.Array, int]:
        """Return the first step's end, and the index of the next one's."""
        return self.ts[1], 2


def _diffeqsolve(
    drift: Drift,
    solver: Solver,
    t0: jax.Array,
    t1: jax.Array,
    dt0: jax.Array | None,
    x: State,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    frames: int | None,
) -> tuple[State, jax.Array]:
    """Return x, with a leading axis of times if `frames`, and the number of steps tried."""
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
        # Throwing needs a host callback, which would keep the program out of the compilation cache.
        throw=False,
    )
    reached = solution.result == diffrax.RESULTS.successful
    x = jax.tree.map(lambda ys: jnp.where(reached, ys if frames else ys[0], jnp.nan), solution.ys)
    return x, solution.stats["num_steps"]


def save_at(t0: jax.Array, t1: jax.Array, frames: int | None) -> diffrax.SaveAt:
    """Return the times to save: `frames` equal ones from t0 to t1, both included; None: only t1."""
    return diffrax.SaveAt(ts=jnp.linspace(t0, t1, frames)) if frames else diffrax.SaveAt(t1=True)


def _evaluations(solver: Solver, steps: jax.Array) -> jax.Array:
    """Return the number of calls of the drift in `steps` tried steps.

    Each stage of the Butcher tableau is a call. In an FSAL method (first same as last) the last
    stage of a step is the first of the next, so it is called only once.
    """
    if isinstance(solver, diffrax.Euler):
        return steps
    tableau = solver.tableau
    assert isinstance(tableau, diffrax.ButcherTableau), "SOLVERS has no implicit-explicit methods"
    if tableau.fsal:
        return steps * (tableau.num_stages - 1) + 1
    return steps * tableau.num_stages
