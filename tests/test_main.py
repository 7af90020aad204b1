"""main: a tiny run from its first step to its samples, every mistake as one line that leaves all files as they were."""

import contextlib
import gzip
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from sit_jax import checkpoint, main, report, sharding
from sit_jax import config as config_lib
from sit_jax.data import transforms
from sit_jax.jobs import train
from sit_jax.jobs.setup import set_up

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")


def flags(**settings):
    return [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]


TINY = [
    "--config", DIGITS,
    *flags(
        model__depth=1, model__width=16, model__heads=2, train__batch=8, train__steps=4,
        optimizer__learning_rate=0.02, train__ema_decay=0.5,
        checkpoint__every=2, log__every=1, log__sheet_every=2, log__sheet_count=8,
        sample__steps=2, sample__count=8, sample__batch=8, sample__columns=5, sample__scale=3,
    ),
]  # fmt: skip
FOLDER = flags(data__source="folder", data__split="all", data__channels=3, data__classes=2)


@pytest.fixture(scope="module", autouse=True)
def quiet_machine(tmp_path_factory):
    """Programs are compiled once for all tests here, not into the user's cache; no accelerator is missed."""
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
                "jax_persistent_cache_min_compile_time_secs": 0.1}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])
        patch.setattr(report, "unused_accelerator_warning", lambda: None)
        for values in (settings, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # jax looks at these settings once
            if values is settings:
                yield


def call(*arguments):
    """main's exit status, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def succeed(*arguments):
    status, out, err = call(*arguments)
    assert (status, err) == (0, "")
    return out


def refusal(*arguments):
    """The one line by which main refuses."""
    status, _, err = call(*arguments)
    assert status == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def snapshot(folder):
    """Names and contents of all that is below a folder; None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("0*.png")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a finished run of 4 steps, not to be written, and what the run printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, succeed(*TINY, "--workdir", workdir)


@pytest.fixture
def run_copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    """A copy of the run with samples, and their folder."""
    workdir = pathlib.Path(shutil.copytree(trained[0], tmp_path_factory.mktemp("sampled") / "run"))
    assert "sampling 8 of 8 images from step 4" in succeed("--workdir", workdir, "--mode", "sample")
    (folder,) = (workdir / "samples").iterdir()
    return workdir, folder


# What works


def test_a_run_says_what_it_does(trained):
    _, out = trained
    assert out.startswith("devices: ")
    assert re.search(r"blocks/attn/qkv/kernel +\| \(1, 16, 3, 2, 8\)", out) and "Total: 10,560" in out
    assert "training from step 0 to 4" in out
    assert [int(step) for step in re.findall(r"^step (\d)/4  loss ", out, re.M)] == [1, 2, 3, 4]
    assert f"sample with: python -m sit_jax.main --mode sample --workdir {trained[0]}" in out


def test_a_run_leaves_its_config_log_checkpoints_and_sheets(trained):
    workdir, _ = trained
    config = config_lib.load(str(workdir / "config.json"))
    assert (config.train.steps, config.model.width, config.optimizer.schedule) == (4, 16, "cosine")
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]
    for row in rows(workdir):
        numbers = [row[name] for name in ("loss", "grad_norm", "images_per_s", "flops_per_s")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
    wanted = 0.01 * (1 + np.cos(np.pi * np.arange(4) / 4))  # half a cosine, from step 0
    np.testing.assert_allclose([row["learning_rate"] for row in rows(workdir)], wanted, rtol=1e-5)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert list((workdir / "tensorboard").glob("events.*"))
    assert sorted(path.name for path in (workdir / "sheets").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    sheet = Image.open(workdir / "sheets" / "step_00000004.png")
    assert sheet.mode == "L" and sheet.size == (5 * 26 + 2, 2 * 26 + 2)  # 5 columns, 3 times 8 pixels and 2 between
    assert np.asarray(sheet)[:26].std() > 10


def test_a_finished_run_says_so_and_changes_no_file(trained):
    before = snapshot(trained[0])
    for arguments in ([], TINY):
        assert "is already at step 4 of 4; raise train.steps" in succeed("--workdir", trained[0], *arguments)
    assert snapshot(trained[0]) == before


def test_the_workdir_alone_continues_the_run(run_copy, trained):
    out = succeed("--workdir", run_copy, "--config.train.steps", "6", "--config.log.sheet_every=0")
    assert "training from step 4 to 6" in out
    assert [row["step"] for row in rows(run_copy)] == [1, 2, 3, 4, 5, 6]
    assert rows(run_copy)[:4] == rows(trained[0])
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["4", "6"]  # the last two
    assert not (run_copy / "sheets" / "step_00000006.png").exists()
    config = config_lib.load(str(run_copy / "config.json"))
    assert (config.train.steps, config.log.sheet_every, config.model.width) == (6, 0, 16)


def test_what_may_change_is_told_and_recorded(run_copy):
    changes = flags(train__steps=6, log__every=3, log__sheet_every=0, optimizer__learning_rate=0.01)
    out = succeed("--workdir", run_copy, *changes)
    told = re.findall(r"^(\S+) changes from (\S+) to (\S+) at step 4$", out, re.M)
    assert told == [
        ("train.steps", "4", "6"), ("optimizer.learning_rate", "0.02", "0.01"), ("log.every", "1", "3"),
        ("log.sheet_every", "2", "0"),
    ]  # fmt: skip
    assert [row["step"] for row in rows(run_copy)] == [1, 2, 3, 4, 6]
    wanted = 0.01 * 0.5 * (1 + np.cos(np.pi * np.array([5]) / 6))  # the learning rate of the sixth step
    np.testing.assert_allclose(rows(run_copy)[-1]["learning_rate"], wanted, rtol=1e-5)
    history = run_copy / "config_changes.jsonl"
    recorded = {"train.steps": [4, 6], "optimizer.learning_rate": [0.02, 0.01], "log.every": [1, 3],
                "log.sheet_every": [2, 0]}  # fmt: skip
    assert [json.loads(line) for line in history.read_text().splitlines()] == [{"step": 4, "changes": recorded}]

    succeed("--workdir", run_copy, "--config.train.steps=7")  # the others are as recorded
    last = json.loads(history.read_text().splitlines()[1])
    assert last == {"step": 6, "changes": {"train.steps": [6, 7]}}


def test_sampling_may_change_all_but_the_network(run_copy):
    changes = flags(train__batch=16, optimizer__b1=0.5, precision__matmul="high", seed=3, data__flip=True)
    assert "sampling 8 of 8 images from step 4" in succeed("--workdir", run_copy, "--mode", "sample", *changes)
    assert config_lib.load(str(run_copy / "config.json")).train.batch == 8  # the run's own stays


def arrays(workdir, step, item):
    """One item of a checkpoint."""
    config = config_lib.load(str(workdir / "config.json"))
    with train.open_checkpoints(config, workdir) as checkpoints:
        return checkpoints.restore(step, {item: train.abstract_state(set_up(config)).items()[item]})[item]


def test_a_fork_is_a_new_run_from_the_same_weights(trained, tmp_path):
    source, fork, before = trained[0], tmp_path / "fork", snapshot(trained[0])
    changes = flags(transport__loss_weight="none", train__label_dropout=0.5, train__steps=2, seed=5, log__sheet_every=0,
                    optimizer__clip_norm=1, checkpoint__keep_last=5)  # fmt: skip
    out = succeed("--workdir", source, "--fork", fork, *changes)
    assert f"forked step 4 of {source} into {fork}" in out and "training from step 0 to 2" in out
    for item in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, arrays(fork, 0, item), arrays(source, 4, item))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(arrays(fork, 0, "opt_state")))
    assert [row["step"] for row in rows(fork)] == [1, 2]
    assert config_lib.load(str(fork / "config.json")).train.label_dropout == 0.5
    assert snapshot(source) == before

    there = snapshot(fork)
    message = refusal("--workdir", source, "--fork", fork, *changes)
    assert f"--fork '{fork}' holds a run already; give a new folder" in message
    assert snapshot(fork) == there
    assert "is already at step 2 of 2" in succeed("--workdir", fork)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            flags(model__width=32),
            r"checkpoint 4: params is of another model: \S+ has shape \(1, 96\) there and \(1, 192\)",
        ),
        (
            flags(model__qk_norm=True),
            r"checkpoint 4: params is of another model: blocks/attn/\S+ has shape None there and ",
        ),
        (flags(data__classes=11), "data.classes is 11, but the digits source has 10 classes"),
        (["--mode", "sample"], "--fork is for --mode train, not sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fork_that_cannot_be_makes_nothing(trained, tmp_path, arguments, words):
    before = snapshot(trained[0])
    assert re.search(words, refusal("--workdir", trained[0], "--fork", tmp_path / "fork", *arguments))
    assert snapshot(trained[0]) == before and snapshot(tmp_path) == {}


def test_a_fork_needs_a_checkpoint(run_copy, tmp_path):
    (run_copy / "checkpoints" / "2" / "manifest.json").unlink()
    (run_copy / "checkpoints" / "4" / "manifest.json").unlink()
    before = snapshot(tmp_path)
    status, _, err = call("--workdir", run_copy, "--fork", tmp_path / "fork")
    assert status == 2 and f"error: --workdir '{run_copy}' holds no whole checkpoint to fork from" in err
    shutil.rmtree(run_copy / "checkpoints")
    assert "has no checkpoints to fork from" in refusal("--workdir", run_copy, "--fork", tmp_path / "fork")
    assert not (tmp_path / "fork").exists() and before


def test_a_profile_is_a_trace_of_the_steps(tmp_path):
    def stop_trace():
        traced.append(len(rows(tmp_path / "run")))  # the rows there are tell how far the run is
        stop()

    traced, stop = [], jax.profiler.stop_trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "stop_trace", stop_trace)
        succeed(*TINY, "--config.log.sheet_every=0", "--workdir", tmp_path / "run", "--profile", "2:3")
    (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    runs = [event for event in events if "in_precision" in event.get("name", "") and event.get("ph") == "X"]
    assert traced == [2] and runs
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_an_update_that_is_not_finite_ends_the_run_with_one_line(run_copy, monkeypatch):
    before = snapshot(run_copy / "checkpoints")
    normalise = transforms.normalise
    monkeypatch.setattr(transforms, "normalise", lambda images: normalise(images) * np.nan)
    message = refusal("--workdir", run_copy, "--config.train.steps=6")
    assert message.startswith(
        "error: step 5: loss nan and gradient norm nan are not both finite; the last checkpoint is"
    )
    assert snapshot(run_copy / "checkpoints") == before


def test_a_last_save_that_fails_is_one_line(run_copy, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    before = snapshot(run_copy / "checkpoints" / "4")
    monkeypatch.setattr(checkpoint, "_digests", fail)
    message = refusal("--workdir", run_copy, *flags(train__steps=5, checkpoint__keep_last=1))
    assert "error: checkpoint 5 could not be saved in" in message and "No space left on device" in message
    assert snapshot(run_copy / "checkpoints" / "4") == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(run_copy, trained):
    manifest = run_copy / "checkpoints" / "4" / "manifest.json"
    manifest.unlink()
    line = f"warning: checkpoint {manifest.parent} is not used: its manifest is missing, so the save did not finish\n"
    for mode, words in (("sample", "images from step 2 into"), ("train", "training from step 2 to 4")):
        status, out, err = call("--workdir", run_copy, "--mode", mode)
        assert (status, err) == (0, line) and words in out
    assert rows(run_copy)[3]["loss"] == rows(trained[0])[3]["loss"] and len(rows(run_copy)) == 4
    for item in ("params", "ema"):
        jax.tree.map(np.testing.assert_array_equal, arrays(run_copy, 4, item), arrays(trained[0], 4, item))


def test_samples_are_pngs_a_sheet_and_their_settings(sampled):
    _, folder = sampled
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{i:06d}.png" for i in range(8)] + ["settings.json", "sheet.png"]
    )
    images = pictures(folder)
    assert all(image.shape == (8, 8) for image in images.values())
    assert len({image.tobytes() for image in images.values()}) == 8
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    np.testing.assert_array_equal(sheet[2:26:3, 28:52:3], images["000001.png"])
    settings = json.loads((folder / "settings.json").read_text())
    wanted = {"step": 4, "weights": "ema", "solver": "heun", "steps": 2, "cfg_scale": 1.5, "seed": 0, "path": "Linear"}
    assert wanted.items() <= settings.items()


def test_samples_that_are_there_are_not_made_again(sampled):
    workdir, folder = sampled
    before, made_at = snapshot(workdir), {path: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    assert "sampling 0 of 8" in succeed("--workdir", workdir, "--mode", "sample")
    assert {path: path.stat().st_mtime_ns for path in folder.glob("0*.png")} == made_at
    assert snapshot(workdir) == before


def test_a_lost_sample_is_made_again_as_it_was(sampled):
    workdir, folder = sampled
    before = snapshot(workdir)
    (folder / "000003.png").unlink()
    assert "sampling 1 of 8" in succeed("--workdir", workdir, "--mode", "sample")
    assert snapshot(workdir) == before


@pytest.mark.parametrize("change", [{"weights": "raw"}, {"solver": "dopri5"}])
def test_other_settings_make_other_samples_beside_the_first(sampled, tmp_path, change):
    workdir, folder = pathlib.Path(shutil.copytree(sampled[0], tmp_path / "run")), sampled[1]
    settings = [f"--config.sample.{key}={text}" for key, text in change.items()]
    succeed("--workdir", workdir, "--mode", "sample", *settings)
    (other,) = [path for path in (workdir / "samples").iterdir() if path.name != folder.name]
    images, first = pictures(other), pictures(folder)
    assert images.keys() == first.keys()
    assert any((images[name] != first[name]).any() for name in images)
    assert change.items() <= json.loads((other / "settings.json").read_text()).items()


def test_help_shows_modes_flags_and_an_example():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        main.main(["--help"])
    assert exit_.value.code == 0
    assert "python -m sit_jax.main --config configs/digits.py --workdir runs/digits" in out.getvalue()
    help_of_mode = out.getvalue().split("--mode MODE")[1].split("--config")[0]
    assert set(main.JOBS) <= set(re.findall(r"\w+", help_of_mode))
    assert "--config.train.steps=1000" in out.getvalue()


def test_the_compilation_cache_lies_in_the_users_cache_folder(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    main.use_compilation_cache()  # $JAX_COMPILATION_CACHE_DIR is set: jax reads it by itself
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    try:
        main.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "sit_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def job(config, workdir):
        raise ValueError("a bug")

    monkeypatch.setitem(main.JOBS, "train", job)
    with pytest.raises(ValueError, match="a bug"):
        call(*TINY, "--workdir", tmp_path)


# What does not: no folder is made for it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "trian"], "unknown mode 'trian'; did you mean 'train'?"),
        (["--modes", "train"], "unknown flag '--modes'; see python -m sit_jax.main --help"),
        (["train"], "unknown flag 'train'; see python -m sit_jax.main --help"),
        (["--configs.seed=1"], "unknown flag '--configs.seed'"),
        (["--mode"], "argument --mode: expected one argument; see python -m sit_jax.main --help"),
        (["--config.seed"], "--config.seed has no value; expected --config.seed=VALUE"),
        (["--config.data.path=", "--config.seed=1"], "--config.data.path has no value; expected"),
        (["--config.data.path", "--config.seed=1"], "--config.data.path has no value; expected"),
        (flags(train__stpes=3), "unknown config key 'train.stpes'; did you mean 'train.steps'"),
        (flags(train__steps="many"), "train.steps is 'many'; expected a whole number"),
        (["--config", "configs/no_such.py"], "--config 'configs/no_such.py' does not exist; expected a file such as"),
        (flags(model__name="SiT-S/3"), "unknown model 'SiT-S/3'; did you mean 'SiT-S/"),
        (flags(transport__path="Lineal"), "unknown path 'Lineal'; did you mean 'Linear'?"),
        (flags(transport__prediction="x0"), "unknown prediction 'x0'; known: 'velocity', 'score', 'noise'"),
        (flags(transport__loss_weight="likely"), "unknown loss weight 'likely'; did you mean 'likelihood'?"),
        (flags(sample__solver="rk4"), "unknown sample.solver 'rk4'"),
        (flags(data__source="digit"), "unknown data.source 'digit'; did you mean 'digits'?"),
        (flags(train__accumulation=3), "train.batch 8 is not divisible by train.accumulation 3"),
        (flags(data__image_size=10), "input size 10 is not divisible by the patch size 4"),
        (flags(data__image_size=16), "data.image_size=16, but the digits are 8x8; set it to 8"),
        (flags(data__classes=11), "data.classes is 11, but the digits source has 10 classes; set data.classes=10"),
        (flags(sample__labels="3,10"), "sample.labels holds 10; expected 0 to 9"),
        (flags(sample__cfg_scale=0.5), "cfg scale is 0.5; expected 1 (no guidance) or more"),
        (flags(train__steps=0), "train.steps is 0; expected more than 0"),
        (flags(sample__steps=-1), "sample.steps is -1; expected more than 0"),
        (flags(transport__train_eps=0.5), "transport.train_eps is 0.5; expected a number inside (0, 0.5)"),
        (flags(transport__sample_eps=0), "transport.sample_eps is 0.0; expected a number inside (0, 0.5)"),
        (flags(mesh__data=3), "mesh data x fsdp x tensor = 3 x 1 x 1 does not use"),
        (["--mode", "sample"], "has no checkpoints; train first, with --mode train"),
        (["--fork", "runs/fork"], "--workdir 'runs/new' has no checkpoints to fork from"),
        (["--profile", "3"], "--profile is '3'; expected two steps FIRST:LAST such as 100:110"),
        (["--profile", "3:2"], "--profile is '3:2'; expected two steps"),
        (["--profile", "0:2"], "--profile is '0:2'; expected two steps"),
        (["--profile", "a:b"], "--profile is 'a:b'; expected two steps"),
        (["--profile=-1:2"], "--profile is '-1:2'; expected two steps"),
        (["--profile="], "--profile is ''; expected two steps"),
        (["--profile", "2:3", "--mode", "sample"], "--profile is for --mode train, not sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_flag_is_one_line_and_makes_nothing(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(*TINY, "--workdir", "runs/new", *arguments)
    assert snapshot(tmp_path) == {}


def test_a_missing_workdir_flag_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "arguments are required: --workdir; see python -m sit_jax.main --help" in refusal(*TINY)
    assert "--workdir is empty; expected a folder such as runs/digits" in refusal(*TINY, "--workdir=")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_workdir_without_a_run_needs_a_config(tmp_path, mode):
    words = "new' holds no run yet; give --config as well, such as --config configs/digits.py"
    assert words in refusal("--workdir", tmp_path / "new", "--mode", mode)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("below", ["file", "file/run", "file/runs/new"])
def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = refusal(*TINY, "--workdir", tmp_path / below)
    assert re.search(rf"--workdir '.*{below}' cannot be written \(.+\); give a folder", message)
    assert snapshot(tmp_path) == {"file": b"mine"}


def write_images(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 9), (number, 100, 200)).save(folder / name)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (None, "data.path='{data}' is no folder; give a folder with a sub-folder for each class"),
        ([], "data.path='{data}' has no sub-folders; put the images of each class into a sub-folder"),
        (["a.png", "b.png"], "data.path='{data}' has no sub-folders; put the images of each class into a sub-folder"),
        (["a/0.png", "b/0.bmp"], "data.path='{data}' has 1 class folders without images"),
        (["a/0.png", "b/0.png", "c/0.png"], "data.classes is 2, but the folder source has 3 classes; set"),
    ],
)
def test_a_bad_data_folder_is_one_line_and_makes_nothing(tmp_path, there, words):
    data = tmp_path / "data"
    if there is not None:
        data.mkdir()
        write_images(data, *there)
    before = snapshot(tmp_path)
    message = refusal(*TINY, *FOLDER, *flags(data__path=data), "--workdir", tmp_path / "new")
    assert words.format(data=data) in message
    assert snapshot(tmp_path) == before


def test_an_empty_data_path_is_one_line(tmp_path):
    message = refusal(*TINY, *FOLDER, "--workdir", tmp_path / "new")
    assert "data.path is empty, but data.source='folder' needs a folder" in message
    assert snapshot(tmp_path) == {}


def test_an_unreadable_image_is_named_and_may_be_skipped(tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    write_images(data, "a/0.png", "a/1.png", "b/0.png")
    (data / "a" / "1.png").write_bytes((data / "a" / "0.png").read_bytes()[:40])
    before = snapshot(data)
    arguments = [*TINY, *FOLDER, *flags(data__path=data, train__steps=1, log__sheet_every=0), "--workdir", workdir]
    message = refusal(*arguments)
    assert f"image '{data}/a/1.png' cannot be read (" in message
    assert "remove it, or set data.skip_unreadable=True to pass over it" in message
    assert snapshot(data) == before
    assert not [path for path in workdir.rglob("*") if path.is_file()]

    succeed(*arguments, "--config.data.skip_unreadable=True")  # the remedy works where the mistake was made
    # Every epoch has each of the 3 images once, so of the batch's 8 places 2 or 3 fell to the broken one.
    assert [row["skipped_images"] for row in rows(workdir)] in ([2], [3])


def test_a_batch_that_devices_cannot_share_is_one_line(tmp_path):
    """In a process of its own, for its three devices: also the exit status and all of stderr are as they should be."""
    done = subprocess.run(
        [sys.executable, "-m", "sit_jax.main", *TINY, "--workdir", str(tmp_path / "new")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
             "XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    words = "train.batch / train.accumulation = 8 is not divisible by the 3 devices it is split over; make"
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {words}.*\n", done.stderr)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__batch": 9}, "sample.batch = 8 is not divisible by the 3 devices"),
        ({"train__batch": 18, "train__accumulation": 9}, "train.batch / train.accumulation = 2 is not divisible by"),
    ],
)
def test_every_batch_must_be_shared_by_the_devices(tmp_path, monkeypatch, settings, words):
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 3)
    assert words in refusal(*TINY, *flags(**settings), "--workdir", tmp_path / "new")
    assert snapshot(tmp_path) == {}


# What does not, where a run is: every file stays as it was


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (flags(train__stpes=6), "unknown config key 'train.stpes'"),
        (flags(sample__labels="10"), "sample.labels holds 10; expected 0 to 9"),
        (flags(sample__cfg_scale=0), "cfg scale is 0.0; expected 1 (no guidance) or more"),
        (flags(train__steps=-6), "train.steps is -6; expected more than 0"),
        (flags(model__depth=2), "run in '{workdir}' is another one: model.depth is 2 but was 1; keep what was, use"),
        (flags(transport__path="GVP"), "run in '{workdir}' is another one: transport.path is 'GVP' but was 'Linear'; "),
        (
            flags(seed=1, model__depth=2, transport__prediction="noise", data__flip=True),
            "is another one: {all}; keep what was, use another --workdir, or --fork NEWDIR for a new run from these",
        ),
        (
            ["--config", DIGITS],
            "is another one: model.depth is 4 but was 1, model.width is 128 but was 16, model.heads",
        ),
        (flags(mesh__data=3, train__steps=6), "mesh data x fsdp x tensor = 3 x 1 x 1 does not use"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_leaves_a_run_as_it_was(trained, mode, arguments, words):
    workdir, _ = trained
    before = snapshot(workdir)
    changed = ["model.depth is 2 but was 1", "transport.prediction is 'noise' but was 'velocity'"]
    if mode == "train":  # samples depend on neither of these
        changed = ["seed is 1 but was 0", *changed, "data.flip is True but was False"]
    words = words.format(workdir=workdir, all=", ".join(changed))
    assert words in refusal("--workdir", workdir, "--mode", mode, *arguments)
    assert snapshot(workdir) == before


def test_a_profile_of_steps_that_are_done_is_one_line(trained):
    before = snapshot(trained[0])
    for steps in ("2:3", "7:8"):
        message = refusal("--workdir", trained[0], "--profile", steps, "--config.train.steps=6")
        assert f"--profile starts at step {steps[0]}; expected one of 5 to 6, which are to be trained" in message
    assert snapshot(trained[0]) == before


def test_data_that_is_gone_leaves_a_run_as_it_was(trained):
    before = snapshot(trained[0])
    assert "data.path='/no/such'" in refusal("--workdir", trained[0], *flags(data__path="/no/such", train__steps=6))
    assert snapshot(trained[0]) == before


@pytest.mark.parametrize(
    ("arguments", "item"), [(["--mode", "train", "--config.train.steps=6"], "params"), (["--mode", "sample"], "ema")]
)
def test_a_checkpoint_of_another_model_is_one_line(run_copy, arguments, item):
    values = json.loads((run_copy / "config.json").read_text())
    values["model"]["depth"] = 2
    (run_copy / "config.json").write_text(json.dumps(values))
    before = snapshot(run_copy)
    message = refusal("--workdir", run_copy, *arguments)
    mismatch = r"blocks/\S+ has shape \(1, .*\) there and \(2, .*\) in this config"
    assert re.search(rf"checkpoint 4: {item} is of another model: {mismatch}", message)
    assert "use the config it was trained with, or another --workdir" in message
    assert snapshot(run_copy) == before


def test_a_run_without_checkpoints_cannot_be_sampled(run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    before = snapshot(run_copy)
    assert "has no checkpoints; train first, with --mode train" in refusal("--workdir", run_copy, "--mode", "sample")
    assert snapshot(run_copy) == before

    (run_copy / "checkpoints").mkdir()
    before = snapshot(run_copy)
    assert "holds no whole checkpoint; train first" in refusal("--workdir", run_copy, "--mode", "sample")
    assert snapshot(run_copy) == before


def test_a_damaged_recorded_config_is_one_line(run_copy):
    (run_copy / "config.json").write_text('{"seed": 0')
    before = snapshot(run_copy)
    assert "config.json cannot be read as a recorded config" in refusal("--workdir", run_copy)
    assert snapshot(run_copy) == before
