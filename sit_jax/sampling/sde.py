"""The reverse SDE dx = (v + D s) dt + sqrt(2 D) dW (paper eq. 5 with w = 2 D), solved by diffrax.

Every D gives the same marginals, so it is chosen when sampling. D depends only on t: the noise is
additive, which the solvers of strong order 1.5 need. Steps are fixed, on the grid of `ode`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx

from sit_jax.errors import unknown_name
from sit_jax.sampling.brownian import Draw, GridBrownianPath
from sit_jax.sampling.ode import Drift, StepTo, save_at, time_grid
from sit_jax.transport.diffusion import diffusion
from sit_jax.transport.interval import Interval
from sit_jax.transport.paths import Path
from sit_jax.transport.prediction import VelocityAndScore


class ReferenceHeun(diffrax.AbstractItoSolver):
    """The PyTorch reference's Heun: add the step's noise, then take a Heun step of the drift.

    It converges to the Ito solution, and has order 2 only where the noise vanishes. Do not confuse
    it with the stochastic Heun method (`diffrax.Heun`), which averages drift and noise over both
    ends of the step and converges to the Stratonovich solution.
    """

    term_structure = diffrax.MultiTerm[tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]]
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        return 2  # of the drift

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> None:
        return None

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: None, made_jump: Any
    ) -> tuple[Any, None, dict[str, Any], None, Any]:
        drift, noise = terms.terms
        # All of the step's noise, with the coefficient at its start.
        x = y0 + noise.vf_prod(t0, y0, args, noise.contr(t0, t1))
        # Predictor: an Euler step of the drift.
        h = drift.contr(t0, t1)
        first = drift.vf_prod(t0, x, args, h)
        # Corrector: the mean of the drifts at both ends.
        second = drift.vf_prod(t1, x + first, args, h)
        y1 = x + (first + second) / 2
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return terms.vf(t0, y0, args)


@dataclasses.dataclass(frozen=True)
class SdeSolver:
    """A diffrax solver, its cost, and whether it evaluates the end of a step."""

    method: type[diffrax.AbstractSolver]
    evaluations: int  # calls of the network in a step
    evaluates_end: bool = False  # calls it at a step's end too; at t=1 the score is infinite


# Strong orders for additive noise: euler-maruyama 1; sra1 (Roessler 2010) and shark (Foster et al.,
# arXiv 2210.17543, eq. 6.1) 1.5. The last two use the noise's space-time Levy area.
SOLVERS = {
    "euler-maruyama": SdeSolver(diffrax.Euler, evaluations=1),
    "reference-heun": SdeSolver(ReferenceHeun, evaluations=2, evaluates_end=True),
    "sra1": SdeSolver(diffrax.SRA1, evaluations=2),
    "shark": SdeSolver(diffrax.ShARK, evaluations=2),
}
LAST_STEPS = ("none", "mean", "tweedie", "euler")
_END = 1e-3  # distance from t=1 at which a solver that evaluates_end stops


@dataclasses.dataclass(frozen=True)
class SdeOptions:
    """A solver with its steps, a diffusion coefficient and a last step."""

    solver: str  # a name in SOLVERS
    steps: int | Sequence[float]  # as in `ode.time_grid`
    shift: float = 1.0  # as in `ode.time_grid`
    form: str = "SBDM"  # of the diffusion coefficient: a name in diffusion.FORMS
    norm: float = 1.0  # of the form
    last_step: str = "mean"  # a name in LAST_STEPS
    last_step_size: float = 0.04


def solve(
    fields: VelocityAndScore,
    path: Path,
    x_bhwc: jax.Array,
    interval: Interval,
    draw: Draw,
    options: SdeOptions,
    frames: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Carry x from interval[0] to interval[1] on `ode.time_grid`, then take the last step.

    Return x and the number of calls of `fields`.

    - The last step adds no noise and goes `last_step_size` beyond interval[1]: "mean" follows the
      SDE's drift, "euler" the ODE's, "tweedie" jumps to E[x1 | x] (Efron 2011), and "none" stays.
    - With `frames`, x is [b, frames, ...]: the states at that many equal times of the interval,
      the last one after the last step.

    Raises UserError for an unknown solver, last step or diffusion form.
    """
    if options.solver not in SOLVERS:
        raise unknown_name("SDE solver", options.solver, SOLVERS)
    if options.last_step not in LAST_STEPS:
        raise unknown_name("last step", options.last_step, LAST_STEPS)
    solver = SOLVERS[options.solver]
    times = _times(solver, interval, options)

    def coefficient(t: jax.Array) -> jax.Array:
        return diffusion(path, options.form, t, options.norm)

    def drift(t: jax.Array, x: jax.Array, _: Any = None) -> jax.Array:
        velocity, score = fields(x, jnp.full(x.shape[:1], t))
        return velocity + coefficient(t) * score

    def noise(t: jax.Array, x: jax.Array, _: Any) -> lx.AbstractLinearOperator:
        return lx.DiagonalLinearOperator(jnp.full_like(x, jnp.sqrt(2 * coefficient(t))))

    solution = diffrax.diffeqsolve(
        _terms(drift, noise, GridBrownianPath(times=times, draw=draw)),
        solver.method(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=x_bhwc,
        stepsize_controller=StepTo(times),
        saveat=save_at(times[0], times[-1], frames),
        max_steps=len(times) - 1,
        throw=False,  # as in `ode`: no host callback
    )
    evaluations = (len(times) - 1) * solver.evaluations + (options.last_step != "none")
    end_bhwc = _take_last_step(options, fields, drift, path, solution.ys[-1], times[-1])
    if not frames:
        return end_bhwc, jnp.asarray(evaluations)
    frames_fbhwc = jnp.concatenate([solution.ys[:-1], end_bhwc[None]])
    return jnp.moveaxis(frames_fbhwc, 0, 1), jnp.asarray(evaluations)


def _terms(
    drift: Drift,
    noise: Callable[..., lx.AbstractLinearOperator],
    brownian_path: GridBrownianPath,
) -> diffrax.MultiTerm:
    return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(noise, brownian_path))


def _times(solver: SdeSolver, interval: Interval, options: SdeOptions) -> jax.Array:
    """Return the grid; it stops short of t=1 for a solver that would evaluate the score there."""
    t0, t1 = interval
    end = jnp.minimum(t1, 1 - _END) if solver.evaluates_end else t1
    return time_grid((t0, end), options.steps, options.shift)


def _take_last_step(
    options: SdeOptions,
    fields: VelocityAndScore,
    drift: Drift,
    path: Path,
    x: jax.Array,
    t: jax.Array,
) -> jax.Array:
    if options.last_step == "none":
        return x
    if options.last_step == "mean":
        return x + options.last_step_size * drift(t, x)
    velocity, score = fields(x, jnp.full(x.shape[:1], t))
    if options.last_step == "euler":
        return x + options.last_step_size * velocity
    # Tweedie's formula: E[x1 | x].
    return (x + path.sigma(t) ** 2 * score) / path.alpha(t)
