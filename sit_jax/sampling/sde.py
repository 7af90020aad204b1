"""The reverse SDE dx = (v + D s) dt + sqrt(2 D) dW (paper eq. 5 with w = 2 D), solved by diffrax on a fixed grid.

Every D gives the same marginals, so it is chosen when sampling. It depends on t alone: the noise is additive, which the
order-1.5 solvers need.
"""

from collections.abc import Callable, Sequence

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx

from sit_jax.errors import unknown_name
from sit_jax.sampling.brownian import Draw, GridBrownianPath
from sit_jax.sampling.ode import save_at, time_grid
from sit_jax.transport.diffusion import diffusion
from sit_jax.transport.interval import Interval
from sit_jax.transport.paths import Path

Fields = Callable[
    [jax.Array, jax.Array], tuple[jax.Array, jax.Array]
]  # (x_bhwc, t_b) -> (velocity, score)


class ReferenceHeun(diffrax.AbstractItoSolver):
    """The PyTorch reference's Heun: all of the step's noise first, then a Heun step of the drift from there."""

    term_structure = diffrax.MultiTerm[tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]]
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms):
        return 2  # of the drift alone

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        drift, noise = terms.terms
        x = y0 + noise.vf_prod(t0, y0, args, noise.contr(t0, t1))
        h = drift.contr(t0, t1)
        first = drift.vf_prod(t0, x, args, h)
        second = drift.vf_prod(t1, x + first, args, h)
        y1 = x + (first + second) / 2
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


SOLVERS = {
    "euler-maruyama": diffrax.Euler,
    "reference-heun": ReferenceHeun,
    "sra1": diffrax.SRA1,
    "shark": diffrax.ShARK,
}
_EVALUATIONS = {
    "euler-maruyama": 1,
    "reference-heun": 2,
    "sra1": 2,
    "shark": 2,
}  # of the network, a step
LAST_STEPS = ("none", "mean", "tweedie", "euler")
_END = 1e-3  # how far from t=1, where the score is infinite, a solver stops that evaluates its last time


def stop_before_the_end(solver: str, interval: Interval) -> Interval:
    """The interval, short of t=1 for a solver that would evaluate the score there."""
    t0, t1 = interval
    return (t0, jnp.minimum(t1, 1 - _END)) if solver == "reference-heun" else interval


def solve(
    fields: Fields,
    path: Path,
    x_bhwc: jax.Array,
    interval: Interval,
    draw: Draw,
    *,
    solver: str,
    steps: int | Sequence[float],
    shift: float = 1.0,
    form: str,
    norm: float,
    last_step: str,
    last_step_size: float,
    frames: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x carried from interval[0] to interval[1] on `ode.time_grid`, then the last step; and how often `fields` ran.

    The last step is noiseless, of `last_step_size` from interval[1]: "mean" follows the SDE's drift, "euler" the ODE's,
    "tweedie" jumps to E[x1 | x] (Efron 2011), "none" stays. With `frames`, x is [b, frames, ...]: at that many equal
    times of the interval, the last one after the last step. `UserError` for unknown names.
    """
    if solver not in SOLVERS:
        raise unknown_name("SDE solver", solver, SOLVERS)
    if last_step not in LAST_STEPS:
        raise unknown_name("last step", last_step, LAST_STEPS)
    times = time_grid(stop_before_the_end(solver, interval), steps, shift)

    def coefficient(t):
        return diffusion(path, form, t, norm)

    def drift(t, x, _=None):
        velocity, score = fields(x, jnp.full(x.shape[:1], t))
        return velocity + coefficient(t) * score

    def noise(t, x, _):
        return lx.DiagonalLinearOperator(jnp.full_like(x, jnp.sqrt(2 * coefficient(t))))

    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(drift),
            diffrax.ControlTerm(noise, GridBrownianPath(times=times, draw=draw)),
        ),
        SOLVERS[solver](),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=x_bhwc,
        stepsize_controller=diffrax.StepTo(times),
        saveat=save_at(times[0], times[-1], frames),
        max_steps=len(times) - 1,
        throw=False,
    )
    evaluations = (len(times) - 1) * _EVALUATIONS[solver] + (last_step != "none")
    x_bhwc = _take_last_step(
        last_step, last_step_size, fields, drift, path, solution.ys[-1], times[-1]
    )
    if frames:
        x_bhwc = jnp.moveaxis(jnp.concatenate([solution.ys[:-1], x_bhwc[None]]), 0, 1)
    return x_bhwc, jnp.asarray(evaluations)


def _take_last_step(kind, size, fields, drift, path, x, t):
    if kind == "none":
        return x
    if kind == "mean":
        return x + size * drift(t, x)
    velocity, score = fields(x, jnp.full(x.shape[:1], t))
    if kind == "euler":
        return x + size * velocity
    return (x + path.sigma(t) ** 2 * score) / path.alpha(t)
