"""log p against the PyTorch reference and closed forms, and the laws of Hutchinson's trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from sit_jax.errors import UserError
from sit_jax.sampling import density, ode
from sit_jax.transport import interval, paths, prediction
from tests import goldens
from tests.goldens import nhwc

SOLVERS = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}  # torchdiffeq's names


def golden(case):
    """Return a case's velocity, x, probe [1, b, h, w, c], and interval in our time."""
    arrays = goldens.load("likelihood")[1]
    path = paths.path_by_name(case["path_type"])
    network = goldens.labelled(tuple(arrays["y"]))
    velocity = prediction.velocity_field(network, path, case["prediction"])
    x, probe = (jnp.asarray(nhwc(arrays[name])) for name in ("x", "eps"))
    # The reference's solver counts s = 1 - t; with VP it starts at t=1, so this is its interval,
    # not ours.
    low_high = tuple(1 - s for s in case["interval"][::-1]) if "interval" in case else None
    return velocity, x, probe[None], low_high


def log_prob(velocity, x, low_high, probes, **options):
    options = ode.OdeOptions(**options)
    return jax.jit(lambda x: density.log_prob(velocity, x, low_high, probes, options))(x)


HUTCHINSON = [c for c in goldens.cases("likelihood", "hutchinson") if c.get("finite")]


@pytest.mark.parametrize(
    "case", [c for c in HUTCHINSON if c["method"] != "dopri5"], ids=lambda c: c["name"]
)
def test_fixed_steps_equal_reference(case):
    velocity, x, probe, low_high = golden(case)
    ours, noise, evaluations = log_prob(
        velocity, x, low_high, probe, solver=SOLVERS[case["method"]], steps=8
    )
    arrays = goldens.load("likelihood")[1]
    # A drift with 1/t magnifies the rounding of t.
    tolerance = 3e-6 if case["prediction"] == "velocity" else 1e-4
    assert goldens.relative_error(ours, arrays[case["logp"]]) < tolerance
    assert goldens.relative_error(noise, nhwc(arrays[case["latent"]])) < tolerance
    # The reference calls its model twice, for the drift and for its derivative.
    assert evaluations * 2 == case["nfe"]


# Only Linear: the other cases have the same field.
ADAPTIVE = [c for c in HUTCHINSON if c["method"] == "dopri5" and c["path_type"] == "Linear"]


@pytest.mark.parametrize("case", ADAPTIVE, ids=lambda c: c["name"])
def test_adaptive_steps_are_at_least_as_near_to_the_truth(case):
    velocity, x, probe, low_high = golden(case)
    ours, _, evaluations = log_prob(
        velocity, x, low_high, probe, solver="dopri5", error_norm="batch"
    )
    truth, *_ = log_prob(velocity, x, low_high, probe, solver="dopri5", atol=1e-7, rtol=1e-6)
    theirs = goldens.load("likelihood")[1][case["logp"]]
    assert goldens.relative_error(ours, truth) < max(goldens.relative_error(theirs, truth), 3e-6)
    assert evaluations <= 1.1 * case["nfe"] / 2


@pytest.mark.parametrize("case", goldens.cases("likelihood", "exact"), ids=lambda c: c["name"])
def test_the_exact_trace_gives_the_float64_answer(case):
    velocity, x, _, low_high = golden(case)
    ours, noise, _ = log_prob(velocity, x, low_high, None, solver="dopri5", rtol=1e-6)
    arrays = goldens.load("likelihood")[1]
    assert goldens.relative_error(ours, arrays[case["logp"]]) < 1e-6
    assert goldens.relative_error(noise, nhwc(arrays[case["latent"]])) < 1e-6


@pytest.mark.parametrize(
    "case", goldens.cases("likelihood", "divergence_at_a_point"), ids=lambda c: c["path_type"]
)
def test_divergence_at_a_point(case):
    velocity, x, probe, _ = golden(case)
    arrays, t_b = goldens.load("likelihood")[1], jnp.full(len(x), case["t"])
    _, exact = density.divergence(velocity, x, t_b, None)
    assert goldens.relative_error(exact, arrays[case["exact"]]) < 1e-6
    v, hutchinson = density.divergence(velocity, x, t_b, probe)
    assert goldens.relative_error(hutchinson, arrays[case["hutchinson"]]) < 1e-6
    np.testing.assert_allclose(v, velocity(x, t_b), atol=1e-6)


def test_vp_noise_is_finite_over_our_interval():
    """The reference starts at t=1, where sigma is 0, and gives NaN."""
    case = next(
        c for c in goldens.cases("likelihood", "hutchinson") if c["name"] == "VP-noise/heun2-n9"
    )
    velocity, x, probe, _ = golden(case)
    ours = interval.ode_interval(paths.path_by_name("VP"), "noise")
    assert np.isfinite(log_prob(velocity, x, ours, probe, solver="heun", steps=8)[0]).all()


# A Gaussian target: x1 = mean + rotation diag(spread) e, whose exact field is linear in x.

SHAPE = (2, 2, 1)
SPREAD = np.array([0.3, 0.7, 1.2, 2.0])
MEAN = np.array([0.5, -0.3, 0.1, 0.8])
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]


def gaussian_field(path):
    """Return v = alpha' E[x1 | x] + sigma' E[x0 | x] of that target."""

    def velocity(x_bhwc, t_b):
        t = t_b[:, None]
        alpha, d_alpha = path.alpha(t), path.d_alpha(t)
        sigma, d_sigma = path.sigma(t), path.d_sigma(t)
        rotated = (x_bhwc.reshape(-1, 4) - alpha * MEAN) @ ROTATION
        gain = (d_alpha * alpha * SPREAD**2 + d_sigma * sigma) / (alpha**2 * SPREAD**2 + sigma**2)
        return (d_alpha * MEAN + (gain * rotated) @ ROTATION.T).reshape(x_bhwc.shape)

    return velocity


def exact_log_prob(path, low_high, x_bhwc):
    """Return log p under the flow of N(0, I) over the interval, float64.

    The flow is linear, so it carries a Gaussian to a Gaussian.
    """

    def moments(t):
        alpha, sigma = float(path.alpha(jnp.float32(t))), float(path.sigma(jnp.float32(t)))
        return alpha * MEAN, np.sqrt(alpha**2 * SPREAD**2 + sigma**2)

    (mean0, scale0), (mean1, scale1) = map(moments, low_high)
    flow = ROTATION @ np.diag(scale1 / scale0) @ ROTATION.T
    x = np.asarray(x_bhwc).reshape(-1, 4)
    with jax.enable_x64(True):
        return np.asarray(multivariate_normal.logpdf(x, mean1 - flow @ mean0, flow @ flow.T))


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_gaussian_has_its_exact_density(name, trace):
    path = paths.path_by_name(name)
    low_high = interval.ode_interval(path, "velocity", 1e-5 if name == "VP" else None)
    rng = np.random.default_rng(1)
    data = MEAN + (rng.normal(size=(8, 4)) * SPREAD) @ ROTATION.T
    x = jnp.asarray(data.reshape(-1, *SHAPE), jnp.float32)
    probes = None
    if trace == "hutchinson":
        # All 16 sign vectors: their mean is the trace exactly, with no randomness.
        signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 4, indexing="ij"), -1).reshape(16, 1, *SHAPE)
        probes = jnp.broadcast_to(jnp.asarray(signs, jnp.float32), (16, *x.shape))
    ours, *_ = log_prob(
        gaussian_field(path), x, low_high, probes, solver="dopri5", atol=1e-6, rtol=1e-6
    )
    np.testing.assert_allclose(ours, exact_log_prob(path, low_high, x), atol=2e-4)
    # The data's own density. VP misses it, because at t=0 its interval leaves some of the mean:
    # alpha = 0.0066.
    of_data = exact_log_prob(paths.path_by_name("Linear"), (0.0, 1.0), x)
    np.testing.assert_allclose(ours, of_data, atol=0.05 if name == "VP" else 2e-4)


@pytest.mark.parametrize("kind", density.PROBES)
def test_hutchinson_is_unbiased(kind):
    field = gaussian_field(paths.path_by_name("Linear"))
    x, t_b = jnp.ones((1, *SHAPE)), jnp.full(1, 0.6)
    probes = density.draw_probes(kind, jax.random.split(jax.random.key(0), 1), 4000, SHAPE)
    one_each = jax.vmap(lambda probe: density.divergence(field, x, t_b, probe[None])[1][0])(probes)
    exact = float(density.divergence(field, x, t_b, None)[1][0])
    error = float(one_each.std()) / 4000**0.5
    assert error > 0.001  # the field is not diagonal, so the estimates have a variance
    assert abs(float(one_each.mean()) - exact) < 4 * error
    np.testing.assert_allclose(
        density.divergence(field, x, t_b, probes)[1][0], one_each.mean(), rtol=1e-4
    )


def test_probes_are_keyed_by_sample_and_number():
    keys = jax.vmap(jax.random.key)(jnp.arange(5))
    probes = density.draw_probes("rademacher", keys, 3, SHAPE)
    assert probes.shape == (3, 5, *SHAPE) and set(np.unique(probes)) == {-1.0, 1.0}
    single = density.draw_probes("rademacher", keys[3:4], 2, SHAPE)
    np.testing.assert_array_equal(single[:, 0], probes[:2, 3])
    gaussian = np.asarray(density.draw_probes("gaussian", keys, 3, SHAPE)).reshape(15, -1)
    assert len({probe.tobytes() for probe in gaussian}) == 15
    with pytest.raises(UserError, match="unknown probe 'rademacker'; did you mean 'rademacher'"):
        density.draw_probes("rademacker", keys, 1, SHAPE)


@pytest.mark.parametrize(
    "options", [{"solver": "dopri5"}, {"solver": "heun", "steps": 6}], ids=lambda o: o["solver"]
)
def test_log_prob_does_not_depend_on_the_neighbours(options):
    def field(x, t_b):  # stiffer for a larger x, so a shared step size would show
        return jnp.sin(3 * x) * (1 + 4 * t_b).reshape(-1, 1, 1, 1)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *SHAPE)), jnp.float32)
    probes = density.draw_probes("gaussian", jax.random.split(jax.random.key(1), 4), 2, SHAPE)
    batch, *_ = log_prob(field, x, (0.0, 0.3), probes, **options)
    single, *_ = log_prob(field, x[2:3], (0.0, 0.3), probes[:, 2:3], **options)
    np.testing.assert_allclose(single[0], batch[2], rtol=1e-6)


def test_the_exact_trace_holds_for_dimensions_that_its_batches_do_not_divide():
    # 21 dimensions, in batches of 16.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7, 1)), jnp.float32)
    t_b = jnp.array([0.5, 2.0])
    _, trace = density.divergence(lambda x, t_b: x**2 * t_b.reshape(-1, 1, 1, 1), x, t_b, None)
    np.testing.assert_allclose(trace, t_b * 2 * np.asarray(x).sum((1, 2, 3)), rtol=1e-5)
