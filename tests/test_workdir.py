"""A workdir is what its checkpoints say: not what its folders, config.json or the data claim."""

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

from sit_jax import config as config_lib
from sit_jax import storage
from sit_jax.checkpoint import Checkpoints
from sit_jax.jobs import train
from sit_jax.jobs.data import open_batches, open_source
from sit_jax.jobs.loop import Loop
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import open_checkpoints
from sit_jax.settings import Config
from tests.commands import (
    FOLDER,
    TINY,
    call,
    flags,
    pictures,
    refusal,
    rows,
    snapshot,
    succeed,
    write_images,
)

pytestmark = pytest.mark.usefixtures("quiet_machine")

ON = flags(train__steps=6, log__sheet_every=0)


def newest(workdir):
    """Return the newest complete step and its state."""
    config = config_lib.load(str(workdir / "config.json"))
    with open_checkpoints(config, workdir) as checkpoints:
        step, _ = checkpoints.newest_complete()
        return step, checkpoints.restore(step, set_up(config).abstract_state.items())


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A checkpoint is what its manifest says.


def test_checkpoints_that_swapped_names_are_not_used(run_copy):
    folder = run_copy / "checkpoints"
    (folder / "2").rename(folder / "3")
    (folder / "4").rename(folder / "2")
    (folder / "3").rename(folder / "4")
    before = snapshot(run_copy)
    status, _, err = call("--workdir", run_copy, *ON)
    assert status == 2
    for name, step in (("4", 2), ("2", 4)):
        assert f"{name} is not used: it is the checkpoint of step {step}, under another name" in err
    assert "has been trained, but none of its checkpoints can be used; restore" in err
    assert snapshot(run_copy) == before


@pytest.mark.parametrize("name", ["3", "7", "500"])
def test_a_renamed_checkpoint_is_not_used_but_the_one_before_it(run_copy, name):
    (run_copy / "checkpoints" / "4").rename(run_copy / "checkpoints" / name)
    with open_checkpoints(Config(), run_copy) as checkpoints:
        step, (line,) = checkpoints.newest_complete()
    assert step == 2
    assert f"{name} is not used: it is the checkpoint of step 4, under another name" in line


def test_a_checkpoint_of_another_run_is_not_used(run_copy, tmp_path):
    other = tmp_path / "other"
    succeed(*TINY, *flags(log__sheet_every=0), "--workdir", other)
    shutil.rmtree(run_copy / "checkpoints" / "4")
    shutil.copytree(other / "checkpoints" / "4", run_copy / "checkpoints" / "4")
    ids = [json.loads((run / "run.json").read_text())["run"] for run in (other, run_copy)]
    with open_checkpoints(Config(), run_copy) as checkpoints:
        step, (line,) = checkpoints.newest_complete()
    assert step == 2
    assert f"4 is not used: it is of another run, {ids[0]}, while this one is {ids[1]}" in line


def test_a_checkpoint_of_an_earlier_version_is_used(run_copy, trained):
    """It has a manifest of files only, there is no run.json, and the note knows no data."""
    for step in ("2", "4"):
        path = run_copy / "checkpoints" / step / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text())["files"]))
    (run_copy / "run.json").unlink()
    succeed("--workdir", run_copy, *ON)
    manifest = json.loads((run_copy / "checkpoints" / "6" / "manifest.json").read_text())
    assert manifest["run"] == json.loads((run_copy / "run.json").read_text())["run"]


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"files": 3, "step": 4}', '{"step": 4}', "null", "{}", '{"a": {"bytes": 1}}'],
    ids=["deep", "no dict", "no files", "null", "empty", "no digest"],
)
def test_a_damaged_manifest_is_one_line(run_copy, text):
    (run_copy / "checkpoints" / "4" / "manifest.json").write_text(text)
    with open_checkpoints(Config(), run_copy) as checkpoints:
        step, (line,) = checkpoints.newest_complete()
    assert step == 2 and "checkpoints/4 is not used: its manifest" in line


def test_a_folder_that_is_not_a_step_is_left_alone(run_copy):
    names = ("²", "٣", "007", "-5", "1e3", "4 ", "5.orbax")
    for name in names:
        (run_copy / "checkpoints" / name).mkdir()
    succeed("--workdir", run_copy, *ON)
    assert newest(run_copy)[0] == 6
    assert all((run_copy / "checkpoints" / name).is_dir() for name in names)


# A run that has trained never starts over by itself.


def lose_manifests(workdir):
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        path.unlink()


def lose_checkpoints(workdir):
    shutil.rmtree(workdir / "checkpoints")


def damage_all(workdir):
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        path.write_text("{}")


def lose_all_of_an_earlier_version(workdir):
    lose_manifests(workdir)
    (workdir / "run.json").unlink()


@pytest.mark.parametrize(
    "lose",
    [
        lose_manifests,
        lose_checkpoints,
        damage_all,
        lose_all_of_an_earlier_version,
    ],
)
def test_a_run_that_lost_its_checkpoints_does_not_start_over(run_copy, lose):
    lose(run_copy)
    before = snapshot(run_copy)
    for arguments in (["--workdir", run_copy], [*TINY, "--workdir", run_copy, *ON]):
        status, _, err = call(*arguments)
        assert status == 2
        assert "has been trained, but none of its checkpoints can be used; restore" in err
    assert snapshot(run_copy) == before


def test_a_run_that_died_before_its_first_checkpoint_takes_other_settings(tmp_path, monkeypatch):
    workdir = tmp_path / "run"

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", out_of_memory)
        assert "out of memory" in refusal(*TINY, "--workdir", workdir)
    out = succeed(*TINY, "--workdir", workdir, *flags(train__batch=4, model__width=8))
    assert "train.batch changes from 8 to 4 at step 0" in out
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4]


def test_an_unfinished_first_save_starts_over(tmp_path):
    workdir = tmp_path / "run"
    succeed(*TINY, "--workdir", workdir, *flags(checkpoint__every=4))
    lose_all_of_an_earlier_version(workdir)  # as a kill before the manifest leaves it
    status, _, err = call(*TINY, "--workdir", workdir)
    assert status == 0 and "its manifest is missing, so the save did not finish" in err


# Results belong to the weights that made them.


def test_other_weights_of_the_same_step_have_results_of_their_own(run_copy):
    succeed("--workdir", run_copy, "--mode", "sample")
    (first,) = (run_copy / "samples").iterdir()
    images = pictures(first)
    shutil.rmtree(run_copy / "checkpoints")
    (run_copy / "run.json").unlink()
    succeed(*TINY, "--workdir", run_copy, *flags(seed=5, log__sheet_every=0))
    out = succeed("--workdir", run_copy, "--mode", "sample")
    assert "sampling 8 of 8 images" in out
    (second,) = set((run_copy / "samples").iterdir()) - {first}
    again = pictures(second)
    assert any((images[name] != again[name]).any() for name in images)


def test_the_same_weights_keep_their_results_wherever_the_run_lies(run_copy, tmp_path):
    succeed("--workdir", run_copy, "--mode", "sample")
    moved = shutil.move(run_copy, tmp_path / "moved")
    assert "sampling 0 of 8 images" in succeed("--workdir", moved, "--mode", "sample")


# The data is that of the first start.


@pytest.fixture(scope="module")
def trained_on_folder(quiet_machine, tmp_path_factory):
    """Return a folder with the data and the run of `folder_run`, which no test may change."""
    home = tmp_path_factory.mktemp("home")
    data = home / "data"
    write_images(data, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    settings = flags(data__path=data, train__steps=2, log__sheet_every=0, likelihood__split="none")
    succeed(*TINY, *FOLDER, *settings, "--workdir", home / "run")
    return home


@pytest.fixture
def folder_run(trained_on_folder, tmp_path):
    """Return the flags of a run on a folder of two classes, trained for 2 steps, and the folder."""
    home = shutil.copytree(trained_on_folder, tmp_path / "home")
    flag = f"--config.data.path={home / 'data'}"
    return ["--workdir", home / "run", flag, "--config.train.steps=4"], home / "data"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cat", "zebra", "label 0 was 'cat' and is now 'dog'"),
        ("dog", "bat", "label 0 was 'cat' and is now 'bat'"),
        ("dog", "horse", "label 1 was 'dog' and is now 'horse'"),
    ],
)
def test_labels_that_mean_other_classes_are_refused(folder_run, old, new, words):
    run, data = folder_run
    (data / old).rename(data / new)
    before = snapshot(data.parent / "run")
    for mode in ("train", "likelihood", "sweep", "invert", "quality", "excess"):
        message = refusal(*run[: 3 if mode != "train" else None], "--mode", mode)
        assert "these are other classes than the run was trained on" in message
        assert words in message
    assert snapshot(data.parent / "run") == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (None, None, None),
        ("cat", "zebra", "label 0 was 'cat' and is now 'dog'"),
        ("dog", "bat", "label 0 was 'cat' and is now 'bat'"),
        ("dog", "horse", "label 1 was 'dog' and is now 'horse'"),
    ],
)
def test_a_fork_to_other_classes_says_so_and_keeps_to_them(folder_run, old, new, words):
    run, data = folder_run
    fork = data.parent / "fork"
    if old:
        (data / old).rename(data / new)
    out = succeed(*run[:3], "--fork", fork, "--config.train.steps=1")
    assert ("the fork trains on other classes than the weights" in out) == (words is not None)
    assert words is None or words in out
    shutil.rmtree(fork / "checkpoints" / "1")  # back to the weights of the fork
    name = new or "cat"
    (data / name).rename(data / f"{name}2")
    assert f"label {int(name == 'horse' or name == 'zebra')} was {name!r}" in refusal(
        "--workdir", fork
    )


def test_a_set_that_grew_is_said(folder_run):
    run, data = folder_run
    write_images(data, "cat/3.png")
    words = "the data set had 4 images and has 5 now: from step 2 on, images come in another order"
    assert words in succeed(*run)


# What changes on resume is said, with the numbers.


def test_a_lengthened_cosine_says_where_the_rate_goes(run_copy):
    out = succeed("--workdir", run_copy, *flags(train__steps=40, log__sheet_every=0))
    assert "train.steps changes from 4 to 40 at step 4" in out
    rate = 0.02 * (1 + np.cos(np.pi * 4 / 40)) / 2
    assert f"the learning rate at step 4 changes from 0 to {rate:.3g}" in out
    logged = {row["step"]: row["learning_rate"] for row in rows(run_copy)}
    assert logged[5] == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"optimizer__schedule": "constant"}, 0.02),
        ({"optimizer__learning_rate": 0.01}, 0.01 * (1 + np.cos(np.pi * 4 / 6)) / 2),
        ({"optimizer__warmup_steps": 5}, 0.016),
    ],
)
def test_another_schedule_is_allowed_and_says_the_rate(run_copy, settings, rate):
    out = succeed("--workdir", run_copy, *ON, *flags(**settings))
    assert f"the learning rate at step 4 changes from 0 to {rate:.3g}" in out
    assert rows(run_copy)[4]["learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_the_logged_rate_is_the_one_that_the_optimizer_applies(quiet_machine):
    """After skipped updates the optimizer's count is behind the step."""
    overrides = [("optimizer.warmup_steps", "10"), ("model.width", "16"), ("train.batch", "8")]
    setup = set_up(config_lib.load("configs/digits.py", overrides))
    state = setup.create_state()
    state = state.replace(step=state.step + 5)
    with open_batches(setup, open_source(setup), 0) as batches:
        _, scalars = train.make_train_step(setup)(state, next(batches), setup.codec_params)
    assert float(scalars["learning_rate"]) == float(setup.schedule(0)) != float(setup.schedule(5))


def test_clipping_may_be_set_and_unset_and_keeps_the_moments(run_copy, tmp_path):
    straight = shutil.copytree(run_copy, tmp_path / "straight")
    succeed("--workdir", straight, *ON)
    succeed("--workdir", run_copy, *ON, "--config.optimizer.clip_norm=1e9")
    clipped, expected = newest(run_copy), newest(straight)
    assert_same(clipped[1]["params"], expected[1]["params"])
    assert_same(clipped[1]["opt_state"][1], expected[1]["opt_state"])
    on = flags(train__steps=8, log__sheet_every=0)
    succeed("--workdir", straight, *on)
    out = succeed("--workdir", run_copy, *on, "--config.optimizer.clip_norm=none")
    assert "optimizer.clip_norm changes from 1000000000.0 to None at step 6" in out
    assert_same(newest(run_copy), newest(straight))


@pytest.mark.parametrize(
    "settings",
    [
        {"train__accumulation": 2, "train__ema_decay": 0.9},
        {"optimizer__weight_decay": 0.1, "precision__compute": "bfloat16"},
    ],
)
def test_these_may_change_too(run_copy, settings):
    assert "changes from" in succeed("--workdir", run_copy, *ON, *flags(**settings))


@pytest.mark.parametrize(
    ("decay", "share"), [(0.9999, "100%"), (0.99, "96%"), (0.6, "13%"), (0.5, None)]
)
def test_an_average_of_random_weights_is_said(decay, share):
    overrides = [("train.steps", "4"), ("train.ema_decay", str(decay)), ("model.width", "16")]
    setup = set_up(config_lib.load("configs/digits.py", overrides))
    source, state = open_source(setup), setup.create_state()
    note = {"forked_from": "another run"}
    assert not list(train.describe_start(setup, source, state, 0, note, {}))
    lines = list(train.describe_start(setup, source, state, 0, {}, {}))
    if share is None:
        assert not lines
    else:
        words = f"after 4 steps the EMA still holds {share} of the initial, random weights"
        assert len(lines) == 1 and words in lines[0]


# What a run leaves.


def test_training_removes_what_a_killed_run_left(run_copy):
    dead = subprocess.Popen(["true"])
    dead.wait()
    end = f"{storage._HOST}-{dead.pid}-0123.tmp"
    left = [run_copy / f".config.json.{end}", run_copy / "sheets" / f".step_00000006.png.{end}"]
    for path in left:
        path.write_bytes(b"half")
    succeed("--workdir", run_copy, *flags(train__steps=6))
    assert not any(path.exists() for path in left)


def test_a_refused_start_leaves_no_folder(tmp_path):
    data = tmp_path / "data"
    write_images(data, "cat/1.png", "dog/1.png")
    (data / "cat" / "1.png").write_bytes(b"broken")
    before = snapshot(tmp_path)
    workdir = tmp_path / "a" / "b" / "run"
    start = [*TINY, *FOLDER, *flags(data__path=data), "--workdir", workdir]
    assert "cannot be read" in refusal(*start)
    assert "--profile starts at step 9" in refusal(*TINY, "--workdir", workdir, "--profile=9:9")
    assert snapshot(tmp_path) == before


def test_a_checkpoint_that_vanishes_while_it_is_read_gives_way_to_the_next(run_copy, monkeypatch):
    """A training run saves step 6 and deletes steps 2 and 4 while the sampler restores step 4."""
    newer = shutil.copytree(run_copy, run_copy.parent / "newer")
    succeed("--workdir", newer, *ON)
    restore = Checkpoints.restore

    def restore_late(checkpoints, step, targets):
        if step == 4:
            for old in ("2", "4"):
                shutil.rmtree(run_copy / "checkpoints" / old)
            shutil.copytree(newer / "checkpoints" / "6", run_copy / "checkpoints" / "6")
        return restore(checkpoints, step, targets)

    monkeypatch.setattr(Checkpoints, "restore", restore_late)
    out = succeed("--workdir", run_copy, "--mode", "sample")
    assert "images from step 6 into" in out
