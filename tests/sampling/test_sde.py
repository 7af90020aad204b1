"""The SDE samplers against the PyTorch reference, and by laws: marginals, strong orders, costs.

Every diffusion form keeps the same marginals.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.sampling import sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.transport import diffusion, interval, paths, prediction
from tests import goldens
from tests.goldens import nhwc

OURS = {"Euler": "euler-maruyama", "Heun": "reference-heun"}


def comparable(case):
    """Return True if the reference supports the case and it repeats no other.

    The reference's Heun gives NaN where it goes up to t=1; ours stops before. Last steps do not
    depend on the form, so that Linear velocity is compared with every last step for one form only.
    """
    linear_velocity = (case["path_type"], case["prediction"]) == ("Linear", "velocity")
    if linear_velocity and case["diffusion_form"] != "sigma" and case["last_step"] != "Mean":
        return False
    return case["finite"] and not (case["method"] == "Heun" and case["interval"][1] == 1)


def solve_golden(case):
    arrays = goldens.load("sde")[1]
    z, y, w = (arrays[name] for name in case["inputs"])
    path, predict, n = goldens.sampling(case, y)
    noise = jnp.asarray(np.moveaxis(w, -3, -1))[:, :n]
    options = sde.SdeOptions(
        OURS[case["method"]],
        case["num_steps"] - 1,
        form=case["diffusion_form"],
        norm=case["diffusion_norm"],
        last_step=(case["last_step"] or "none").lower(),
        last_step_size=case["last_step_size"],
    )

    def solve(x):
        return sde.solve(
            prediction.velocity_and_score(predict, path, case["prediction"]),
            path,
            x,
            case["interval"],
            lambda step, which: noise[step],
            options,
        )

    return jax.jit(solve)(jnp.asarray(nhwc(z[:n])))[0], nhwc(arrays[case["final"]])[:n]


SDE = [case for case in goldens.cases("sde", "sde") if comparable(case)]
FIELDS = (
    ("path_type", "prediction"),
    ("method", "diffusion_form"),
    ("method", "last_step"),
    ("method", "cfg_scale"),
)


@pytest.mark.parametrize("case", goldens.parameters(SDE, *FIELDS))
def test_equals_reference(case):
    ours, theirs = solve_golden(case)
    # tests/golden/README.md: 3e-5, and 1e-4 where a drift has 1/t, as SBDM's D has.
    tolerance = 1e-4 if case["diffusion_form"] == "SBDM" else 3e-5
    assert goldens.relative_error(ours, theirs) < tolerance


WEIGHTS = jnp.array([0.3, 0.7])
MEANS = jnp.array([-1.0, 0.8])
STDS = jnp.array([0.3, 0.2])


def mixture_score(path):
    """Return the exact score of a two-component Gaussian mixture in one dimension."""

    def log_density(x, t):
        alpha, sigma = path.alpha(t), path.sigma(t)
        variances = alpha**2 * STDS**2 + sigma**2
        return jax.nn.logsumexp(
            jnp.log(WEIGHTS) - (x - alpha * MEANS) ** 2 / (2 * variances) - jnp.log(variances) / 2
        )

    def score(x, t_b):
        return jax.vmap(jax.grad(log_density))(x.ravel(), t_b).reshape(x.shape)

    return score


def moments(path, t):
    """Return mean, variance and share above 0 of the mixture's marginal at time t."""
    means = path.alpha(t) * MEANS
    variances = path.alpha(t) ** 2 * STDS**2 + path.sigma(t) ** 2
    mean = (WEIGHTS * means).sum()
    above = (WEIGHTS * jax.scipy.stats.norm.cdf(means / jnp.sqrt(variances))).sum()
    return mean, (WEIGHTS * (variances + means**2)).sum() - mean**2, above


# Every form and every path; all pairs of them are slow.
FORMS_AND_PATHS = [
    pytest.param(form, path, marks=[] if i % len(paths.PATHS) == j else [pytest.mark.slow])
    for (i, form), (j, path) in itertools.product(
        enumerate(diffusion.FORMS), enumerate(paths.PATHS)
    )
]


@pytest.mark.parametrize(("form", "path"), FORMS_AND_PATHS)
def test_every_diffusion_form_keeps_the_marginals(form, path, n=4_000):
    path = paths.PATHS[path]
    keys_b = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(n))
    x = jax.random.normal(jax.random.key(1), (n, 1, 1, 1))
    span = interval.sde_interval(path, "score", form, 0.04)
    fields = prediction.velocity_and_score(mixture_score(path), path, "score")
    options = sde.SdeOptions("euler-maruyama", 100, form=form, last_step="none")
    x = jax.jit(
        lambda x: sde.solve(fields, path, x, span, keyed_draw(keys_b, (1, 1, 1)), options)[0]
    )(x).ravel()
    mean, variance, above = moments(path, jnp.float32(span[1]))
    # Four standard errors of n samples (the fourth moment of this mixture is below that of a
    # Gaussian of its variance), and 0.02 for a hundred Euler steps.
    assert abs(x.mean() - mean) < 4 * jnp.sqrt(variance / n) + 0.02
    assert abs(x.var() - variance) < 4 * variance * np.sqrt(2 / n) + 0.02
    assert abs((x > 0).mean() - above) < 4 * np.sqrt(0.21 / n) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
@pytest.mark.parametrize("path", paths.PATHS.values(), ids=lambda p: p.name)
def test_no_combination_is_nan(path, kind, monkeypatch):
    """Every form x prediction x path x last step x solver, at the default eps and sizes."""
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 1))
    draw = keyed_draw(jax.random.split(jax.random.key(1), 2), x.shape[1:])
    fields = prediction.velocity_and_score(
        lambda x, t: jnp.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1)), path, kind
    )
    forms = list(diffusion.FORMS.values())

    def finals(solver, index, span, last_steps):
        """Return the end of every last step for the form of that index, compiled once for all."""

        def any_form(path, t, norm):
            return jax.lax.switch(index, [lambda t, f=f: f(path, t, norm) for f in forms], t)

        monkeypatch.setitem(diffusion.FORMS, "any", any_form)
        every_last = [sde.SdeOptions(solver, 3, form="any", last_step=last) for last in last_steps]
        return [sde.solve(fields, path, x, span, draw, options)[0] for options in every_last]

    for solver in sde.SOLVERS:
        # A last step follows the end of any solver alike: every last step after two of them is
        # enough.
        every_last = solver in ("euler-maruyama", "reference-heun")
        noiseless = ("mean", "tweedie", "euler") if every_last else ("mean",)
        for last_steps, size in ((("none",), 0.0), (noiseless, 0.04)):
            run = jax.jit(
                lambda index, span, solver=solver, last=last_steps: finals(
                    solver, index, span, last
                )
            )
            for index, form in enumerate(list(diffusion.FORMS)[: len(forms)]):
                span = interval.sde_interval(path, kind, form, size)
                for last, out in zip(last_steps, run(index, jnp.array(span)), strict=True):
                    assert np.isfinite(out).all(), (solver, form, last)


@pytest.mark.parametrize("solver", sde.SOLVERS)
def test_a_sample_depends_only_on_its_own_key(solver):
    path, x = paths.PATHS["Linear"], jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    keys_b = jax.random.split(jax.random.key(1), 3)
    fields = prediction.velocity_and_score(lambda x, t: -x, path, "velocity")

    def run(rows):
        draw = keyed_draw(keys_b[rows], x.shape[1:])
        options = sde.SdeOptions(solver, 5, form="sigma")
        return sde.solve(fields, path, x[rows], (0.0, 0.96), draw, options)[0]

    together = run(jnp.arange(3))
    np.testing.assert_allclose(run(jnp.array([2]))[0], together[2], rtol=1e-6)
    assert not np.allclose(together[0] - x[0], together[1] - x[1])


@pytest.mark.parametrize("solver", sde.SOLVERS)
def test_evaluations_are_counted_and_the_end_of_time_is_avoided(solver):
    path = paths.PATHS["Linear"]
    draw = keyed_draw(jax.random.split(jax.random.key(1), 2), (1, 1, 1))
    times = []

    def fields(x, t_b):
        jax.debug.callback(lambda t_b: times.append(float(t_b[0])), t_b)
        return x, -x

    for last_step, end in (("none", 1.0), ("mean", 0.96)):
        times.clear()
        options = sde.SdeOptions(solver, 3, form="sigma", last_step=last_step)
        _, evaluations = sde.solve(fields, path, jnp.ones((2, 1, 1, 1)), (0.0, end), draw, options)
        jax.effects_barrier()
        assert int(evaluations) == len(times)
        if last_step == "mean":  # it starts where the others end
            assert max(times) == pytest.approx(end)
        elif sde.SOLVERS[solver].evaluates_end:  # it stops just short of t=1
            assert max(times) == pytest.approx(1 - 1e-3)
        else:
            assert max(times) < 0.95


def strong_error(solver, steps, n=512):
    """Return the RMS distance at t=0.9 from the path of the same Brownian motion.

    The drift is nonlinear. The truth is another solver of order 1.5 on a grid of 256 steps.
    """
    path = paths.PATHS["Linear"]
    span = (0.0, 0.9)
    fine = 256
    x = jax.random.normal(jax.random.key(0), (n, 1, 1, 1))
    unit = jax.random.normal(jax.random.key(2), (fine, n, 1, 1, 1))
    fields = prediction.velocity_and_score(lambda x, t: jnp.sin(3 * x), path, "velocity")

    def draw_on(steps):
        """Return increments over coarser steps and their space-time Levy areas."""
        parts = fine // steps
        w = unit.reshape(steps, parts, *unit.shape[1:]) / np.sqrt(parts)
        total = w.sum(axis=1)
        # The motion in the middle of each part, minus the straight line to the end of the step.
        line = total[:, None] * ((np.arange(parts) + 0.5) / parts).reshape(1, -1, 1, 1, 1, 1)
        bridge = jnp.cumsum(w, axis=1) - w / 2 - line
        area = bridge.mean(axis=1) * np.sqrt(12)
        return lambda step, which: jnp.where(which == 0, total[step], area[step])

    def run(solver, steps):
        options = sde.SdeOptions(solver, steps, form="sigma", last_step="none")
        return sde.solve(fields, path, x, span, draw_on(steps), options)[0]

    truth = run("shark" if solver == "sra1" else "sra1", fine)
    return float(jnp.sqrt(jnp.mean((run(solver, steps) - truth) ** 2)))


@pytest.mark.parametrize("solver, order", [("euler-maruyama", 1.0), ("sra1", 1.5), ("shark", 1.5)])
def test_strong_order(solver, order):
    """For additive noise: Euler-Maruyama 1, the stochastic Runge-Kutta methods 1.5."""
    measured = np.log2(strong_error(solver, 8) / strong_error(solver, 32)) / 2
    assert measured == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("last_step", ["none", "mean"])
def test_frames_are_the_states_on_the_way_and_end_after_the_last_step(last_step):
    path, x = paths.PATHS["Linear"], jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    draw = keyed_draw(jax.random.split(jax.random.key(1), 3), x.shape[1:])
    fields = prediction.velocity_and_score(lambda x, t: jnp.tanh(x), path, "velocity")

    def solve(until, steps, frames=None, last_step=last_step):
        options = sde.SdeOptions("euler-maruyama", steps, form="sigma", last_step=last_step)
        return sde.solve(fields, path, x, (0.0, until), draw, options, frames)

    end, cost = solve(0.96, 8)
    frames, frames_cost = solve(0.96, 8, frames=5)
    assert frames.shape == (3, 5, 2, 2, 1) and int(cost) == int(frames_cost)
    np.testing.assert_array_equal(frames[:, 0], x)
    np.testing.assert_allclose(frames[:, -1], end, rtol=1e-6)
    # Five frames of eight equal steps lie on every second time: the third is where the first four
    # steps end.
    np.testing.assert_allclose(frames[:, 2], solve(0.48, 4, last_step="none")[0], rtol=1e-5)
    np.testing.assert_allclose(solve(0.96, tuple(np.linspace(0, 1, 9)))[0], end, rtol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        (sde.SdeOptions("sra2", 3), "unknown SDE solver 'sra2'; did you mean 'sra1'"),
        (
            sde.SdeOptions("sra1", 3, last_step="men"),
            "unknown last step 'men'; did you mean 'mean'",
        ),
        (sde.SdeOptions("sra1", 3, form="sigmas"), "unknown diffusion form 'sigmas'"),
    ],
)
def test_unknown_names_are_named(options, words):
    fields = prediction.velocity_and_score(lambda x, t: x, paths.PATHS["Linear"], "velocity")
    draw = keyed_draw(jax.random.split(jax.random.key(1), 1), (1, 1, 1))
    x = jnp.ones((1, 1, 1, 1))
    with pytest.raises(UserError, match=words):
        sde.solve(fields, paths.PATHS["Linear"], x, (0.001, 0.9), draw, options)
