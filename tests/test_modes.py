"""What a mode needs of a run and of the command line: null labels, batches, meshes and settings."""

import json

import pytest

from sit_jax import command_line, sharding
from sit_jax import config as config_lib
from sit_jax.jobs.table import JOBS
from sit_jax.laws import in_group
from sit_jax.settings import Config
from tests.commands import (
    DIGITS,
    ROOT,
    TINY,
    flags,
    record_as_trained_with,
    refusal,
    snapshot,
    succeed,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")

NO_NULL = "train.label_dropout is 0, so that no null label is trained, but "


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "sample.cfg_scale 1.5 guides away from it; set sample.cfg_scale=1, or sample.guide"),
        ({"sample__cfg_scale": 4}, "sample.cfg_scale 4 guides away from it"),
        (
            {"sample__cfg_scale": 1, "sweep__cfg_scales": "1,2"},
            "sweep.cfg_scales 2 guides away from it; set sweep.cfg_scales=1",
        ),
        (
            {"sample__cfg_scale": 1, "likelihood__labels": "null"},
            "likelihood.labels 'null' evaluates it; set likelihood.labels=data",
        ),
        (
            {"sample__cfg_scale": 1, "excess__labels": "null"},
            "excess.labels 'null' evaluates it; set excess.labels=data",
        ),
    ],
)
def test_a_null_label_that_would_not_be_trained_is_refused_before_training(
    tmp_path, settings, words
):
    message = refusal(
        *TINY, *flags(train__label_dropout=0, **settings), "--workdir", tmp_path / "new"
    )
    assert NO_NULL + words in message
    assert message.endswith("or train with a label_dropout such as 0.1\n")
    assert snapshot(tmp_path) == {}


def test_configs_do_not_walk_into_it(tmp_path):
    for name in ("folder", "digits", "latents"):
        config = ("--config", f"{ROOT}/configs/{name}.py", *flags(train__label_dropout=0))
        assert NO_NULL + "sample.cfg_scale 1.5" in refusal(*config, "--workdir", tmp_path / "new")
    assert snapshot(tmp_path) == {}


def test_a_run_without_label_dropout_samples_unguided_and_cannot_pretend(run_copy):
    """The guided sampling of a run of an earlier version, whose config was accepted then."""
    record_as_trained_with(run_copy, train__label_dropout=0.0)
    before = snapshot(run_copy)
    sample = ("--workdir", run_copy, "--mode", "sample")
    assert NO_NULL in refusal(*sample)
    assert NO_NULL in refusal(*sample, *flags(sample__cfg_scale=4))
    assert "train.label_dropout is 0.1 but was 0.0" in refusal(
        *sample, *flags(train__label_dropout=0.1)
    )
    assert snapshot(run_copy) == before
    succeed(*sample, *flags(sample__cfg_scale=1))
    # Modes that use no guidance are not stopped by the recorded one.
    likelihood = flags(likelihood__count=8, likelihood__solver="euler", likelihood__steps=1)
    succeed("--workdir", run_copy, "--mode", "likelihood", *likelihood)
    assert NO_NULL in refusal(
        "--workdir", run_copy, "--mode", "likelihood", *flags(likelihood__labels="null")
    )
    guided = flags(sample__guide=run_copy, sample__cfg_scale=2)
    succeed(*sample, *guided)


@pytest.mark.parametrize("mode", ["sample", "invert", "quality", "sweep", "likelihood", "excess"])
def test_a_mode_checks_only_the_batches_that_it_uses(tmp_path, monkeypatch, mode):
    """Without a run, the check after those of the batches is the one for checkpoints."""
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 3)
    key = {"likelihood": "likelihood.batch", "excess": "excess.batch"}.get(mode, "sample.batch")
    command = ["--config", DIGITS, "--workdir", tmp_path / "new", "--mode", mode]
    if mode == "excess":
        command += flags(excess__samples=0)  # which would use sample.batch too
    assert f"{key} = 8 is not divisible by the 3 devices" in refusal(*command, f"--config.{key}=8")
    assert "has no checkpoints; train first" in refusal(*command, f"--config.{key}=9")


def test_training_without_sheets_does_not_check_the_samplers_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 3)
    command = (*TINY, "--workdir", tmp_path / "new", *flags(train__batch=9, data__classes=11))
    assert "sample.batch = 8 is not divisible" in refusal(*command)
    assert "data.classes is 11" in refusal(*command, *flags(log__sheet_every=0))


@pytest.mark.parametrize(
    ("mode", "axis"),
    [("train", "fsdp"), ("sample", "fsdp"), ("sample", "data"), ("likelihood", "tensor")],
)
def test_a_mesh_of_another_machine_names_the_flags_that_fit_this_one(run_copy, mode, axis):
    recorded = run_copy / "config.json"
    values = json.loads(recorded.read_text())
    values["mesh"] = {"data": -1, "fsdp": 1, "tensor": 1} | {axis: 8}
    recorded.write_text(json.dumps(values))
    command = ("--workdir", run_copy, "--mode", mode)
    remedy = "--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1"
    message = refusal(*command)
    assert "x 1 does not use 1 devices" in message or "x 8 does not use 1 devices" in message
    assert f"{remedy} fits any number" in message
    if axis == "fsdp":
        succeed(*command, *remedy.split())


@pytest.mark.parametrize(
    ("mode", "key", "modes"),
    [
        ("sample", "train.batch", "train, preflight"),
        (
            "sample",
            "data.path",
            "train, evaluate, stats, sweep, invert, likelihood, quality, excess, encode, data, "
            "preflight",
        ),
        (
            "sweep",
            "sample.cfg_scale",
            "train, sample, evaluate, invert, quality, excess, preflight",
        ),
        ("invert", "sample.labels", "train, sample, evaluate, quality, preflight"),
        ("likelihood", "train.steps", "train, preflight"),
        ("quality", "likelihood.batch", "train, likelihood"),
        ("preflight", "checkpoint.every", "train"),
    ],
)
def test_a_flag_that_a_mode_does_not_use_is_named_with_the_modes_that_do(mode, key, modes):
    assert command_line.unused(mode, [(key, "1")]) == [
        f"note: --config.{key} has no effect on --mode {mode}; it is for --mode {modes}"
    ]


def test_used_flags_get_no_line_and_unused_ones_one_each(run_copy):
    sample = ("--workdir", run_copy, "--mode", "sample")
    assert "note:" not in succeed(*sample, *flags(sample__seed=1, mesh__data=1))
    out = succeed(*sample, *flags(sample__seed=2, train__batch=7, optimizer__b1=0.5))
    assert [line.split(" has no ")[0] for line in out.splitlines() if "note:" in line] == [
        "note: --config.train.batch",
        "note: --config.optimizer.b1",
    ]


def test_every_declared_use_is_a_setting_or_a_section():
    keys = set(config_lib.flatten(Config()))
    sections = {key.partition(".")[0] + "." for key in keys if "." in key}
    groups = [job.uses for job in JOBS.values() if job.uses is not None]
    for group in (*groups, config_lib.CHANGEABLE, config_lib.NETWORK, config_lib.SPACE):
        assert set(group) <= keys | sections


def test_a_group_lists_keys_exactly_and_sections_completely():
    group = ("train.steps", "sample.", "seed")
    assert all(in_group(key, group) for key in ("train.steps", "sample.x", "seed"))
    names = ("train.steps_more", "train.step", "samples.x", "seed.x", "train.")
    assert not any(in_group(name, group) for name in names)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mode", "sample"],
        ["--workdir=w"],
        ["--search"],
        ["--config.train.steps=3"],
        ["--nonsense"],
    ],
)
def test_help_on_settings_refuses_flags_that_it_would_ignore(arguments):
    message = refusal("--help-config", "sample", *arguments)
    name = arguments[0].partition("=")[0]
    assert f"--help-config only prints, and does nothing with {name}; give it without" in message
