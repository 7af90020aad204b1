"""The way back from PyTorch: what convert.to_torch recorded, and what a file says otherwise."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import from_torch, record, to_torch
from convert.torch_file import Tensor, read_torch_file
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.models.sizes import Size
from tests import checkpoints

GVP = {"transport.path": "GVP"}


def made(tmp_path, size=checkpoints.TINY, flags=(), **settings):
    """Return the content of a file of convert.to_torch at step and count 5, and its config."""
    path = checkpoints.save(tmp_path / "a.pt", checkpoints.training(size) | {"args": {}})
    overrides = [(key.replace("__", "."), str(value)) for key, value in settings.items()]
    from_torch.convert(path, str(tmp_path / "run"), num_heads=size.heads, overrides=overrides)
    to_torch.convert(str(tmp_path / "run"), str(tmp_path / "b.pt"))
    config = config_lib.load(str(tmp_path / "run" / "config.json"))
    return in_arrays(read_torch_file(str(tmp_path / "b.pt"))), config


def in_arrays(content):
    if isinstance(content, dict):
        return {key: in_arrays(value) for key, value in content.items()}
    return np.array(content) if isinstance(content, Tensor) else content


def back(tmp_path, content, **options):
    """Return the config and the step of the workdir that the content becomes."""
    path = checkpoints.save(tmp_path / "c.pt", content)
    from_torch.convert(path, str(tmp_path / "again"), **options)
    (step,) = (p.name for p in (tmp_path / "again" / "checkpoints").iterdir() if p.name.isdigit())
    return config_lib.load(str(tmp_path / "again" / "config.json")), int(step)


def trained_on(content, count):
    """Change the content as PyTorch does when it trains to `count` updates."""
    for entry in content["opt"]["state"].values():
        entry["step"] = np.array(count, np.float32)


CHANGES = {
    "nothing": (lambda c: None, {}, 5, None),
    "more updates": (lambda c: trained_on(c, 10_000), {}, 10_000, "AdamW counts 10000 updates"),
    "a new optimizer": (lambda c: trained_on(c, 2), {}, 2, "at step 2"),
    "rate": (
        lambda c: c["opt"]["param_groups"][0].update(lr=5e-5),
        {"optimizer.learning_rate": 5e-5},
        5,
        "optimizer.learning_rate is 5e-05 in the file, where convert.to_torch recorded 0.0002",
    ),
    "betas and decay": (
        lambda c: c["opt"]["param_groups"][0].update(betas=(0.9, 0.95), weight_decay=0.1),
        {"optimizer.b1": 0.9, "optimizer.b2": 0.95, "optimizer.weight_decay": 0.1},
        5,
        "optimizer.b2 is 0.95 in the file, where convert.to_torch recorded 0.99",
    ),
    "batch, seed and data": (
        lambda c: c["args"].update(global_batch_size=512, global_seed=9, data_path="/other"),
        {"train.batch": 512, "seed": 9, "data.path": "/other"},
        5,
        "train.batch is 512 in the file, where convert.to_torch recorded 256",
    ),
    "path": (lambda c: c["args"].update(path_type="GVP"), GVP, 5, "transport.path is GVP"),
    "objective": (
        lambda c: c["args"].update(prediction="noise", loss_weight="velocity", train_eps=0.01),
        {
            "transport.prediction": "noise",
            "transport.loss_weight": "velocity",
            "transport.train_eps": 0.01,
        },
        5,
        "transport.prediction is noise",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_files_own_values_win_and_are_named(tmp_path, capsys, case):
    change, expected, step, words = CHANGES[case]
    content, config = made(tmp_path, log__every=7)
    change(content)
    capsys.readouterr()
    again, found = back(tmp_path, content)
    assert found == step
    assert {key: new for key, (_, new) in config_lib.changes(config, again).items()} == expected
    printed = capsys.readouterr().out
    if words:
        assert words in printed
    else:
        assert "note" not in printed


def test_the_step_is_ahead_of_the_count_by_the_skipped_updates(tmp_path):
    content, _ = made(tmp_path)
    content["args"]["sit_jax"]["step"] = 8
    trained_on(content, 105)
    assert back(tmp_path, content)[1] == 108


OLD = {
    # (step, count, lr in the file) -> (step, rate, schedule); the record: 600 steps, rate 2e-4
    "skipped updates": (600, 590, 0.0, 600, 2e-4, "cosine"),
    "the rate of the schedule": (300, 300, 1e-4, 300, 2e-4, "cosine"),
    "trained on": (600, 10_000, 0.0, 10_000, 2e-4, "cosine"),
    "with a rate of its own": (300, 10_000, 3e-5, 10_000, 3e-5, "constant"),
}


@pytest.mark.parametrize("case", OLD)
def test_a_record_of_an_earlier_version_lacks_the_count(tmp_path, case):
    step, count, rate, *want = OLD[case]
    content, _ = made(tmp_path, optimizer__schedule="cosine", train__steps=600)
    del content["args"]["sit_jax"]["updates"]
    content["args"]["sit_jax"]["step"] = step
    content["opt"]["param_groups"][0]["lr"] = rate
    trained_on(content, count)
    config, found = back(tmp_path, content)
    assert [found, config.optimizer.learning_rate, config.optimizer.schedule] == want


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"optimizer__schedule": "cosine", "train__steps": 5}, "0"),
        ({"optimizer__schedule": "cosine", "train__steps": 10}, "0.0001"),
        ({"optimizer__warmup_steps": 20}, "5e-05"),
        ({}, None),
    ],
)
def test_pytorch_gets_the_base_rate_and_the_schedule_comes_back(tmp_path, capsys, settings, rate):
    content, config = made(tmp_path, **settings)
    printed = capsys.readouterr().out
    assert content["opt"]["param_groups"][0]["lr"] == 2e-4
    note = "AdamW's lr is optimizer.learning_rate, 0.0002, as PyTorch has no schedule"
    assert (note in printed) == (rate is not None)
    assert rate is None or f"is at {rate}\n" in printed
    assert back(tmp_path, content) == (config, 5)


SPELLED = [
    {"name": "SiT-S/4", "depth": 2, "width": 24, "heads": 6, "patch": None},
    {"name": "SiT-S/2", "depth": 2, "width": 24, "heads": None, "patch": 4},
    {"name": "SiT-XL/4", "depth": 2, "width": 24, "heads": 6, "patch": 4},
    {"name": "SiT-B/8", "depth": 2, "width": 24, "heads": 6, "patch": 4},
]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("model", SPELLED, ids=lambda model: model["name"])
def test_the_size_comes_back_as_it_was_spelled(tmp_path, capsys, model, suffix):
    size = Size(depth=2, width=24, heads=6, patch=4)
    flags = {f"model__{key}": value for key, value in model.items() if value is not None}
    flags |= {f"model__{key}": "none" for key, value in model.items() if value is None}
    content, config = made(tmp_path, size, **flags)
    assert {key: getattr(config.model, key) for key in model} == model
    capsys.readouterr()
    if suffix == "pt":
        assert back(tmp_path, content)[0] == config
    else:
        out = str(tmp_path / "d.safetensors")
        to_torch.convert(str(tmp_path / "run"), out)
        from_torch.convert(out, str(tmp_path / "again"))
        assert config_lib.load(str(tmp_path / "again" / "config.json")) == config
    assert "another network" not in capsys.readouterr().out
    again = back_with_heads(tmp_path, content, 3)
    assert again.model.heads == 3 and again.model.patch in (4, None)


def back_with_heads(tmp_path, content, heads):
    path = checkpoints.save(tmp_path / "e.pt", content)
    from_torch.convert(path, str(tmp_path / "heads"), num_heads=heads)
    return config_lib.load(str(tmp_path / "heads" / "config.json"))


DAMAGED = [
    5,
    {"step": 5},
    {"step": "5", "config": {}},
    {"step": 5, "config": 7},
    {"step": 5, "config": {"model": 7}},
    {"step": 5, "config": {"model": {"depth": "x"}}},
    {"step": 5, "config": {"model": {"name": "SiT-Z/2"}}},
    {"step": 5, "config": {"optimizer": {"b1": None}}},
    {"step": 5, "config": {"optimizer": {"schedule": "linear"}}},
    {"step": 5, "config": {}, "updates": 1.5},
]


@pytest.mark.parametrize("value", DAMAGED, ids=str)
def test_a_damaged_record_is_refused_in_one_line(value):
    with pytest.raises(UserError, match="x.pt: the record .* is damaged") as caught:
        record.read("x.pt", value)
    assert "\n" not in str(caught.value)


def test_a_record_in_safetensors_has_no_count(tmp_path):
    content, config = made(tmp_path)
    out = str(tmp_path / "d.safetensors")
    to_torch.convert(str(tmp_path / "run"), out)
    file = safe_open(out, "numpy")
    assert '"updates": null' in file.metadata()["sit_jax"]
    # And a record of an earlier version, with nothing but step and config.
    written = json.dumps({"step": 5, "config": dataclasses.asdict(config)})
    save_file(content["ema"], tmp_path / "old.safetensors", {"sit_jax": written})
    from_torch.convert(str(tmp_path / "old.safetensors"), str(tmp_path / "again"))
    assert config_lib.load(str(tmp_path / "again" / "config.json")) == config
