"""Paths, predictions, losses, intervals and diffusion forms against the PyTorch reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.transport import interval, losses, paths, prediction, times
from sit_jax.transport.diffusion import diffusion
from tests import goldens
from tests.goldens import nhwc, relative_error

# The difference from an independent float64 implementation (tests/golden/README.md).
FLOAT32 = 3e-6


def golden_predict():
    model, params = goldens.bare()
    y = goldens.load("transport")[1]["y"].astype(np.int32)
    return lambda x, t: model.apply({"params": params}, x, t, y)


def case_name(case):
    return "-".join(
        str(case[key]) for key in ("path_type", "prediction", "loss_weight") if key in case
    )


@pytest.mark.parametrize("case", goldens.cases("transport", "path_functions"), ids=case_name)
def test_path_functions(case):
    arrays, path = goldens.load("transport")[1], paths.path_by_name(case["path_type"])
    t, x, v = (jnp.asarray(arrays[f"grid/{name}"]) for name in "txv")
    for name in ("alpha", "d_alpha", "sigma", "d_sigma"):
        ours, theirs = getattr(path, name)(t), arrays[case["out"][name]].reshape(t.shape)
        if path.name == "VP" and "sigma" in name:
            # 1 - exp(2 log alpha) cancels near t=1, where the reference's relative error is
            # 2^-24/sigma^2, so compare with the truth, too.
            truth = vp_float64(np.asarray(t, np.float64))[name]
            cancellation = 2**-23 / path.sigma(t) ** 2
            assert (np.abs(ours - truth) <= FLOAT32 * np.abs(truth)).all()
            assert (np.abs(ours - theirs) <= (FLOAT32 + cancellation) * np.abs(truth)).all()
        else:
            np.testing.assert_allclose(ours, theirs, rtol=FLOAT32, atol=1e-7)
    if path.name != "VP":
        variance = paths.drift_variance(path, t)
        theirs = arrays[case["out"]["drift_var"]].reshape(t.shape)
        np.testing.assert_allclose(variance, theirs, rtol=FLOAT32, atol=1e-7)


def vp_float64(t):
    log_alpha = -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05
    slope = (1 - t) * 19.9 / 2 + 0.05
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    return {"sigma": sigma, "d_sigma": -np.exp(2 * log_alpha) * slope / sigma}


@pytest.mark.parametrize("case", goldens.cases("transport", "loss"), ids=case_name)
def test_losses(case):
    arrays, path = goldens.load("transport")[1], paths.path_by_name(case["path_type"])
    x0, x1, t = nhwc(arrays["x0"]), nhwc(arrays["x1"]), arrays["t"]
    assert relative_error(paths.interpolate(path, x1, x0, t), nhwc(arrays[case["xt"]])) < FLOAT32
    assert (
        relative_error(paths.target_velocity(path, x1, x0, t), nhwc(arrays[case["ut"]])) < FLOAT32
    )
    # The reference ignores the weight of a velocity loss; here it is refused.
    weight = "none" if case["prediction"] == "velocity" else case["loss_weight"] or "none"
    loss = losses.losses(golden_predict(), path, case["prediction"], weight, x1, x0, jnp.asarray(t))
    np.testing.assert_allclose(loss, arrays[case["loss"]], rtol=FLOAT32)


@pytest.mark.parametrize("case", goldens.cases("transport", "drift_and_score"), ids=case_name)
def test_drift_and_score(case):
    arrays, path = goldens.load("transport")[1], paths.path_by_name(case["path_type"])
    x, t = nhwc(arrays["x"]), jnp.asarray(arrays["t_drift"])
    velocity = prediction.velocity_field(golden_predict(), path, case["prediction"])(x, t)
    fields = prediction.velocity_and_score(golden_predict(), path, case["prediction"])
    drift, score = fields(x, t)
    assert relative_error(velocity, nhwc(arrays[case["drift"]])) < FLOAT32
    assert relative_error(drift, nhwc(arrays[case["drift"]])) < FLOAT32
    assert relative_error(score, nhwc(arrays[case["score"]])) < FLOAT32


@pytest.mark.parametrize("case", goldens.cases("transport", "training_time"), ids=case_name)
def test_training_times(case):
    arrays, path = goldens.load("transport")[1], paths.path_by_name(case["path_type"])
    t = times.rescale(interval.train_interval(path, case["prediction"]), arrays[case["u"]])
    np.testing.assert_allclose(t, arrays[case["t"]], rtol=FLOAT32)


@pytest.mark.parametrize(
    "case",
    goldens.cases("transport", "interval"),
    ids=lambda c: f"{case_name(c)}-{c['given_train_eps']}",
)
def test_intervals(case):
    path, kind = paths.path_by_name(case["path_type"]), case["prediction"]
    train_eps, sample_eps = case["given_train_eps"], case["given_sample_eps"]
    # The reference drops a given eps for Linear and GVP velocity, and a sample_eps without a
    # train_eps (a train_eps without a sample_eps makes it fail). Elsewhere the intervals are equal.
    ignores = kind == "velocity" and path.name != "VP" and (train_eps or sample_eps)
    if not ignores:
        assert interval.train_interval(path, kind, train_eps) == pytest.approx(
            case["interval"]["train"]
        )
    if not ignores and (train_eps is None) == (sample_eps is None):
        assert interval.ode_interval(path, kind, sample_eps) == pytest.approx(
            case["interval"]["ode"]
        )
        for name, want in case["interval"].items():
            if name.startswith("sde/"):
                _, form, last = name.split("/")
                ours = interval.sde_interval(
                    path, kind, form, float(last.partition("=")[2]), sample_eps
                )
                starts_infinite = form == "SBDM" and want[0] == 0 and path.name != "VP"
                assert ours == pytest.approx([1e-3, want[1]] if starts_infinite else want)


@pytest.mark.parametrize("path", paths.PATHS.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("kind", prediction.PREDICTIONS)
def test_given_eps_is_honoured(path, kind):
    """The reference ignores an eps for velocity, and one eps there changes the other's effect."""
    start = 0 if path.name == "VP" else 0.01
    assert interval.train_interval(path, kind, 0.01) == (start, 0.99)
    assert interval.ode_interval(path, kind, 0.01) == (start, 0.99)


@pytest.mark.parametrize("case", goldens.cases("diffusion", "inside"), ids=lambda c: c["out"])
def test_diffusion_forms(case):
    arrays, path = goldens.load("diffusion")[1], paths.path_by_name(case["path_type"])
    t = jnp.asarray(arrays["inside/t"])
    ours = diffusion(path, case["form"], t, case["norm"])
    assert ours.shape == t.shape  # "constant" too, which is a Python float in the reference
    rtol = FLOAT32
    if (path.name, case["form"]) == ("VP", "sigma"):
        rtol += 2**-23 / path.sigma(t) ** 2  # theirs cancels near t=1, see test_path_functions
    assert (np.abs(ours - arrays[case["out"]]) <= rtol * np.abs(arrays[case["out"]]) + 1e-7).all()
