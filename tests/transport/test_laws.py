"""Laws of every path and prediction: derivatives, round trips, and the Gaussian closed form.

For data N(m, s^2) the marginal at t is N(alpha m, alpha^2 s^2 + sigma^2), so score, noise and
velocity are known exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.transport import diffusion, losses, paths, prediction, times
from sit_jax.transport.paths import expand_time

MEAN, STD = 0.7, 0.4
each_path = pytest.mark.parametrize("path", paths.PATHS.values(), ids=lambda p: p.name)
each_prediction = pytest.mark.parametrize("kind", prediction.PREDICTIONS)


def exact(path, kind):
    """Return the optimal prediction for Gaussian data, from the score of its marginal."""

    def predict(x, t_b):
        t = expand_time(t_b, x)
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = alpha**2 * STD**2 + sigma**2
        score = -(x - alpha * MEAN) / variance
        noise = -sigma * score
        # E[x1 | x], without dividing by alpha.
        data = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
        velocity = path.d_alpha(t) * data + path.d_sigma(t) * noise
        return {"score": score, "noise": noise, "velocity": velocity}[kind]

    return predict


@each_path
def test_derivatives(path):
    t = jnp.linspace(0.02, 0.98, 25)
    for f, df in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        np.testing.assert_allclose(df(t), jax.vmap(jax.grad(f))(t), rtol=2e-5, atol=1e-6)


@each_path
def test_noise_at_0_and_data_at_1(path):
    zero, one = jnp.zeros(()), jnp.ones(())
    assert path.alpha(zero) < 0.01 and path.sigma(zero) > 0.9999
    assert abs(path.alpha(one) - 1) < 1e-6 and path.sigma(one) < 1e-6
    assert path.noise_remains_at_0 == bool(path.alpha(zero) > 0)


@each_path
def test_the_velocity_is_bounded_where_the_path_says_so(path):
    ends = jnp.array([0.0, 1.0])
    bounded = jnp.isfinite(path.d_alpha(ends)).all() and jnp.isfinite(path.d_sigma(ends)).all()
    assert path.velocity_is_bounded == bool(bounded)


@each_path
@each_prediction
def test_every_prediction_tells_the_same_velocity_score_and_noise(path, kind):
    t = jnp.linspace(0.05, 0.95, 16)
    x = jax.random.normal(jax.random.key(0), (16, 5))
    output = exact(path, kind)(x, t)
    for convert, name in (
        (prediction.to_velocity, "velocity"),
        (prediction.to_score, "score"),
        (prediction.to_noise, "noise"),
    ):
        want = exact(path, name)(x, t)
        # Near the ends the conversions divide by alpha or sigma, which magnifies rounding by up to
        # 1/0.05^2.
        np.testing.assert_allclose(convert(path, kind, output, x, t), want, rtol=1e-3, atol=1e-4)


@each_path
def test_velocity_to_score_to_velocity(path):
    t = jnp.linspace(0.05, 0.95, 16)
    x, v = jax.random.normal(jax.random.key(1), (2, 16, 5))
    score = prediction.to_score(path, "velocity", v, x, t)
    velocity = prediction.to_velocity(path, "score", score, x, t)
    np.testing.assert_allclose(velocity, v, rtol=1e-3, atol=1e-3)


def test_velocity_gives_a_finite_score_at_t0_and_noise_at_both_ends():
    x, v = jnp.full((2, 3), 0.5), jnp.full((2, 3), 0.25)
    for path in (paths.PATHS["Linear"], paths.PATHS["GVP"]):
        score = prediction.to_score(path, "velocity", v, x, jnp.zeros(2))
        np.testing.assert_allclose(score, -x, rtol=1e-6)
        noise = prediction.to_noise(path, "velocity", v, x, jnp.array([0.0, 1.0]))
        assert jnp.isfinite(noise).all()


@each_path
@each_prediction
@pytest.mark.parametrize("weight", losses.WEIGHTS)
def test_exact_field_reaches_the_analytic_minimum_loss(path, kind, weight):
    """E|target - E[target | x]|^2 in closed form; and anything else loses more."""
    if kind == "velocity" and weight != "none":
        with pytest.raises(UserError, match="does nothing to a velocity prediction"):
            losses.check_weight(weight, kind)
        return
    n = 200_000
    keys = jax.random.split(jax.random.key(3), 2)
    x1, x0 = MEAN + STD * jax.random.normal(keys[0], (n, 1)), jax.random.normal(keys[1], (n, 1))
    for t in (0.1, 0.5, 0.9):
        t_b, t = jnp.full(n, t), jnp.float32(t)
        alpha, sigma, d_alpha, d_sigma = (
            f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
        )
        variance = alpha**2 * STD**2 + sigma**2
        # The variance of x0 given x; sigma s + x0 and eps - x0 are the same error.
        minimum = alpha**2 * STD**2 / variance
        if kind == "velocity":
            # u = d_alpha x1 + d_sigma x0 with x1 = (x - sigma x0)/alpha is a multiple of x0 plus a
            # function of x.
            minimum *= (d_sigma - d_alpha * sigma / alpha) ** 2
        minimum *= losses.WEIGHTS[weight](path, t)
        least = losses.losses(exact(path, kind), path, kind, weight, x1, x0, t_b)
        # The mean of n squared Gaussian errors has a relative standard error of sqrt(2/n); the
        # tolerance is four of those.
        assert abs(least.mean() / minimum - 1) < 4 * np.sqrt(2 / n)

        def off(x, t_b):
            """Return a prediction that is wrong by 0.1; a score's error counts times sigma."""
            error = 0.1 / path.sigma(expand_time(t_b, x)) if kind == "score" else 0.1
            return exact(path, kind)(x, t_b) + error

        excess = losses.losses(off, path, kind, weight, x1, x0, t_b).mean() - least.mean()
        assert excess == pytest.approx(0.01 * float(losses.WEIGHTS[weight](path, t)), rel=0.1)


def test_logit_normal_times():
    t = times.training_times(
        jax.random.key(0), 100_000, (0.1, 0.9), "logit-normal", mean=0.5, std=0.8
    )
    assert t.dtype == jnp.float32 and t.min() > 0.1 and t.max() < 0.9
    logit = jnp.log((t - 0.1) / (0.9 - t))
    # Four standard errors of 100,000 draws.
    assert abs(logit.mean() - 0.5) < 4 * 0.8 / np.sqrt(1e5)
    assert abs(logit.std() - 0.8) < 4 * 0.8 / np.sqrt(2e5)
    uniform = times.training_times(jax.random.key(0), 100_000, (0.1, 0.9))
    assert abs(uniform.mean() - 0.5) < 4 * 0.8 / np.sqrt(12e5)
    assert uniform.min() >= 0.1 and uniform.max() <= 0.9


def test_sbdm_is_the_kl_optimal_coefficient():
    """The paper's w^KL / 2 = sigma (d_alpha sigma / alpha - d_sigma); Linear: (1 - t) / t."""
    t = jnp.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        diffusion.diffusion(paths.PATHS["Linear"], "SBDM", t), (1 - t) / t, rtol=1e-5
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: paths.path_by_name("linear"), ["unknown path 'linear'", "'Linear'", "GVP"]),
        (
            lambda: prediction.check_prediction("eps"),
            ["unknown prediction 'eps'", "velocity", "score", "noise"],
        ),
        (lambda: losses.check_weight("kl", "noise"), ["unknown loss weight 'kl'", "likelihood"]),
        (
            lambda: diffusion.diffusion(paths.PATHS["VP"], "inccreasing-decreasing", jnp.ones(1)),
            ["'increasing-decreasing'"],
        ),
        (
            lambda: times.training_times(jax.random.key(0), 1, (0, 1), "lognormal"),
            ["unknown time distribution", "logit-normal"],
        ),
    ],
)
def test_bad_names_and_values(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
