"""to_torch: its files convert back bitwise, and load into the reference's modules and AdamW."""

import errno
import json

import jax
import numpy as np
import optax
import pytest
from etils import epath

from convert import cli, from_torch, to_torch
from convert.torch_file import Tensor, read_torch_file
from convert.torch_writer import TorchWriter
from sit_jax import config as config_lib
from sit_jax import manifest
from sit_jax.errors import UserError
from sit_jax.jobs.setup import Setup
from sit_jax.models.sizes import Size
from tests import checkpoints, goldens

SIZES = {
    "tiny": (checkpoints.TINY, {}),
    "learn_sigma": (checkpoints.TINY, {"learn_sigma": True, "classes": 1}),
    "XL's heads, patch 4": (
        Size(depth=3, width=64, heads=16, patch=4),
        {"classes": 1000, "learn_sigma": True},
    ),
    "S's heads, patch 8": (
        Size(depth=1, width=24, heads=6, patch=8),
        {"channels": 3, "side": 16, "classes": 7},
    ),
}


def bits(content):
    """Return a file's content with each tensor as (shape, dtype, bytes)."""
    if isinstance(content, dict):
        return {key: bits(value) for key, value in content.items()}
    if isinstance(content, Tensor):
        return content.shape, str(content.dtype), content.read().tobytes()
    return content


@pytest.mark.parametrize("case", SIZES)
def test_from_to_from_is_the_identity(tmp_path, case):
    """Weights, EMA, moments, count and optimizer settings pass through two workdirs."""
    size, network = SIZES[case]
    path = checkpoints.save(tmp_path / "a.pt", checkpoints.training(size, **network))
    from_torch.convert(path, str(tmp_path / "run"), num_heads=size.heads)
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"))
    from_torch.convert(
        str(tmp_path / "b.pt"), str(tmp_path / "again")
    )  # which has a record of the heads
    to_torch.convert(str(tmp_path / "again"), str(tmp_path / "c.pt"))
    a, b, c = (bits(read_torch_file(str(tmp_path / f"{name}.pt"))) for name in "abc")
    assert b == c
    assert (b["model"], b["ema"], b["opt"]["state"]) == (a["model"], a["ema"], a["opt"]["state"])
    assert list(b["model"]) == list(a["model"]) and 0 not in b["opt"]["state"]
    group, want = b["opt"]["param_groups"][0], a["opt"]["param_groups"][0]
    assert {key: group[key] for key in want} == want
    assert (b["args"]["path_type"], b["args"]["global_seed"], b["args"]["data_path"]) == (
        "GVP",
        7,
        "photos",
    )
    records = [(tmp_path / name / "config.json").read_text() for name in ("run", "again")]
    assert records[0] == records[1]


def test_the_step_and_every_setting_come_back(tmp_path):
    """Also those that the reference has no place for.

    Here AdamW's count is behind the step, as after skipped updates.
    """
    path = checkpoints.save(tmp_path / "a.pt", checkpoints.training(count=5))
    run = tmp_path / "run"
    settings = {
        "optimizer.clip_norm": "1.0",
        "optimizer.warmup_steps": "10",
        "transport.times": "logit-normal",
    }
    from_torch.convert(path, str(run), num_heads=2, overrides=list(settings.items()))
    config = config_lib.load(str(run / "config.json"))
    later = (run / "checkpoints" / "5").rename(run / "checkpoints" / "8")
    manifest.write(epath.Path(later), 8, json.loads((run / "run.json").read_text())["run"])
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"))
    from_torch.convert(str(tmp_path / "b.pt"), str(tmp_path / "again"))
    assert config_lib.load(str(tmp_path / "again" / "config.json")) == config
    assert (tmp_path / "again" / "checkpoints" / "8").exists()
    opt = read_torch_file(str(tmp_path / "b.pt"))["opt"]
    assert {float(np.asarray(entry["step"])) for entry in opt["state"].values()} == {5.0}
    assert opt["param_groups"][0]["lr"] == 2e-4  # the base rate: the warm-up is half way up to it


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(("weights", "entry"), [("ema", "ema"), ("raw", "model")])
def test_a_single_set_of_weights(tmp_path, suffix, weights, entry):
    content = checkpoints.training()
    from_torch.convert(
        checkpoints.save(tmp_path / "a.pt", content), str(tmp_path / "run"), num_heads=2
    )
    out = str(tmp_path / f"b.{suffix}")
    to_torch.convert(str(tmp_path / "run"), out, weights=weights)
    # safetensors has a place for the record, a bare state dict does not.
    heads = None if suffix == "safetensors" else 2
    from_torch.convert(out, str(tmp_path / "again"), num_heads=heads)
    # A workdir without moments becomes a bare state dict.
    to_torch.convert(str(tmp_path / "again"), str(tmp_path / "c.pt"))
    back = read_torch_file(str(tmp_path / "c.pt"))
    assert list(back) == list(content[entry])
    for name, want in content[entry].items():
        np.testing.assert_array_equal(back[name], want, err_msg=name)


@pytest.mark.torch
def test_the_reference_loads_a_training_checkpoint(tmp_path):
    """Use torch.load with its defaults, both load_state_dict, and then take a step."""
    torch = pytest.importorskip("torch")
    from tests import torch_sit

    from_torch.convert(
        str(goldens.FOLDER / "sit_train_ckpt.pt"), str(tmp_path / "run"), num_heads=4
    )
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"))
    ours = torch.load(tmp_path / "b.pt")
    theirs = torch.load(goldens.FOLDER / "sit_train_ckpt.pt", weights_only=False)
    optimizers = []
    for content in (ours, theirs):
        model = torch_sit.SiT(
            **vars(goldens.SIZE), input_size=8, channels=4, classes=goldens.CLASSES
        )
        model.load_state_dict(content["ema"], strict=True)
        model.load_state_dict(content["model"], strict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1.0)
        optimizer.load_state_dict(content["opt"])
        for parameter in list(model.parameters())[1:]:
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        optimizer.step()
        optimizers.append((model, optimizer))
    (model, optimizer), (want, want_optimizer) = optimizers
    assert optimizer.state_dict()["param_groups"] == want_optimizer.state_dict()["param_groups"]
    for (name, tensor), expected in zip(
        model.state_dict().items(), want.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name


@pytest.mark.torch
def test_the_reference_loads_safetensors(tmp_path):
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tests import torch_sit

    from_torch.convert(str(goldens.FOLDER / "sit_bare.pt"), str(tmp_path / "run"), num_heads=4)
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.safetensors"))
    model = torch_sit.SiT(
        **vars(goldens.SIZE), input_size=8, channels=4, classes=goldens.CLASSES, learn_sigma=True
    )
    assert list(model.state_dict()) == list(read_torch_file(str(goldens.FOLDER / "sit_bare.pt")))
    model.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)


@pytest.fixture
def run(tmp_path):
    from_torch.convert(
        checkpoints.save(tmp_path / "a.pt", checkpoints.state_dict(0)),
        str(tmp_path / "run"),
        num_heads=2,
    )
    return tmp_path / "run"


def test_bad_input_is_one_line_and_leaves_nothing(run, monkeypatch, capsys):
    parent = run.parent
    (parent / "existing.pt").write_bytes(b"old")
    config = config_lib.load(str(run / "config.json"), [("model.qk_norm", "True")])
    cases = [
        (str(parent / "nothing"), "b.pt", "is not a workdir; expected config.json and checkpoints"),
        (str(run), "b.bin", "ends in '.bin'; expected .pt or .safetensors"),
        (
            str(run),
            "existing.pt",
            "existing.pt' already exists; give another name, or --overwrite to replace it",
        ),
    ]
    for workdir, out, message in cases:
        with pytest.raises(UserError, match=message):
            to_torch.convert(workdir, str(parent / out))
    assert (parent / "existing.pt").read_bytes() == b"old"
    to_torch.convert(str(run), str(parent / "existing.pt"), overwrite=True)
    assert len(read_torch_file(str(parent / "existing.pt"))) == 32

    def full(writer, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TorchWriter, "tensor", full)
        patch.setattr(
            "sys.argv", ["to_torch", str(run), str(parent / "existing.pt"), "--overwrite"]
        )
        assert cli.run(to_torch.main) == 2
    error = capsys.readouterr().err
    assert "existing.pt' could not be written (No space left on device); make room" in error
    assert error.count("\n") == 1
    assert len(read_torch_file(str(parent / "existing.pt"))) == 32  # still the previous one
    (run / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(
        UserError, match="has model.qk_norm, for which the PyTorch SiT has no tensors"
    ):
        to_torch.convert(str(run), str(parent / "b.pt"))
    assert {entry.name for entry in parent.iterdir()} == {"a.pt", "run", "existing.pt"}


OTHER_OPTIMIZERS = {
    "muon": (lambda: optax.contrib.muon(1e-3), "ScaleByAdamState and MuonState"),
    "momentum": (lambda: optax.sgd(1e-3, momentum=0.9), "TraceState"),
    "sgd": (lambda: optax.sgd(1e-3), "empty"),
    "adam and momentum": (
        lambda: optax.chain(optax.adamw(1e-3), optax.trace(0.9)),
        "ScaleByAdamState and TraceState",
    ),
    "adamw of some parameters": (
        lambda: optax.masked(
            optax.adamw(1e-3), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        ),
        "ScaleByAdamState",
    ),
}


@pytest.mark.parametrize("case", OTHER_OPTIMIZERS)
def test_an_optimizer_other_than_adamw_is_refused_and_its_weights_are_not(
    tmp_path, monkeypatch, case
):
    make_optimizer, states = OTHER_OPTIMIZERS[case]
    content = checkpoints.training()
    from_torch.convert(
        checkpoints.save(tmp_path / "a.pt", content), str(tmp_path / "run"), num_heads=2
    )
    monkeypatch.setattr(Setup, "optimizer", property(lambda setup: make_optimizer()))
    with pytest.raises(UserError) as caught:
        to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"))
    assert str(caught.value) == (
        f"the optimizer state of '{tmp_path}/run' is {states}; expected AdamW's ScaleByAdamState "
        "of every parameter; write only the weights with --weights ema or raw"
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pt", "run"}
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"), weights="ema")
    assert bits(read_torch_file(str(tmp_path / "b.pt"))) == bits(
        read_torch_file(str(tmp_path / "a.pt"))["ema"]
    )


def test_a_damaged_checkpoint_is_not_exported(run):
    (run / "checkpoints" / "0" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        to_torch.convert(str(run), str(run.parent / "b.pt"))
