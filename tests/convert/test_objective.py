"""What args say of the objective: REPA's is converted exactly, others are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import from_torch, objective
from convert.names import params_from_torch
from convert.torch_file import in_memory
from sit_jax.errors import UserError
from sit_jax.sampling import ode
from sit_jax.transport.paths import PATHS
from tests import checkpoints
from tests.convert.test_from_torch import as_state_dict, opened

REPA = {"path_type": "linear", "prediction": "v", "weighting": "uniform", "cfg_prob": 0.1}
PROJECTORS = {"projectors.0.0.weight": np.ones((3, 16), np.float32)}


def converted(tmp_path, content, **options):
    """Return the setup, step and state of the workdir that the content becomes."""
    path = checkpoints.save(tmp_path / "x.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, **options)
    return opened(tmp_path / "run")


def repa_file(**args):
    content = checkpoints.training()
    for part in ("model", "ema"):
        content[part] |= PROJECTORS
    return content | {"args": REPA | args, "steps": 5}


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(1)
    x = draw.standard_normal((4, 8, 8, 4), np.float32)
    return x, np.array([0.0, 0.2, 0.7, 1.0], np.float32), np.array([3, 0, 9, 10], np.int32)


@pytest.mark.parametrize("part", ["ema", "model"])
def test_repas_network_is_called_at_1_minus_t_with_the_opposite_sign(tmp_path, batch, part):
    content = repa_file()
    setup, _, state = converted(tmp_path, content)
    x, t, y = batch
    theirs = params_from_torch(content[part], setup.size)
    ours = state.ema if part == "ema" else state.params
    want = -np.asarray(setup.network(theirs, x, 1 - t, y))
    have = np.asarray(setup.network(ours, x, t, y))
    assert np.abs(want).max() > 0.1
    # 2e-7 is one rounding of float32; the unconverted weights differ by as much as the values.
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert np.abs(setup.network(theirs, x, t, y) - want).max() > 0.1


@pytest.mark.torch
def test_repas_network_in_pytorch_gives_the_same_velocity(tmp_path, batch):
    torch = pytest.importorskip("torch")
    from tests import torch_sit

    content = repa_file()
    model = torch_sit.SiT(**vars(checkpoints.TINY), input_size=8, channels=4, classes=10)
    weights = {name: torch.from_numpy(content["ema"][name]) for name in model.state_dict()}
    model.load_state_dict(weights, strict=True)
    setup, _, state = converted(tmp_path, content)
    x, s, y = batch
    with torch.inference_mode():
        # REPA: x_t = (1 - t) data + t noise, and the model gives d x_t / d t.
        v = model(*(torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2).copy(), 1 - s, y)))
    want = -v.numpy().transpose(0, 2, 3, 1)
    have = np.asarray(setup.network(state.ema, x, s, y))
    np.testing.assert_allclose(have, want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_sampling_along_repas_time_gives_our_sample(tmp_path, batch):
    """REPA's Euler steps from t=1 to 0 with its network equal ours from 0 to 1 with ours."""
    content = repa_file()
    setup, _, state = converted(tmp_path, content)
    x, _, y = batch
    theirs = params_from_torch(content["ema"], setup.size)
    network = jax.jit(setup.network)
    sample = jnp.asarray(x)
    times = np.linspace(1, 0, 9, dtype=np.float32)
    for t, after in zip(times, times[1:], strict=False):
        sample = sample + (after - t) * network(theirs, sample, jnp.full(4, t), y)

    ours, _ = ode.solve(
        lambda x, t_b: network(state.ema, x, t_b, y),
        jnp.asarray(x),
        (0.0, 1.0),
        ode.OdeOptions(solver="euler", steps=8),
    )
    np.testing.assert_allclose(np.asarray(ours), np.asarray(sample), rtol=0, atol=2e-5)


def test_the_map_is_its_own_inverse_and_keeps_all_other_tensors():
    weights = {name: in_memory(value) for name, value in checkpoints.state_dict(0).items()}
    twice = objective.reverse_time(objective.reverse_time(weights))
    once = objective.reverse_time(weights)
    for name, tensor in weights.items():
        np.testing.assert_allclose(
            np.asarray(twice[name]), np.asarray(tensor), rtol=0, atol=1e-7, err_msg=name
        )
    changed = [n for n in weights if (np.asarray(once[n]) != np.asarray(weights[n])).any()]
    assert sorted(changed) == [
        "final_layer.linear.bias",
        "final_layer.linear.weight",
        "t_embedder.mlp.0.weight",
    ]


@pytest.mark.parametrize(("theirs", "ours"), [("linear", "Linear"), ("cosine", "GVP")])
def test_repas_paths_are_ours_in_reverse(theirs, ours):
    t = np.linspace(0, 1, 7, dtype=np.float32)
    alpha = 1 - t if theirs == "linear" else np.cos(np.pi / 2 * t)
    sigma = t if theirs == "linear" else np.sin(np.pi / 2 * t)
    path = PATHS[ours]
    np.testing.assert_allclose(path.alpha(1 - t), alpha, atol=1e-6)
    np.testing.assert_allclose(path.sigma(1 - t), sigma, atol=1e-6)


@pytest.mark.parametrize(
    ("args", "path", "times", "said"),
    [
        ({}, "Linear", "uniform", "REPA's path 'linear', from data at t=0"),
        ({"path_type": "cosine", "cfg_prob": 0.2}, "GVP", "uniform", "REPA's path 'cosine'"),
        ({"weighting": "lognormal"}, "Linear", "logit-normal", "moments do not fit"),
        (
            {"path_type": "cosine", "weighting": "lognormal"},
            "GVP",
            "uniform",
            "training times 'lognormal' on path 'cosine' have no setting here",
        ),
    ],
)
def test_a_file_of_repas_is_a_new_run_of_our_path(tmp_path, capsys, args, path, times, said):
    setup, step, state = converted(tmp_path, repa_file(**args))
    transport = setup.config.transport
    assert (transport.path, transport.prediction, transport.times) == (path, "velocity", times)
    assert setup.config.train.label_dropout == args.get("cfg_prob", 0.1)
    assert step == 0 and state.opt_state[0].count == 0
    printed = capsys.readouterr().out
    assert said in printed and "note: 1 tensors projectors.* are dropped" in printed
    assert "parameters and EMA at step 0" in printed and "assumed" not in printed
    changed = as_state_dict(state.params, setup.size)
    raw = repa_file()["model"]
    np.testing.assert_array_equal(
        changed["final_layer.linear.bias"], -raw["final_layer.linear.bias"]
    )


def test_a_bare_file_with_projectors_is_taken_for_repas(tmp_path, capsys):
    weights = checkpoints.state_dict(0)
    setup, _, state = converted(tmp_path, weights | PROJECTORS)
    ours = as_state_dict(state.ema, setup.size)
    np.testing.assert_array_equal(
        ours["final_layer.linear.weight"], -weights["final_layer.linear.weight"]
    )
    assert "as it has projectors.*, REPA's is assumed" in capsys.readouterr().out


def test_args_of_sit_decide_over_projectors(tmp_path, capsys):
    args = {"path_type": "Linear", "prediction": "velocity"}
    content = repa_file() | {"args": args}
    setup, step, state = converted(tmp_path, content)
    ours = as_state_dict(state.ema, setup.size)
    np.testing.assert_array_equal(
        ours["final_layer.linear.weight"], content["ema"]["final_layer.linear.weight"]
    )
    assert "1 tensors projectors.* are dropped" in capsys.readouterr().out
    assert step == 5 and state.opt_state[0].count == 5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "velocity on path Linear, t from noise at 0 to data at 1, latents of Stable Diff"),
        ([("transport.path", "GVP"), ("transport.prediction", "noise")], "noise on path GVP"),
    ],
)
def test_what_is_assumed_of_a_bare_file_is_said(tmp_path, capsys, overrides, words):
    converted(tmp_path, checkpoints.state_dict(0), overrides=overrides)
    assert words in capsys.readouterr().out


REFUSED = {
    "DiT": ({"model": "DiT-XL/2"}, "args.model is 'DiT-XL/2': a DiT predicts the noise at the st"),
    "fast-DiT": ({"model": "DiT-B/4", "feature_path": "f"}, "args.model is 'DiT-B/4': a DiT"),
    "LightningDiT": ({"model": "LightningDiT-XL/1"}, "a LightningDiT has other layers"),
    "U-ViT": ({"model": "uvit_h2"}, "a U-ViT predicts the noise"),
    "EDM": ({"precond": "edm"}, "args.precond is 'edm': it is of an EDM denoiser"),
    "ADM": ({"noise_schedule": "linear"}, "it is of a diffusion over discrete steps"),
    "another network": ({"model": "MyNet"}, "args.model is 'MyNet': it names another network"),
    "linear alone": (
        {"path_type": "linear"},
        "args.path_type is 'linear': known: Linear, GVP, VP; REPA's are path_type 'linear' or "
        "'cosine' with prediction 'v'",
    ),
    "v of our path": (
        {"path_type": "Linear", "prediction": "v"},
        "args.prediction is 'v': known: velocity, score, noise; REPA's are",
    ),
    "REPA's path, our prediction": (
        {"path_type": "cosine", "prediction": "velocity"},
        "args.path_type is 'cosine'",
    ),
    "edm": ({"path_type": "edm", "prediction": "v"}, "args.path_type is 'edm'"),
    "a list": ({"path_type": ["linear"]}, r"args.path_type is \"\['linear'\]\""),
    "x": ({"path_type": "Linear", "prediction": "x"}, "args.prediction is 'x'"),
    "weight": ({"loss_weight": "min-snr"}, "args.loss_weight is 'min-snr': known: None, none"),
    "autoencoder": ({"vae": "f16d32"}, "args.vae is 'f16d32': known: None, ema, mse"),
    "qk_norm": (REPA | {"qk_norm": True}, "args.qk_norm is REPA's LayerNorm of queries and keys"),
}


@pytest.mark.parametrize(("case", "weights"), [*((case, None) for case in REFUSED), ("DiT", "ema")])
def test_another_objective_is_refused_with_the_reason(tmp_path, case, weights):
    args, message = REFUSED[case]
    content = checkpoints.training() | {"args": args}
    path = checkpoints.save(tmp_path / "x.pt", content)
    with pytest.raises(UserError, match=message) as caught:
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2, weights=weights)
    assert "\n" not in str(caught.value) and "did you mean" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]
