"""The SDE samplers against the PyTorch reference, and by the law that every diffusion form keeps the same marginals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.sampling import sde
from sit_jax.sampling.brownian import keyed_draw
from sit_jax.transport import diffusion, interval, paths, prediction
from tests import goldens
from tests.goldens import nhwc

OURS = {"Euler": "euler-maruyama", "Heun": "reference-heun"}


def comparable(case):
    """What the reference can do itself; its Heun up to t=1 is nan there, and here it stops before.

    Of the last steps, which follow any form alike, Linear velocity is compared for one form each.
    """
    repeated = (case["path_type"], case["prediction"]) == ("Linear", "velocity") and case[
        "diffusion_form"
    ] != "sigma"
    if repeated and case["last_step"] != "Mean":
        return False
    return case["finite"] and not (case["method"] == "Heun" and case["interval"][1] == 1)


def solve_golden(case):
    arrays = goldens.load("sde")[1]
    z, y, w = (arrays[name] for name in case["inputs"])
    path, predict, n = goldens.sampling(case, y)
    noise = jnp.asarray(np.moveaxis(w, -3, -1))[:, :n]
    last_step = (case["last_step"] or "none").lower()

    def solve(x):
        return sde.solve(
            prediction.velocity_and_score(predict, path, case["prediction"]),
            path,
            x,
            case["interval"],
            lambda step, which: noise[step],
            solver=OURS[case["method"]],
            steps=case["num_steps"] - 1,
            form=case["diffusion_form"],
            norm=case["diffusion_norm"],
            last_step=last_step,
            last_step_size=case["last_step_size"],
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
    assert goldens.relative_error(ours, theirs) < (
        1e-4 if case["diffusion_form"] == "SBDM" else 3e-5
    )


WEIGHTS, MEANS, STDS = jnp.array([0.3, 0.7]), jnp.array([-1.0, 0.8]), jnp.array([0.3, 0.2])


def mixture_score(path):
    """The exact score of a two-component Gaussian mixture in one dimension, at every time."""

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
    """Mean, variance and share above 0 of the mixture's marginal at time t."""
    means, variances = path.alpha(t) * MEANS, path.alpha(t) ** 2 * STDS**2 + path.sigma(t) ** 2
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
    options = {
        "solver": "euler-maruyama",
        "steps": 100,
        "form": form,
        "norm": 1.0,
        "last_step": "none",
        "last_step_size": 0,
    }
    x = jax.jit(
        lambda x: sde.solve(fields, path, x, span, keyed_draw(keys_b, (1, 1, 1)), **options)[0]
    )(x).ravel()
    mean, variance, above = moments(path, jnp.float32(span[1]))
    # Four standard errors of n samples (the fourth moment of this mixture is below that of a Gaussian of its variance),
    # and 0.02 for a hundred Euler steps.
    assert abs(x.mean() - mean) < 4 * jnp.sqrt(variance / n) + 0.02
    assert abs(x.var() - variance) < 4 * variance * np.sqrt(2 / n) + 0.02
    assert abs((x > 0).mean() - above) < 4 * np.sqrt(0.21 / n) + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
@pytest.mark.parametrize("path", paths.PATHS.values(), ids=lambda p: p.name)
def test_no_combination_is_nan(path, kind, monkeypatch):
    """The whole table of form x prediction x path x last step x solver, at the default eps and sizes."""
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, 1))
    draw = keyed_draw(jax.random.split(jax.random.key(1), 2), x.shape[1:])
    fields = prediction.velocity_and_score(
        lambda x, t: jnp.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1)), path, kind
    )
    forms = list(diffusion.FORMS.values())

    def finals(solver, index, span, last_steps):
        """The end of every last step for the form of that index: one compilation for all forms."""
        monkeypatch.setitem(
            diffusion.FORMS,
            "any",
            lambda path, t, norm: jax.lax.switch(
                index, [lambda t, f=f: f(path, t, norm) for f in forms], t
            ),
        )
        options = {"solver": solver, "steps": 3, "form": "any", "norm": 1.0, "last_step_size": 0.04}
        return [
            sde.solve(fields, path, x, span, draw, last_step=last, **options)[0]
            for last in last_steps
        ]

    for solver in sde.SOLVERS:
        # A last step follows the solver's end, whichever solver it was: two of them are enough.
        several = (
            ("mean", "tweedie", "euler")
            if solver in ("euler-maruyama", "reference-heun")
            else ("mean",)
        )
        for last_steps, size in ((("none",), 0.0), (several, 0.04)):
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
def test_a_sample_depends_on_its_own_key_alone(solver):
    path, x = paths.PATHS["Linear"], jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    keys_b = jax.random.split(jax.random.key(1), 3)
    fields = prediction.velocity_and_score(lambda x, t: -x, path, "velocity")

    def run(rows):
        options = {"form": "sigma", "norm": 1.0, "last_step": "mean", "last_step_size": 0.04}
        draw = keyed_draw(keys_b[rows], x.shape[1:])
        return sde.solve(
            fields, path, x[rows], (0.0, 0.96), draw, solver=solver, steps=5, **options
        )[0]

    together = run(jnp.arange(3))
    np.testing.assert_allclose(run(jnp.array([2]))[0], together[2], rtol=1e-6)
    assert not np.allclose(together[0] - x[0], together[1] - x[1])


def strong_error(solver, steps, n=512):
    """RMS distance at t=0.9 from the same Brownian motion's path on a grid of 256 steps, for a nonlinear drift."""
    path, fine = paths.PATHS["Linear"], 256
    span, x = (0.0, 0.9), jax.random.normal(jax.random.key(0), (n, 1, 1, 1))
    unit = jax.random.normal(jax.random.key(2), (fine, n, 1, 1, 1))
    fields = prediction.velocity_and_score(lambda x, t: jnp.sin(3 * x), path, "velocity")

    def draw_on(steps):
        """Increments of that motion over coarser steps, with their space-time Levy areas, in units of their spreads."""
        w = unit.reshape(steps, fine // steps, *unit.shape[1:]) / np.sqrt(fine // steps)
        total = w.sum(axis=1)
        bridge = (
            jnp.cumsum(w, axis=1)
            - w / 2
            - total[:, None]
            * ((np.arange(fine // steps) + 0.5) / (fine // steps)).reshape(1, -1, 1, 1, 1, 1)
        )
        area = bridge.mean(axis=1) * np.sqrt(12)
        return lambda step, which: jnp.where(which == 0, total[step], area[step])

    options = {"form": "sigma", "norm": 1.0, "last_step": "none", "last_step_size": 0.0}
    run = lambda solver, steps: sde.solve(
        fields, path, x, span, draw_on(steps), solver=solver, steps=steps, **options
    )[0]
    return float(jnp.sqrt(jnp.mean((run(solver, steps) - run("sra1", fine)) ** 2)))


@pytest.mark.parametrize("solver, order", [("euler-maruyama", 1.0), ("sra1", 1.5), ("shark", 1.5)])
def test_strong_order(solver, order):
    """For additive noise: Euler-Maruyama 1, the stochastic Runge-Kutta methods 1.5."""
    found = np.log2(strong_error(solver, 8) / strong_error(solver, 32)) / 2
    assert found == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("last_step", ["none", "mean"])
def test_frames_are_the_way_and_end_after_the_last_step(last_step):
    path, x = paths.PATHS["Linear"], jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    draw = keyed_draw(jax.random.split(jax.random.key(1), 3), x.shape[1:])
    fields = prediction.velocity_and_score(lambda x, t: jnp.tanh(x), path, "velocity")

    def solve(until, steps, frames=None, last_step=last_step):
        options = {
            "form": "sigma",
            "norm": 1.0,
            "last_step": last_step,
            "last_step_size": 0.04,
            "frames": frames,
        }
        return sde.solve(
            fields, path, x, (0.0, until), draw, solver="euler-maruyama", steps=steps, **options
        )

    end, cost = solve(0.96, 8)
    way, same = solve(0.96, 8, frames=5)
    assert way.shape == (3, 5, 2, 2, 1) and int(cost) == int(same)
    np.testing.assert_array_equal(way[:, 0], x)
    np.testing.assert_allclose(way[:, -1], end, rtol=1e-6)
    # Five frames of eight equal steps lie on every second time; the first four steps end where the third frame is.
    np.testing.assert_allclose(way[:, 2], solve(0.48, 4, last_step="none")[0], rtol=1e-5)
    np.testing.assert_allclose(solve(0.96, tuple(np.linspace(0, 1, 9)))[0], end, rtol=1e-5)
