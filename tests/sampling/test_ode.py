"""The ODE solvers against the PyTorch reference's samples, and by the order at which their error falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.sampling import ode
from sit_jax.sampling.guidance import check_scale, guide
from sit_jax.transport import interval, paths, prediction
from tests import goldens
from tests.goldens import nhwc

OURS = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}  # torchdiffeq's names


def solvable(case):
    """Cases of our solvers whose interval is ours too: the reference runs VP backwards from 1, where sigma is 0.

    Trajectories, the second tolerance of dopri5 and euler backwards are left out: they take the same path through the
    code.
    """
    if case["reverse"] and case["method"] == "euler":
        return False
    if case["method"] not in OURS or not {"final", "truth"} <= case.keys() or case["num_steps"] == 2:
        return False
    t0, t1 = interval.ode_interval(paths.path_by_name(case["path_type"]), case["prediction"], case.get("sample_eps"))
    ours = (t1, t0) if case["reverse"] else (t0, t1)
    return case["interval"] == pytest.approx(ours) and case["finite"] and case.get("rtol", 1e-3) == 1e-3


def solve_golden(case):
    arrays, (model, params) = goldens.load("ode")[1], goldens.bare()
    z, y = (arrays[name + ("_cfg" if case["cfg_scale"] else "")] for name in "zy")
    n = len(z) // 2 if case["cfg_scale"] else len(z)
    path = paths.path_by_name(case["path_type"])

    def labelled(y):
        return lambda x, t: model.apply({"params": params}, x, t, y.astype(np.int32))

    predict = labelled(y[:n])
    if case["cfg_scale"]:
        predict = guide(predict, labelled(y[n:]), case["cfg_scale"], channels=3)
    velocity = prediction.velocity_field(predict, path, case["prediction"])
    steps, (atol, rtol) = case["num_steps"] - 1, (case.get("atol", 1e-6), case.get("rtol", 1e-3))

    def solve(x):
        return ode.solve(velocity, x, case["interval"], solver=OURS[case["method"]], steps=steps, atol=atol, rtol=rtol)

    return jax.jit(solve)(jnp.asarray(nhwc(z[:n]))), nhwc(arrays[case["final"]])[:n], nhwc(arrays[case["truth"]])[:n]


def rms(x):
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))


@pytest.mark.parametrize(
    "case", [c for c in goldens.cases("ode", "ode") if solvable(c) and c["method"] != "dopri5"], ids=lambda c: c["name"]
)
def test_fixed_steps_equal_reference(case):
    ours, theirs, _ = solve_golden(case)
    # tests/golden/README.md: 3e-7 for velocity, 1e-4 where the drift has 1/t, which magnifies the rounding of t.
    tolerance = 3e-6 if case["prediction"] == "velocity" else 1e-4
    assert rms(ours - theirs) < tolerance * rms(theirs)


@pytest.mark.parametrize(
    "case", [c for c in goldens.cases("ode", "ode") if solvable(c) and c["method"] == "dopri5"], ids=lambda c: c["name"]
)
def test_adaptive_steps_are_as_near_to_the_truth(case):
    ours, _, truth = solve_golden(case)
    assert rms(ours - truth) / rms(truth) < max(2 * case["rms_error_relative_to_truth"], case["rtol"])


def exponential(x, t_b):
    return x * (1 + t_b).reshape(-1, 1, 1, 1)  # x(1) = x(0) exp(3/2)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_convergence_order(solver, order, guided):
    field, factor = exponential, np.exp(1.5)
    if guided:  # u + 3 (c - u) with u = c/2 is twice c
        field = guide(exponential, lambda x, t: exponential(x, t) / 2, 3.0)
        factor = factor**2
    x = jnp.ones((1, 1, 1, 1))
    errors = [
        abs(float(ode.solve(field, x, (0.0, 1.0), solver=solver, steps=n, atol=1, rtol=1)[0, 0, 0, 0]) - factor)
        for n in (16, 32)
    ]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_dopri5_meets_its_tolerance_and_loosens_with_it():
    x, truth = jnp.ones((1, 1, 1, 1)), np.exp(1.5)

    def error(rtol):
        return abs(
            float(ode.solve(exponential, x, (0.0, 1.0), solver="dopri5", steps=1, atol=rtol, rtol=rtol)[0, 0, 0, 0])
            - truth
        )

    assert error(1e-6) < 1e-5
    assert error(1e-1) > 10 * error(1e-6)


@pytest.mark.parametrize("solver", ode.SOLVERS)
def test_round_trip_and_independence_of_neighbours(solver):
    def field(x, t_b):  # each sample has its own stiffness, so a shared step size would show
        return jnp.sin(5 * x) * (1 + 4 * t_b).reshape(-1, 1, 1, 1)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 1)), jnp.float32)
    options = {"solver": solver, "steps": 200, "atol": 1e-7, "rtol": 1e-6}
    there = ode.solve(field, x, (0.0, 0.3), **options)
    back = ode.solve(field, there, (0.3, 0.0), **options)
    assert np.abs(back - x).max() < (0.1 if solver == "euler" else 2e-3)
    alone = ode.solve(field, x[2:3], (0.0, 0.3), **options)
    np.testing.assert_allclose(alone[0], there[2], rtol=1e-6)


def test_every_sample_sees_its_own_condition_under_dopri5():
    speed_b = jnp.array([0.0, 1.0, 2.0])
    out = ode.solve(
        lambda x, t_b: jnp.broadcast_to(speed_b.reshape(-1, 1, 1, 1), x.shape),
        jnp.zeros((3, 2, 2, 1)),
        (0.0, 1.0),
        solver="dopri5",
        steps=1,
        atol=1e-6,
        rtol=1e-6,
    )
    np.testing.assert_allclose(out[:, 0, 0, 0], speed_b, rtol=1e-6)


def test_guidance_leaves_later_channels_conditional():
    conditional, unconditional = (lambda x, t, v=v: jnp.full_like(x, v) for v in (2.0, 1.0))
    x, t = jnp.zeros((1, 1, 1, 4)), jnp.zeros(1)
    np.testing.assert_array_equal(guide(conditional, unconditional, 3.0, 3)(x, t)[0, 0, 0], [4, 4, 4, 2])
    np.testing.assert_array_equal(guide(conditional, unconditional, 3.0, None)(x, t)[0, 0, 0], [4, 4, 4, 4])
    assert guide(conditional, unconditional, 1.0) is conditional


def test_bad_input():
    with pytest.raises(UserError, match="unknown solver 'dopri'; did you mean 'dopri5'"):
        ode.solve(exponential, jnp.ones((1, 1, 1, 1)), (0, 1), solver="dopri", steps=1, atol=1, rtol=1)
    with pytest.raises(UserError, match="cfg scale is 0.5; expected 1"):
        check_scale(0.5)
