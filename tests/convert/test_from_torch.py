"""from_torch: its workdir samples and trains on exactly; bad input leaves nothing behind."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from convert import cli, from_torch
from convert.names import params_from_torch, params_to_torch
from sit_jax import config as config_lib
from sit_jax import main, train_step
from sit_jax.data.source import ArraySource
from sit_jax.jobs import train
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.workdir import open_checkpoints, restore_weights
from sit_jax.models.embeddings import position_embedding
from sit_jax.train_state import TrainState
from tests import checkpoints, goldens
from tests.test_train_step import compare, golden_examples

GOLDEN = str(goldens.FOLDER / "sit_train_ckpt.pt")


def opened(workdir) -> tuple[Setup, int, TrainState]:
    """Return the setup, step and state that training in a workdir starts from."""
    config = config_lib.load(str(workdir / "config.json"))
    setup = set_up(config)
    with open_checkpoints(config, epath.Path(workdir)) as saved:
        step, state, _ = train.restore_or_create(setup, epath.Path(workdir), saved)
    return setup, step, state


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


def as_state_dict(tree, size):
    return dict(params_to_torch(tree, size))


def assert_same(tree, tensors, size):
    ours = as_state_dict(tree, size)
    assert ours.keys() == tensors.keys()
    for name, want in tensors.items():
        np.testing.assert_array_equal(ours[name], want, err_msg=name)


def take_golden_steps(setup, state, name, steps, ema_decay):
    """Take golden training steps from a state with the workdir's own objective and optimizer.

    Returns the new state and the losses.
    """
    arrays = goldens.load("train")[1]

    def loss(params, examples):
        return train_step.batch_loss(setup.network, setup.objective, params, examples)

    update = jax.jit(
        lambda s, e: train_step.update(
            s, e, loss=loss, optimizer=setup.optimizer, ema_decay=ema_decay
        )
    )
    losses = []
    for step in range(steps):
        state, metrics = update(state, golden_examples(arrays, name, step))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_training_checkpoint_resumes_with_its_complete_state(tmp_path):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "0000005.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    setup, step, state = opened(tmp_path / "run")
    assert step == state.step == 5
    assert_same(state.params, content["model"], setup.size)
    assert_same(state.ema, content["ema"], setup.size)
    adam = state.opt_state[0]
    assert adam.count == 5
    names = list(content["model"])
    for tree, key in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        ours = as_state_dict(tree, setup.size)
        assert not ours.pop("pos_embed").any()
        for name, value in ours.items():
            np.testing.assert_array_equal(
                value, content["opt"]["state"][names.index(name)][key], err_msg=name
            )
    config = setup.config
    assert config.seed == 7 and config.data.path == "photos" and config.train.batch == 256
    # The reference ignores train_eps for this path with velocity prediction.
    assert (config.transport.path, config.transport.train_eps) == ("GVP", None)
    o = config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (2e-4, 0.8, 0.99, 1e-7, 0.01)


def test_the_next_update_is_adamws(tmp_path):
    """Compare with torch's formula in float64, on the moments and the count of the file."""
    content = checkpoints.training()
    from_torch.convert(
        checkpoints.save(tmp_path / "x.pt", content), str(tmp_path / "run"), num_heads=2
    )
    setup, _, state = opened(tmp_path / "run")
    gradients = checkpoints.state_dict(9)
    tree = jax.tree.map(jnp.asarray, params_from_torch(gradients, setup.size))
    updates, _ = setup.optimizer.update(tree, state.opt_state, state.params)
    ours = as_state_dict(updates, setup.size)
    group, count = content["opt"]["param_groups"][0], 6
    (b1, b2), names = group["betas"], list(content["model"])
    for number, entry in content["opt"]["state"].items():
        name = names[number]
        g, w = gradients[name].astype(np.float64), content["model"][name].astype(np.float64)
        m = (b1 * entry["exp_avg"] + (1 - b1) * g) / (1 - b1**count)
        v = (b2 * entry["exp_avg_sq"] + (1 - b2) * g**2) / (1 - b2**count)
        want = -group["lr"] * (m / (np.sqrt(v) + group["eps"]) + group["weight_decay"] * w)
        np.testing.assert_allclose(ours[name], want, rtol=1e-4, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("decay", [0.9999, 0.9])
def test_golden_steps_from_the_workdir_equal_pytorchs(tmp_path, decay):
    """The golden steps start from the raw weights, with an EMA equal to them and new moments."""
    from_torch.convert(GOLDEN, str(tmp_path / "run"), num_heads=4, weights="raw")
    setup, step, state = opened(tmp_path / "run")
    assert step == 0 and state.opt_state[0].count == 0
    name, arrays = "Linear-velocity", goldens.load("train")[1]
    state, losses = take_golden_steps(setup, state, name, 5, decay)
    np.testing.assert_allclose(losses, arrays[f"{name}/loss"], rtol=1e-5)
    adam = state.opt_state[0]
    parts = {
        "params": state.params,
        f"ema-{decay}": state.ema,
        "exp_avg": adam.mu,
        "exp_avg_sq": adam.nu,
    }
    for part, tree in parts.items():
        compare(arrays, f"{name}/{part}", tree)


@pytest.mark.torch
def test_training_continues_as_in_pytorch(tmp_path):
    """Take three more steps from the golden checkpoint's moments and count in both."""
    torch = pytest.importorskip("torch")
    from tests import torch_sit

    content = torch.load(GOLDEN, weights_only=False)
    model = torch_sit.SiT(**vars(goldens.SIZE), input_size=8, channels=4, classes=goldens.CLASSES)
    model.load_state_dict(content["model"], strict=True)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    adamw.load_state_dict(content["opt"])
    from_torch.convert(GOLDEN, str(tmp_path / "run"), num_heads=4)
    setup, step, state = opened(tmp_path / "run")
    name, arrays = "Linear-velocity", goldens.load("train")[1]
    state, losses = take_golden_steps(setup, state, name, 3, 0.9999)
    for k in range(3):
        x1, x0, t, y, drop = (
            torch.from_numpy(arrays[f"{name}/{part}"][k]) for part in ("x1", "x0", "t", "y", "drop")
        )
        t_bchw = t.reshape(-1, 1, 1, 1)
        y = torch.where(drop == 1, goldens.CLASSES, y)
        out = model(t_bchw * x1 + (1 - t_bchw) * x0, t, y)
        loss = ((out - (x1 - x0)) ** 2).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        assert losses[k] == pytest.approx(loss.item(), rel=1e-5)
    assert step == 3 and state.step == 6 and state.opt_state[0].count == 6
    ours = as_state_dict(state.params, setup.size)
    for tensor, want in model.state_dict().items():
        want, have = want.numpy(), ours[tensor]
        if "qkv.bias" in tensor:  # its middle third is magnified rounding: tests/golden/README.md
            want, have = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (want, have))
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5, err_msg=tensor)


def test_the_workdir_trains_and_samples(tmp_path, quiet_machine, capsys):
    """Use a bare state dict of a pixel model, and the digits of scikit-learn."""
    weights = checkpoints.state_dict(0, channels=1)
    path, run = checkpoints.save(tmp_path / "bare.pt", weights), str(tmp_path / "run")
    digits = [
        ("data.source", "digits"),
        ("data.flip", "False"),
        ("train.batch", "8"),
        ("log.sheet_every", "0"),
    ]
    settings = [
        ("sample.solver", "heun"),
        ("sample.steps", "2"),
        ("sample.count", "4"),
        ("sample.batch", "4"),
    ]
    from_torch.convert(
        path, run, num_heads=2, overrides=[*digits, *settings, ("log.tensorboard", "False")]
    )
    assert main.main(["--workdir", run, "--mode", "sample"]) == 0
    assert main.main(["--workdir", run, "--mode", "sample", "--config.sample.weights=raw"]) == 0
    assert len(list((tmp_path / "run" / "samples").glob("step0-*/images/00000*.png"))) == 8
    assert main.main(["--workdir", run, "--config.train.steps=2", "--config.data.workers=0"]) == 0
    assert "training from step 0 to 2" in capsys.readouterr().out
    _, step, state = opened(tmp_path / "run")
    assert step == 2 and state.opt_state[0].count == 2


def test_fork_starts_from_a_single_set_of_weights(tmp_path, monkeypatch):
    weights = checkpoints.state_dict(0)
    from_torch.convert(
        checkpoints.save(tmp_path / "x.pt", weights), str(tmp_path / "run"), num_heads=2
    )
    config = config_lib.load(str(tmp_path / "run" / "config.json"), [("transport.path", "VP")])
    names = tuple(map(str, range(config.data.classes)))
    source = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32), names)
    monkeypatch.setattr(train, "open_source", lambda setup: source)
    train.fork(config, epath.Path(tmp_path / "run"), epath.Path(tmp_path / "fork"))
    (tmp_path / "fork" / "config.json").write_text(config_lib.to_json(config))
    setup, step, state = opened(tmp_path / "fork")
    assert_same(state.params, weights, setup.size)
    assert_same(state.ema, weights, setup.size)
    assert step == 0 and state.opt_state[0].count == 0


@pytest.mark.parametrize("form", ["plain", "module.", "safetensors"])
def test_every_format_of_a_bare_state_dict_gives_the_same_workdir(tmp_path, form):
    weights = checkpoints.state_dict(0, learn_sigma=True, classes=3)
    if form == "safetensors":
        path = str(tmp_path / "x.safetensors")
        save_file(dict(sorted(weights.items())), path)
    else:
        prefix = "module." if form == "module." else ""
        path = checkpoints.save(
            tmp_path / "x.pt", {prefix + name: value for name, value in weights.items()}
        )
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    setup, step, state = opened(tmp_path / "run")
    assert_same(state.params, weights, setup.size)
    assert_same(state.ema, weights, setup.size)
    assert step == 0 and setup.config.model.learn_sigma and setup.config.data.classes == 3
    assert not any(
        leaf.any() for leaf in jax.tree.leaves((state.opt_state[0].mu, state.opt_state[0].nu))
    )
    # The weights are stored only once.
    assert not (tmp_path / "run" / "checkpoints" / "0" / "params").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["float16", "bfloat16", "float64"]
)
def test_other_float_types_become_float32_with_a_note(tmp_path, capsys, suffix, dtype):
    weights = {name: value.astype(dtype) for name, value in checkpoints.state_dict(0).items()}
    path = str(tmp_path / f"x.{suffix}")
    save_file(weights, path) if suffix == "safetensors" else checkpoints.save(path, weights)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert f"note: {np.dtype(dtype).name} weights become float32\n" in capsys.readouterr().out
    setup, _, state = opened(tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {np.dtype(np.float32)}
    assert_same(
        state.ema, {name: value.astype(np.float32) for name, value in weights.items()}, setup.size
    )


def test_a_published_size_needs_no_num_heads(tmp_path):
    size = checkpoints.Size(depth=12, width=384, heads=6, patch=8)  # SiT-S/8
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0, size, side=8, classes=2))
    from_torch.convert(path, str(tmp_path / "run"))
    model = config_lib.load(str(tmp_path / "run" / "config.json")).model
    assert (model.name, model.depth, model.heads) == ("SiT-S/8", None, None)


def test_another_image_size_recomputes_only_the_position_embedding(tmp_path, capsys):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "x.pt", content)
    # It was 64: 8 latent cells of 8 pixels.
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, image_size=128)
    setup, step, state = opened(tmp_path / "run")
    assert setup.input_shape == (16, 16, 4)
    position = {"pos_embed": position_embedding(16, 8)[None]}
    assert_same(state.params, content["model"] | position, setup.size)
    assert_same(state.ema, content["ema"] | position, setup.size)
    assert step == 0 and state.opt_state[0].count == 0
    printed = capsys.readouterr().out
    assert "pos_embed is recomputed for 16 instead of 8 cells" in printed
    assert "a new run: it starts at step 0" in printed


def test_another_number_of_classes_replaces_only_the_label_table(tmp_path, capsys):
    weights = checkpoints.state_dict(0)
    path = checkpoints.save(tmp_path / "x.pt", weights)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, num_classes=3)
    note = (
        "label table is initialised again for 3 instead of 10 classes; all other weights are kept"
    )
    assert note in capsys.readouterr().out
    setup, _, state = opened(tmp_path / "run")
    ours, name = as_state_dict(state.params, setup.size), "y_embedder.embedding_table.weight"
    table = ours.pop(name)
    del weights[name]
    assert table.shape == (4, 16) and 0.01 < table.std() < 0.03  # std 0.02 in a new network
    for name, value in weights.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    from_torch.convert(path, str(tmp_path / "same"), num_heads=2, num_classes=10)
    assert "initialised again" not in capsys.readouterr().out


def test_the_command_line(tmp_path, monkeypatch, capsys):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0))
    run = str(tmp_path / "run")
    from_torch.main([path, run, "--num_heads", "2", "--config.transport.path=GVP"])
    assert config_lib.load(f"{run}/config.json").transport.path == "GVP"
    printed = capsys.readouterr().out
    assert f"sample:   python -m sit_jax.main --mode sample --workdir {run}" in printed
    for arguments, message in (
        (
            [path],
            "the following arguments are required: workdir; "
            "see python -m convert.from_torch --help",
        ),
        (
            [path, run, "--num_headz=2"],
            "unknown argument '--num_headz=2'; settings are --config.KEY=VALUE",
        ),
        ([path, run, "--num_heads=two"], "argument --num_heads: invalid int value: 'two'"),
        ([path, run, "--num_heads=2"], f"'{run}' already exists"),
    ):
        monkeypatch.setattr("sys.argv", ["from_torch", *arguments])
        assert cli.run(from_torch.main) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.match(f"error: {re.escape(message)}", lines[0])


def test_only_the_raw_weights_of_an_incomplete_training_checkpoint(tmp_path):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "x.pt", without(content, "ema", "opt"))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, weights="raw")
    setup = set_up(
        config_lib.load(str(tmp_path / "run" / "config.json"), [("sample.weights", "raw")])
    )
    weights = restore_weights(setup, epath.Path(tmp_path / "run"), "raw")
    assert_same(weights.params, content["model"], setup.size)
    assert weights.step == 0
