"""from_torch: the workdir samples, training goes on exactly, and bad input leaves nothing behind."""

import errno
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from convert import cli, from_torch
from convert.names import params_from_torch, params_to_torch
from sit_jax import checkpoint, main, train_step
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.models.embeddings import position_embedding
from sit_jax.train_state import TrainState
from tests import checkpoints, goldens
from tests.test_train_step import compare, golden_examples

GOLDEN = str(goldens.FOLDER / "sit_train_ckpt.pt")


def opened(workdir) -> tuple[Setup, int, TrainState]:
    """What training in that workdir starts from."""
    config = config_lib.load(str(workdir / "config.json"))
    setup = set_up(config)
    with train.open_checkpoints(config, epath.Path(workdir)) as saved:
        step, state, _ = train.restore_or_create(setup, saved)
    return setup, step, state


def in_torch(tree, size):
    return dict(params_to_torch(tree, size))


def same(tree, tensors, size):
    ours = in_torch(tree, size)
    assert ours.keys() == tensors.keys()
    for name, want in tensors.items():
        np.testing.assert_array_equal(ours[name], want, err_msg=name)


def take(setup, state, name, steps, ema_decay):
    """The golden training steps from a state, with the workdir's own objective and optimizer."""
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


def test_a_training_checkpoint_resumes_with_all_it_has(tmp_path):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "0000005.pt", content)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    setup, step, state = opened(tmp_path / "run")
    assert step == state.step == 5
    same(state.params, content["model"], setup.size)
    same(state.ema, content["ema"], setup.size)
    adam = state.opt_state[0]
    assert adam.count == 5
    names = list(content["model"])
    for tree, key in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        ours = in_torch(tree, setup.size)
        assert not ours.pop("pos_embed").any()
        for name, value in ours.items():
            np.testing.assert_array_equal(
                value, content["opt"]["state"][names.index(name)][key], err_msg=name
            )
    config = setup.config
    assert config.seed == 7 and config.data.path == "photos" and config.train.batch == 256
    assert (config.transport.path, config.transport.train_eps) == (
        "GVP",
        None,
    )  # ignored there for velocity
    o = config.optimizer
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (2e-4, 0.8, 0.99, 1e-7, 0.01)


def test_the_next_update_is_adamws(tmp_path):
    """From the moments and the count of the file: torch's formula in float64, by torch's names."""
    content = checkpoints.training()
    from_torch.convert(
        checkpoints.save(tmp_path / "x.pt", content), str(tmp_path / "run"), num_heads=2
    )
    setup, _, state = opened(tmp_path / "run")
    gradients = checkpoints.state_dict(9)
    tree = jax.tree.map(jnp.asarray, params_from_torch(gradients, setup.size))
    updates, _ = setup.optimizer.update(tree, state.opt_state, state.params)
    ours = in_torch(updates, setup.size)
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
    """The stored continuation starts from the raw weights, with fresh moments and an EMA that is a copy of them."""
    from_torch.convert(GOLDEN, str(tmp_path / "run"), num_heads=4, weights="raw")
    setup, step, state = opened(tmp_path / "run")
    assert step == 0 and state.opt_state[0].count == 0
    name, arrays = "Linear-velocity", goldens.load("train")[1]
    state, losses = take(setup, state, name, 5, decay)
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
def test_training_continues_as_it_does_in_pytorch(tmp_path):
    """The golden checkpoint with its moments and count: three more steps there and here."""
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
    state, losses = take(setup, state, name, 3, 0.9999)
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
    ours = in_torch(state.params, setup.size)
    for tensor, want in model.state_dict().items():
        want, have = want.numpy(), ours[tensor]
        if "qkv.bias" in tensor:  # the key third is magnified rounding, tests/golden/README.md
            want, have = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (want, have))
        np.testing.assert_allclose(have, want, rtol=0, atol=2e-5, err_msg=tensor)


def test_the_workdir_trains_and_samples(tmp_path, quiet_machine, capsys):
    """Bare weights of a pixel model on the digits, which ship with scikit-learn."""
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
    assert len(list((tmp_path / "run" / "samples").glob("step0-*/00000*.png"))) == 8
    assert main.main(["--workdir", run, "--config.train.steps=2", "--config.data.workers=0"]) == 0
    assert "training from step 0 to 2" in capsys.readouterr().out
    _, step, state = opened(tmp_path / "run")
    assert step == 2 and state.opt_state[0].count == 2


def test_fork_starts_from_weights_alone(tmp_path, monkeypatch):
    weights = checkpoints.state_dict(0)
    from_torch.convert(
        checkpoints.save(tmp_path / "x.pt", weights), str(tmp_path / "run"), num_heads=2
    )
    monkeypatch.setattr(train, "open_source", lambda setup: None)
    config = config_lib.load(str(tmp_path / "run" / "config.json"), [("transport.path", "VP")])
    train.fork(config, epath.Path(tmp_path / "run"), epath.Path(tmp_path / "fork"))
    (tmp_path / "fork" / "config.json").write_text(config_lib.to_json(config))
    setup, step, state = opened(tmp_path / "fork")
    same(state.params, weights, setup.size)
    same(state.ema, weights, setup.size)
    assert step == 0 and state.opt_state[0].count == 0


@pytest.mark.parametrize("form", ["plain", "module.", "safetensors"])
def test_every_form_of_a_bare_file_is_the_same(tmp_path, form):
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
    same(state.params, weights, setup.size)
    same(state.ema, weights, setup.size)
    assert step == 0 and setup.config.model.learn_sigma and setup.config.data.classes == 3
    assert not any(
        leaf.any() for leaf in jax.tree.leaves((state.opt_state[0].mu, state.opt_state[0].nu))
    )
    assert not (
        tmp_path / "run" / "checkpoints" / "0" / "params"
    ).exists()  # weights are stored once


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["float16", "bfloat16", "float64"]
)
def test_other_float_types_become_float32_and_it_is_said(tmp_path, capsys, suffix, dtype):
    weights = {name: value.astype(dtype) for name, value in checkpoints.state_dict(0).items()}
    path = str(tmp_path / f"x.{suffix}")
    save_file(weights, path) if suffix == "safetensors" else checkpoints.save(path, weights)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert f"note: {np.dtype(dtype).name} weights become float32\n" in capsys.readouterr().out
    setup, _, state = opened(tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(state.ema)} == {np.dtype(np.float32)}
    same(state.ema, {name: value.astype(np.float32) for name, value in weights.items()}, setup.size)


def test_known_sizes_need_no_heads(tmp_path):
    size = checkpoints.Size(depth=12, width=384, heads=6, patch=8)  # SiT-S/8
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0, size, side=8, classes=2))
    from_torch.convert(path, str(tmp_path / "run"))
    model = config_lib.load(str(tmp_path / "run" / "config.json")).model
    assert (model.name, model.depth, model.heads) == ("SiT-S/8", None, None)


def test_another_image_size_recomputes_the_position_embedding_alone(tmp_path, capsys):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "x.pt", content)
    from_torch.convert(
        path, str(tmp_path / "run"), num_heads=2, image_size=128
    )  # 64 before: 8 cells of 8 pixels
    setup, step, state = opened(tmp_path / "run")
    assert setup.input_shape == (16, 16, 4)
    position = {"pos_embed": position_embedding(16, 8)[None]}
    same(state.params, content["model"] | position, setup.size)
    same(state.ema, content["ema"] | position, setup.size)
    assert step == 0 and state.opt_state[0].count == 0
    said = capsys.readouterr().out
    assert (
        "pos_embed is recomputed for 16 instead of 8 cells" in said
        and "a new training: it starts at step 0" in said
    )


def test_other_classes_keep_all_but_the_label_table(tmp_path, capsys):
    weights = checkpoints.state_dict(0)
    path = checkpoints.save(tmp_path / "x.pt", weights)
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, num_classes=3)
    assert (
        "label table is drawn anew for 3 instead of 10 classes; everything else is kept"
        in capsys.readouterr().out
    )
    setup, _, state = opened(tmp_path / "run")
    ours, name = in_torch(state.params, setup.size), "y_embedder.embedding_table.weight"
    table = ours.pop(name)
    del weights[name]
    assert table.shape == (4, 16) and 0.01 < table.std() < 0.03  # normal 0.02, as in a new network
    for name, value in weights.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    from_torch.convert(path, str(tmp_path / "same"), num_heads=2, num_classes=10)
    assert "drawn anew" not in capsys.readouterr().out


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


def with_nan(weights, name):
    weights[name].flat[[1, 5]] = np.nan, np.inf
    return weights


def two_steps(content):
    content["opt"]["state"][3]["step"] = np.array(9, np.float32)
    return content


def without_moments(content):
    del content["opt"]["state"][3]
    return content


def short_moment(content):
    content["opt"]["state"][3]["exp_avg"] = np.zeros((2, 2), np.float32)
    return content


UNET = {
    "input_blocks.0.0.weight": np.zeros((8, 4, 3, 3), np.float32),
    "time_embed.0.bias": np.zeros(8, np.float32),
    "num_batches_tracked": np.array(0),
}
BARE, FULL = checkpoints.state_dict, checkpoints.training
BAD = {
    "a list": (lambda: [1, 2], {}, "holds list, no state dict"),
    "no tensors": (
        lambda: {"epoch": 3, "state_dict": BARE()},
        {},
        "is no state dict: epoch, state_dict is no tensor",
    ),
    "a UNet": (
        lambda: UNET,
        {},
        "is no SiT: it has no pos_embed and no x_embedder.proj.weight and .* 3 tensors as",
    ),
    "no opt": (
        lambda: without(FULL(), "opt"),
        {},
        "half of a training checkpoint: opt of .* --weights ema or raw",
    ),
    "no ema": (
        lambda: without(FULL(), "ema", "opt"),
        {},
        "half of a training checkpoint: ema, opt .*--weights raw",
    ),
    "raw gone": (
        lambda: without(FULL(), "model"),
        {"weights": "raw"},
        "half .*: model of .* with --weights ema",
    ),
    "moments gone": (
        lambda: without_moments(FULL()),
        {},
        "opt of .* is not AdamW's whole state .*KeyError: 3",
    ),
    "two counts": (lambda: two_steps(FULL()), {}, "opt of .* is not AdamW's whole state"),
    "moment's shape": (
        lambda: short_moment(FULL()),
        {},
        r"exp_avg of .* does not fit: t_embedder.mlp.0.weight has shape \[2, 2\], expected \[16, 256\]",
    ),
    "weights of bare": (BARE, {"weights": "ema"}, "holds one set of weights; leave --weights out"),
    "missing": (
        lambda: without(BARE(), "blocks.1.mlp.fc1.bias"),
        {},
        r"does not fit: blocks.1.mlp.fc1.bias is missing, expected shape \[64\]",
    ),
    "extra": (
        lambda: BARE() | {"head.bias": np.zeros(5, np.float32)},
        {},
        r"head.bias of shape \[5\] is unexpected",
    ),
    "mis-shaped": (
        lambda: BARE() | {"blocks.0.attn.proj.bias": np.zeros(5, np.float32)},
        {},
        r"blocks.0.attn.proj.bias has shape \[5\], expected \[16\]",
    ),
    "out features": (
        lambda: BARE() | {"final_layer.linear.weight": np.zeros((5, 16), np.float32)},
        {},
        r"final_layer.linear.weight has shape \[5, 16\], expected \[16, 16\], or \[32, 16\] with learn_sigma",
    ),
    "no square": (
        lambda: BARE() | {"pos_embed": np.zeros((1, 15, 16), np.float32)},
        {},
        r"pos_embed has shape \[1, 15, 16\], whose 15 tokens are no square",
    ),
    "NaN": (
        lambda: with_nan(BARE(), "blocks.1.mlp.fc1.weight"),
        {},
        "blocks.1.mlp.fc1.weight holds 2 NaN or infinite values of 1024",
    ),
    "NaN in EMA": (
        lambda: FULL() | {"ema": with_nan(BARE(), "x_embedder.proj.bias")},
        {},
        "ema of .*: x_embedder.proj.bias holds 2 NaN or infinite values of 16",
    ),
    "integers": (
        lambda: BARE() | {"x_embedder.proj.bias": np.zeros(16, np.int64)},
        {},
        "x_embedder.proj.bias holds int64 numbers; expected float32, float16 or bfloat16",
    ),
    "heads unknown": (
        BARE,
        {"num_heads": None},
        "depth 2, width 16, patch 2 are of no known size; give --num_heads",
    ),
    "heads": (BARE, {"num_heads": 3}, "model width 16 is not divisible by its 3 heads"),
    "image size": (
        BARE,
        {"image_size": 100},
        "--image_size is 100; expected a multiple of 8 pixels",
    ),
    "image patch": (BARE, {"image_size": 72}, "input size 9 is not divisible by the patch size 2"),
    "classes": (BARE, {"num_classes": 0}, "--num_classes is 0; expected more than 0"),
    "override": (BARE, {"overrides": [("data.clases", "3")]}, "unknown config key 'data.clases'"),
    "network override": (
        BARE,
        {"overrides": [("model.depth", "3")]},
        "blocks.2.attn.qkv.weight is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    make, options, message = BAD[case]
    path = checkpoints.save(tmp_path / "x.pt", make())
    with pytest.raises(UserError, match=message) as caught:
        from_torch.convert(path, str(tmp_path / "run"), **({"num_heads": 2} | options))
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("keep", [0, 50, 5000])
def test_a_truncated_safetensors_file_is_refused(tmp_path, keep):
    save_file(checkpoints.state_dict(0), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:keep])
    with pytest.raises(UserError, match="x.safetensors is no readable safetensors file"):
        from_torch.convert(str(tmp_path / "x.safetensors"), str(tmp_path / "run"), num_heads=2)
    assert not (tmp_path / "run").exists()


def step_of(run):
    return json.loads((run / "config.json").read_text())["data"]["classes"]


def test_what_is_there_is_kept_unless_told_and_until_the_new_is_whole(tmp_path):
    old = checkpoints.save(tmp_path / "old.pt", checkpoints.state_dict(0, classes=4))
    bad = checkpoints.save(tmp_path / "bad.pt", with_nan(checkpoints.state_dict(0), "pos_embed"))
    new = checkpoints.save(tmp_path / "new.pt", checkpoints.state_dict(0, classes=6))
    run = tmp_path / "run"
    from_torch.convert(old, str(run), num_heads=2)
    with pytest.raises(
        UserError, match="run' exists; give another name, or --overwrite to replace it"
    ):
        from_torch.convert(new, str(run), num_heads=2)
    with pytest.raises(UserError, match="pos_embed holds 2 NaN"):
        from_torch.convert(bad, str(run), num_heads=2, overwrite=True)
    assert step_of(run) == 4 and opened(run)[1] == 0
    from_torch.convert(new, str(run), num_heads=2, overwrite=True)
    assert step_of(run) == 6 and opened(run)[1] == 0
    assert {entry.name for entry in tmp_path.iterdir()} == {"old.pt", "bad.pt", "new.pt", "run"}
    photos = tmp_path / "photos"
    photos.mkdir()
    with pytest.raises(
        UserError, match="is a folder but no workdir, so --overwrite leaves it alone"
    ):
        from_torch.convert(new, str(photos), num_heads=2, overwrite=True)


def test_no_space_is_seen_before_and_survived_in_the_middle(tmp_path, monkeypatch):
    path = checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0))
    with monkeypatch.context() as patch:
        patch.setattr(cli.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
        with pytest.raises(
            UserError, match="run' needs about 10.1 MB, and 0.0 MB are free there; make room"
        ):
            from_torch.convert(path, str(tmp_path / "run"), num_heads=2)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_digests", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        from_torch.convert(path, str(tmp_path / "run"), num_heads=2)
    assert "\n" not in str(caught.value) and [entry.name for entry in tmp_path.iterdir()] == [
        "x.pt"
    ]


def test_the_command_line(tmp_path, monkeypatch, capsys):
    path, run = (
        checkpoints.save(tmp_path / "x.pt", checkpoints.state_dict(0)),
        str(tmp_path / "run"),
    )
    from_torch.main([path, run, "--num_heads", "2", "--config.transport.path=GVP"])
    assert config_lib.load(f"{run}/config.json").transport.path == "GVP"
    said = capsys.readouterr().out
    assert f"sample:   python -m sit_jax.main --mode sample --workdir {run}" in said
    for arguments, message in (
        (
            [path],
            "the following arguments are required: workdir; see python -m convert.from_torch --help",
        ),
        (
            [path, run, "--num_headz=2"],
            "unknown argument '--num_headz=2'; settings are --config.KEY=VALUE",
        ),
        ([path, run, "--num_heads=two"], "argument --num_heads: invalid int value: 'two'"),
        ([path, run, "--num_heads=2"], f"'{run}' exists"),
    ):
        monkeypatch.setattr("sys.argv", ["from_torch", *arguments])
        assert cli.run(from_torch.main) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and re.match(f"error: {re.escape(message)}", lines[0])


def test_raw_weights_of_a_training_checkpoint_alone(tmp_path):
    content = checkpoints.training()
    path = checkpoints.save(tmp_path / "x.pt", without(content, "ema", "opt"))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=2, weights="raw")
    setup = set_up(
        config_lib.load(str(tmp_path / "run" / "config.json"), [("sample.weights", "raw")])
    )
    step, params = restore_weights(setup, epath.Path(tmp_path / "run"), "raw")
    same(params, content["model"], setup.size)
    assert step == 0
