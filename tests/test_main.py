"""main on a tiny run: train, continue, fork, sample, and show help."""

import contextlib
import gzip
import io
import json
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax import main, manifest, runtime, settings_help
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import open_checkpoints
from sit_jax.latents import pixels
from sit_jax.settings import Config
from tests.commands import (
    ROOT,
    TINY,
    call,
    flags,
    pictures,
    refusal,
    rows,
    snapshot,
    succeed,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """Return a copy of the run with samples, and the folder of the samples."""
    workdir = pathlib.Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("sampled") / "run"))
    assert "sampling 8 of 8 images from step 4" in succeed("--workdir", workdir, "--mode", "sample")
    (folder,) = (workdir / "samples").iterdir()
    return workdir, folder


def test_a_run_prints_its_devices_parameters_steps_and_next_command(trained):
    _, out = trained
    assert out.startswith("devices: ")
    assert re.search(r"blocks/attn/qkv/kernel +\| \(1, 16, 3, 2, 8\)", out)
    assert "Total: 10,560" in out
    assert "training from step 0 to 4" in out
    lines = re.findall(r"^step (\d)/4  epoch  (\S+)  loss ", out, re.M)
    assert lines == [("1", "0.01"), ("2", "0.02"), ("3", "0.03"), ("4", "0.04")]
    assert f"sample with: python -m sit_jax.main --mode sample --workdir {trained[0]}" in out


def test_a_run_leaves_its_config_log_checkpoints_and_sheets(trained):
    workdir, _ = trained
    config = config_lib.load(str(workdir / "config.json"))
    assert (config.train.steps, config.model.width, config.optimizer.schedule) == (4, 16, "cosine")
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]
    speeds = [row["images_per_s"] for row in rows(workdir) if "images_per_s" in row]
    assert speeds  # a line right after another, because a save came between, has none
    for number in [row[name] for row in rows(workdir) for name in ("loss", "grad_norm")] + speeds:
        assert math.isfinite(number) and number > 0
    half_cosine = 0.01 * (1 + np.cos(np.pi * np.arange(4) / 4))
    learning_rates = [row["learning_rate"] for row in rows(workdir)]
    np.testing.assert_allclose(learning_rates, half_cosine, rtol=1e-5)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert list((workdir / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (workdir / "sheets").iterdir()) == [
        "step_00000002.png",
        "step_00000004.png",
    ]
    sheet = Image.open(workdir / "sheets" / "step_00000004.png")
    # 5 columns and 2 rows of images of 3 x 8 pixels, with gaps of 2.
    assert sheet.mode == "L" and sheet.size == (5 * 26 + 2, 2 * 26 + 2)
    assert np.asarray(sheet)[:26].std() > 10


def test_a_finished_run_says_so_and_changes_no_file(trained):
    before = snapshot(trained[0])
    for arguments in ([], TINY):
        assert "is already at step 4 of 4; raise train.steps" in succeed(
            "--workdir", trained[0], *arguments
        )
    assert snapshot(trained[0]) == before


def test_the_workdir_is_enough_to_continue_a_run(run_copy, trained):
    out = succeed("--workdir", run_copy, "--config.train.steps", "6", "--config.log.sheet_every=0")
    assert "training from step 4 to 6" in out
    assert [row["step"] for row in rows(run_copy)] == [1, 2, 3, 4, 5, 6]
    assert rows(run_copy)[:4] == rows(trained[0])
    # The last two are kept.
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["4", "6"]
    assert not (run_copy / "sheets" / "step_00000006.png").exists()
    config = config_lib.load(str(run_copy / "config.json"))
    assert (config.train.steps, config.log.sheet_every, config.model.width) == (6, 0, 16)


def test_changed_settings_are_printed_and_recorded(run_copy):
    changes = flags(train__steps=6, log__every=3, log__sheet_every=0, optimizer__learning_rate=0.01)
    out = succeed("--workdir", run_copy, *changes)
    printed = re.findall(r"^(\S+) changes from (\S+) to (\S+) at step 4$", out, re.M)
    assert printed == [
        ("train.steps", "4", "6"),
        ("optimizer.learning_rate", "0.02", "0.01"),
        ("log.every", "1", "3"),
        ("log.sheet_every", "2", "0"),
    ]
    assert [row["step"] for row in rows(run_copy)] == [1, 2, 3, 4, 6]
    rate_of_step_6 = 0.01 * 0.5 * (1 + np.cos(np.pi * 5 / 6))
    np.testing.assert_allclose(rows(run_copy)[-1]["learning_rate"], rate_of_step_6, rtol=1e-5)
    history = run_copy / "config_changes.jsonl"
    recorded = {
        "train.steps": [4, 6],
        "optimizer.learning_rate": [0.02, 0.01],
        "log.every": [1, 3],
        "log.sheet_every": [2, 0],
    }
    assert [json.loads(line) for line in history.read_text().splitlines()] == [
        {"step": 4, "changes": recorded}
    ]

    succeed("--workdir", run_copy, "--config.train.steps=7")  # the others stay as recorded
    last = json.loads(history.read_text().splitlines()[1])
    assert last == {"step": 6, "changes": {"train.steps": [6, 7]}}


def test_sampling_may_change_every_setting_but_the_networks(run_copy):
    changes = flags(
        train__batch=16, optimizer__b1=0.5, precision__matmul="high", seed=3, data__flip=True
    )
    assert "sampling 8 of 8 images from step 4" in succeed(
        "--workdir", run_copy, "--mode", "sample", *changes
    )
    assert config_lib.load(str(run_copy / "config.json")).train.batch == 8  # the run keeps its own


def arrays(workdir, step, item):
    """Restore one item of a checkpoint."""
    config = config_lib.load(str(workdir / "config.json"))
    with open_checkpoints(config, workdir) as checkpoints:
        return checkpoints.restore(step, {item: set_up(config).abstract_state.items()[item]})[item]


def test_a_fork_is_a_new_run_from_the_same_weights(trained, tmp_path):
    source = trained[0]
    fork = tmp_path / "fork"
    before = snapshot(source)
    changes = flags(
        transport__loss_weight="none",
        train__label_dropout=0.5,
        train__steps=2,
        seed=5,
        log__sheet_every=0,
        optimizer__clip_norm=1,
        checkpoint__keep_last=5,
    )
    out = succeed("--workdir", source, "--fork", fork, *changes)
    assert f"forked step 4 of {source} into {fork}" in out and "training from step 0 to 2" in out
    for item in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, arrays(fork, 0, item), arrays(source, 4, item))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(arrays(fork, 0, "opt_state")))
    assert [row["step"] for row in rows(fork)] == [1, 2]
    assert config_lib.load(str(fork / "config.json")).train.label_dropout == 0.5
    assert snapshot(source) == before

    finished_fork = snapshot(fork)
    message = refusal("--workdir", source, "--fork", fork, *changes)
    assert f"--fork '{fork}' holds a run already; give a new folder" in message
    assert snapshot(fork) == finished_fork
    assert "is already at step 2 of 2" in succeed("--workdir", fork)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            flags(model__width=32),
            r"checkpoint 4: params belongs to another model: \S+ has shape \(1, 96\) in the "
            r"checkpoint and \(1, 192\)",
        ),
        (
            flags(model__qk_norm=True),
            r"checkpoint 4: params belongs to another model: blocks/attn/\S+ has shape None in the "
            r"checkpoint and ",
        ),
        (flags(data__classes=11), "data.classes is 11, but the digits source has 10 classes"),
        (["--mode", "sample"], "--fork is for --mode train, not sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_fork_writes_nothing(trained, tmp_path, arguments, words):
    before = snapshot(trained[0])
    message = refusal("--workdir", trained[0], "--fork", tmp_path / "fork", *arguments)
    assert re.search(words, message)
    assert snapshot(trained[0]) == before and snapshot(tmp_path) == {}


def test_a_fork_needs_a_checkpoint(run_copy, tmp_path):
    (run_copy / "checkpoints" / "2" / "manifest.json").unlink()
    (run_copy / "checkpoints" / "4" / "manifest.json").unlink()
    before = snapshot(tmp_path)
    status, _, err = call("--workdir", run_copy, "--fork", tmp_path / "fork")
    assert status == 2
    assert f"error: --workdir '{run_copy}' holds no complete checkpoint to fork from" in err
    assert snapshot(tmp_path) == before
    shutil.rmtree(run_copy / "checkpoints")
    before = snapshot(tmp_path)
    assert "has no checkpoints to fork from" in refusal(
        "--workdir", run_copy, "--fork", tmp_path / "fork"
    )
    assert snapshot(tmp_path) == before


def test_a_profile_is_a_trace_of_the_steps(tmp_path):
    steps_at_stop = []
    stop_trace = jax.profiler.stop_trace

    def record_step_and_stop():
        steps_at_stop.append(len(rows(tmp_path / "run")))  # one row is logged per step
        stop_trace()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "stop_trace", record_step_and_stop)
        succeed(
            *TINY, "--config.log.sheet_every=0", "--workdir", tmp_path / "run", "--profile", "2:3"
        )
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    train_steps = [
        event
        for event in events
        if "train_step" in event.get("name", "") and event.get("ph") == "X"
    ]
    assert steps_at_stop == [2] and train_steps
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_an_update_that_is_not_finite_ends_the_run_with_one_line(run_copy, monkeypatch):
    before = snapshot(run_copy / "checkpoints")
    normalise = pixels.normalise
    monkeypatch.setattr(pixels, "normalise", lambda images: normalise(images) * np.nan)
    message = refusal("--workdir", run_copy, "--config.train.steps=6")
    assert message.startswith(
        "error: step 5: loss nan and gradient norm nan are not both finite; the last checkpoint is"
    )
    assert snapshot(run_copy / "checkpoints") == before


def test_a_last_save_that_fails_is_one_line(run_copy, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = snapshot(run_copy / "checkpoints" / "4")
    monkeypatch.setattr(manifest, "write", fail)
    message = refusal("--workdir", run_copy, *flags(train__steps=5, checkpoint__keep_last=1))
    assert "error: checkpoint 5 could not be saved in" in message
    assert "No space left on device" in message
    assert snapshot(run_copy / "checkpoints" / "4") == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(run_copy, trained):
    manifest = run_copy / "checkpoints" / "4" / "manifest.json"
    manifest.unlink()
    warning = (
        f"warning: checkpoint {manifest.parent} is not used: its manifest is missing, so the save "
        "did not finish\n"
    )
    for mode, words in (
        ("sample", "images from step 2 into"),
        ("train", "training from step 2 to 4"),
    ):
        status, out, err = call("--workdir", run_copy, "--mode", mode)
        assert (status, err) == (0, warning) and words in out
    assert rows(run_copy)[3]["loss"] == rows(trained[0])[3]["loss"] and len(rows(run_copy)) == 4
    for item in ("params", "ema"):
        jax.tree.map(
            np.testing.assert_array_equal, arrays(run_copy, 4, item), arrays(trained[0], 4, item)
        )


def test_samples_are_pngs_a_sheet_and_their_settings(sampled):
    _, folder = sampled
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["images", "settings.json", "sheet.png", "summary.json"]
    )
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        f"{i:06d}.png" for i in range(8)
    ]
    images = pictures(folder)
    assert all(image.shape == (8, 8) for image in images.values())
    assert len({image.tobytes() for image in images.values()}) == 8
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    np.testing.assert_array_equal(sheet[2:26:3, 28:52:3], images["000001.png"])
    settings = json.loads((folder / "settings.json").read_text())
    sample = {"weights": "ema", "solver": "heun", "steps": 2, "cfg_scale": 1.5, "seed": 0}
    assert settings["step"] == 4 and len(settings["checkpoint"]) == 16
    assert sample.items() <= settings["sample"].items()
    assert settings["transport"]["path"] == "Linear"


def test_existing_samples_are_not_drawn_again(sampled):
    workdir, folder = sampled
    before = snapshot(workdir)
    written_at = {path: path.stat().st_mtime_ns for path in folder.glob("images/0*.png")}
    assert "sampling 0 of 8" in succeed("--workdir", workdir, "--mode", "sample")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("images/0*.png")} == written_at
    assert snapshot(workdir) == before


def test_a_deleted_sample_is_drawn_again_byte_for_byte(sampled):
    workdir, folder = sampled
    before = snapshot(workdir)
    (folder / "images" / "000003.png").unlink()
    assert "sampling 1 of 8" in succeed("--workdir", workdir, "--mode", "sample")
    assert snapshot(workdir) == before


@pytest.mark.parametrize("change", [{"weights": "raw"}, {"solver": "dopri5"}])
def test_other_settings_write_other_samples_beside_the_first(sampled, tmp_path, change):
    workdir = pathlib.Path(shutil.copytree(sampled[0], tmp_path / "run"))
    folder = sampled[1]
    settings = [f"--config.sample.{key}={text}" for key, text in change.items()]
    succeed("--workdir", workdir, "--mode", "sample", *settings)
    (other,) = [path for path in (workdir / "samples").iterdir() if path.name != folder.name]
    images = pictures(other)
    first = pictures(folder)
    assert images.keys() == first.keys()
    assert any((images[name] != first[name]).any() for name in images)
    assert change.items() <= json.loads((other / "settings.json").read_text())["sample"].items()


@pytest.mark.parametrize(
    "change",
    [{"sample__steps": "none", "sample__times": "0,0.3,1"}, {"precision__compute": "bfloat16"}],
)
def test_other_times_and_other_precision_draw_other_samples(sampled, tmp_path, change):
    workdir = shutil.copytree(sampled[0], tmp_path / "run")
    out = succeed("--workdir", workdir, "--mode", "sample", *flags(**change))
    assert "sampling 8 of 8" in out
    assert len(list((workdir / "samples").iterdir())) == 2


def help_text(*arguments):
    """Return the stdout of main, which must exit with status 0."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        main.main(list(arguments))
    assert exit_.value.code == 0
    return out.getvalue()


def test_help_shows_modes_flags_and_an_example():
    text = help_text("--help")
    assert "python -m sit_jax.main --config configs/digits.py --workdir runs/digits" in text
    for mode, job in main.JOBS.items():
        assert re.search(rf"^  {mode} +{re.escape(job.help)}$", text, re.M)
        assert all(f"--{flag.name}" in text for flag in job.flags)
    assert "--config.train.steps=1000" in text and "--help-config" in text


def test_help_on_settings_lists_sections_and_explains_each_setting():
    sections = help_text("--help-config")
    for section in settings_help.sections():
        assert re.search(rf"^  {section} ", sections, re.M)
        explained = help_text("--help-config", section)
        for entry in settings_help.settings_of(section):
            assert f"--config.{entry.key}={settings_help.shown(entry.default)}\n" in explained
            assert " ".join(entry.help.split()) in " ".join(explained.split())
    keys = [
        entry.key
        for section in settings_help.sections()
        for entry in settings_help.settings_of(section)
    ]
    assert sorted(keys) == sorted(config_lib.flatten(Config()))
    assert "linear, decreasing, increasing-decreasing" in help_text("--help-config", "sample")


def test_help_on_one_setting_explains_only_that():
    explained = help_text("--help-config", "sample.steps")
    assert explained.startswith("--config.sample.steps=none\n")
    assert explained.count("--config.") == 1


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("sampel", "'sample'"), ("sample.stepz", "'sample.steps'"), ("steps", "'sweep.steps'")],
)
def test_help_on_an_unknown_section_or_setting_names_the_nearest(name, nearest):
    message = refusal("--help-config", name)
    assert f"unknown section or setting '{name}'; did you mean " in message
    assert nearest in message and "--help-config lists the sections" in message


def test_the_tables_of_settings_are_those_of_the_declarations():
    """If this fails, run `python -m sit_jax.settings_help`."""
    document = (ROOT / "configs" / "README.md").read_text()
    assert settings_help.with_tables(document) == document
    assert "| `sample.atol` | `1e-06` | number: 1e-30 to 1000 |" in document


def test_the_compilation_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime.use_compilation_cache()  # jax itself reads $JAX_COMPILATION_CACHE_DIR
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        runtime.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sit_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
