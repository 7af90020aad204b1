"""The way back from PyTorch: what convert.to_torch recorded, and what a file says otherwise."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import from_torch, record, to_torch
from convert.torch_file import Tensor, read_torch_file
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.models.sizes import Size
from sit_jax.settings import get
from tests import checkpoints

GVP = {"transport.path": "GVP"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function of (size, settings): a file of convert.to_torch at step and count 5.

    It returns the file's content, the config of the run, the run, and what was printed.
    """

    @functools.cache
    def make(size, settings):
        folder = tmp_path_factory.mktemp("made")
        path = checkpoints.save(folder / "a.pt", checkpoints.training(size) | {"args": {}})
        overrides = [(key.replace("__", "."), str(value)) for key, value in settings]
        run = folder / "run"
        from_torch.convert(path, str(run), num_heads=size.heads, overrides=overrides)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            to_torch.convert(str(run), str(folder / "b.pt"))
        config = config_lib.load(str(run / "config.json"))
        return in_arrays(read_torch_file(str(folder / "b.pt"))), config, run, printed.getvalue()

    def copied(size=checkpoints.TINY, **settings):
        content, *rest = make(size, tuple(settings.items()))
        return copy.deepcopy(content), *rest

    return copied


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
def test_the_files_own_values_win_and_are_named(tmp_path, made, capsys, case):
    change, expected, step, words = CHANGES[case]
    content, config, *_ = made(log__every=7)
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


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("transport.path", "GVP", "Linear"),
        ("transport.prediction", "noise", "velocity"),
        ("model.qk_norm", "True", "False"),
        ("train.label_dropout", "0.2", "0.1"),
    ],
)
def test_a_flag_that_contradicts_the_file_wins_and_is_named(
    tmp_path, made, capsys, key, value, was
):
    content, *_ = made()
    config, _ = back(tmp_path, content, overrides=[(key, value)])
    assert str(get(config, key)) == value
    words = f"note: --config.{key} is {value}, but the file's weights were trained with {was}"
    assert words in capsys.readouterr().out
    # The same value, and a setting that may change, are no contradictions.
    shutil.rmtree(tmp_path / "again")
    back(tmp_path, content, overrides=[(key, was), ("train.batch", "8")])
    assert "--config." not in capsys.readouterr().out.replace("--config.data.path", "")


def test_the_step_is_ahead_of_the_count_by_the_skipped_updates(tmp_path, made):
    content, *_ = made()
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
def test_a_record_of_an_earlier_version_lacks_the_count(tmp_path, made, case):
    step, count, rate, *want = OLD[case]
    content, *_ = made(optimizer__schedule="cosine", train__steps=600)
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
def test_pytorch_gets_the_base_rate_and_the_schedule_comes_back(tmp_path, made, settings, rate):
    content, config, _, printed = made(**settings)
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


def test_a_run_of_epochs_comes_back_as_one(tmp_path, made):
    settings = {"train__steps": "none", "train__epochs": 2, "optimizer__schedule": "cosine"}
    content, config, _, printed = made(**settings)
    assert "PyTorch has no schedule" not in printed  # its steps are known only with the data
    found, step = back(tmp_path, content)
    assert step == 5 and found == config
    assert (found.train.steps, found.train.epochs) == (None, 2.0)


@pytest.mark.parametrize("model", SPELLED, ids=lambda model: model["name"])
def test_the_size_comes_back_as_it_was_spelled(tmp_path, made, capsys, model):
    size = Size(depth=2, width=24, heads=6, patch=4)
    settings = {f"model__{key}": "none" if value is None else value for key, value in model.items()}
    content, config, *_ = made(size, **settings)
    assert {key: getattr(config.model, key) for key in model} == model
    assert back(tmp_path, content)[0] == config
    assert "another network" not in capsys.readouterr().out


def test_other_heads_than_the_recorded_ones_are_spelled_anew(tmp_path, made):
    size = Size(depth=2, width=24, heads=6, patch=4)
    content, config, *_ = made(size, **{f"model__{k}": v or "none" for k, v in SPELLED[0].items()})
    model = back(tmp_path, content, num_heads=3)[0].model
    assert (model.heads, model.patch, model.depth, model.width) == (3, 4, 2, 24)


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


def test_a_record_in_safetensors_has_no_count(tmp_path, made):
    size = Size(depth=2, width=24, heads=6, patch=4)
    content, config, run, _ = made(
        size, **{f"model__{k}": v or "none" for k, v in SPELLED[0].items()}
    )
    out = str(tmp_path / "new.safetensors")
    to_torch.convert(str(run), out)
    assert '"updates": null' in safe_open(out, "numpy").metadata()["sit_jax"]
    # And a record of an earlier version, with nothing but step and config.
    written = json.dumps({"step": 5, "config": dataclasses.asdict(config)})
    old = str(tmp_path / "old.safetensors")
    save_file(content["ema"], old, {"sit_jax": written})
    for number, path in enumerate((out, old)):
        from_torch.convert(path, str(tmp_path / f"again{number}"))
        assert config_lib.load(str(tmp_path / f"again{number}" / "config.json")) == config
