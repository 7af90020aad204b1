"""train.epochs: how many steps it is, and that a run of epochs is the run of as many steps."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from sit_jax import config as config_lib
from sit_jax import manifest
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.setup import set_up
from sit_jax.settings import Train
from tests.commands import (
    DIGITS,
    TINY,
    flags,
    record_as_trained_with,
    refusal,
    rows,
    snapshot,
    succeed,
)
from tests.test_workdir import assert_same, newest

pytestmark = pytest.mark.usefixtures("quiet_machine")

IMAGES = 899  # of the digits' split train, in batches of 8
OFF = flags(log__sheet_every=0)


def epochs(count):
    return flags(train__steps="none", train__epochs=count)


@pytest.mark.parametrize(
    ("count", "images", "batch", "steps"),
    [
        (80.0, 1_281_167, 256, 400_365),  # ceil(400,364.69)
        (1.0, 100, 10, 10),
        (1.0, 101, 10, 11),
        (1.1, 1000, 100, 11),  # 1.1 * 1000 / 100 is 11.000000000000002
        (0.3, 1000, 100, 3),
        (1e-6, 10, 10, 1),
        (1.0, 3, 8, 1),
        (4.0, 3, 8, 2),
    ],
)
def test_epochs_are_the_fewest_steps_that_see_as_many_images(count, images, batch, steps):
    assert Train(steps=None, epochs=count, batch=batch).total_steps(images) == steps


def test_steps_do_not_depend_on_the_data_and_epochs_have_an_end():
    assert Train(steps=7).total_steps(10) == Train(steps=7).total_steps(10**9) == 7
    with pytest.raises(UserError, match=r"train.epochs 1e\+06 are .* steps, more than 2,147,483,6"):
        Train(steps=None, epochs=1e6, batch=1).total_steps(10**6)


def test_one_of_steps_and_epochs_is_given():
    message = refusal(*TINY, *flags(train__epochs=2), "--workdir", "runs/none")
    words = "train.steps 4 and train.epochs 2.0 are both given; set train.steps=none to train for"
    assert words in message
    message = refusal(*TINY, *flags(train__steps="none"), "--workdir", "runs/none")
    assert "train.steps and train.epochs are both none; set one of them" in message


@pytest.fixture(scope="module")
def run(quiet_machine, tmp_path_factory):
    """Return the workdir of a run of 0.03 epochs, 4 steps, and its stdout."""
    workdir = tmp_path_factory.mktemp("epochs") / "run"
    return workdir, succeed(*TINY, *epochs(0.03), "--workdir", workdir)


def test_a_run_of_epochs_is_the_run_of_as_many_steps(run, trained):
    workdir, out = run
    assert "0.03 epochs of 899 images in batches of 8: 4 steps" in out
    assert "epochs of" not in trained[1]
    assert_same(newest(workdir), newest(trained[0]))
    names = ("step", "epoch", "loss", "learning_rate")
    assert [[row[name] for name in names] for row in rows(workdir)] == [
        [row[name] for name in names] for row in rows(trained[0])
    ]
    assert sorted(path.name for path in (workdir / "sheets").iterdir()) == [
        "step_00000002.png",
        "step_00000004.png",
    ]


def test_the_log_shows_the_epoch(run):
    workdir, out = run
    np.testing.assert_allclose(
        [row["epoch"] for row in rows(workdir)], np.arange(1, 5) * 8 / IMAGES
    )
    assert "step 2/4  epoch  0.02  loss" in out


def test_config_and_checkpoint_keep_the_epochs(run):
    workdir, _ = run
    recorded = json.loads((workdir / "config.json").read_text())["train"]
    assert (recorded["steps"], recorded["epochs"]) == (None, 0.03)
    note = json.loads((workdir / "checkpoints" / "4" / "note" / "metadata").read_text())
    assert (note["config"]["train.steps"], note["config"]["train.epochs"]) == (None, 0.03)
    before = snapshot(workdir)
    assert "is already at step 4 of 4; raise train.epochs to train on" in succeed(
        "--workdir", workdir
    )
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_the_workdir_is_enough_to_continue_with_more_epochs_or_with_steps(run, run_copy, tmp_path):
    """The run of epochs continues as the run of steps does, and says the same rates."""
    workdir = tmp_path / "epochs"
    succeed(*TINY, *epochs(0.03), *OFF, "--workdir", workdir)
    # 0.05 epochs are 6 steps.
    out = succeed("--workdir", workdir, "--config.train.epochs=0.05")
    straight = succeed("--workdir", run_copy, *flags(train__steps=6), *OFF)
    assert "train.epochs changes from 0.03 to 0.05 at step 4" in out
    rate = "the learning rate at step 4 changes from 0 to 0.005: a cosine schedule over 6 steps"
    assert rate in out and rate in straight
    assert_same(newest(workdir), newest(run_copy))
    message = refusal("--workdir", workdir, "--config.train.steps=7")
    assert "train.steps 7 and train.epochs 0.05 are both given" in message
    out = succeed("--workdir", workdir, *flags(train__steps=7, train__epochs="none"))
    assert "train.steps changes from None to 7 at step 6" in out
    assert "train.epochs changes from 0.05 to None at step 6" in out
    assert "is already at step 6" not in out and rows(workdir)[-1]["step"] == 7
    out = succeed("--workdir", run_copy, *epochs(0.07))  # 8 steps
    assert "train.steps changes from 6 to None at step 6" in out
    assert rows(run_copy)[-1]["step"] == 8


def test_other_modes_and_the_profile_need_no_number_of_steps(run, tmp_path):
    workdir, _ = run
    assert "images from step 4" in succeed(
        "--workdir", workdir, "--mode", "sample", "--out", tmp_path
    )
    message = refusal("--workdir", workdir, "--config.train.epochs=0.05", "--profile=7:9")
    assert "--profile starts at step 7; expected one of 5 to 6" in message


def test_the_state_of_a_run_of_epochs_is_known_without_data():
    config = config_lib.load(
        DIGITS, [("train.steps", "none"), ("train.epochs", "2"), ("model.width", "16")]
    )
    by_steps = config_lib.load(DIGITS, [("model.width", "16")])
    assert_same_shapes(set_up(config).abstract_state, set_up(by_steps).abstract_state)
    setup = set_up(config)
    with pytest.raises(AssertionError, match="only once the data are open"):
        _ = setup.steps
    # As preflight does.
    step = train.make_train_step(setup)
    step.lower(setup.abstract_state, abstract_batch(setup), setup.codec.abstract_params)


def test_a_run_of_a_version_without_epochs_continues_to_the_bit(run_copy, tmp_path):
    """Its config and notes lack the setting, and have data.workers=0."""
    straight = shutil.copytree(run_copy, tmp_path / "straight")
    record_as_trained_with(run_copy, data__workers=0)
    config = json.loads((run_copy / "config.json").read_text())
    del config["train"]["epochs"]
    (run_copy / "config.json").write_text(json.dumps(config))
    for folder in map(epath.Path, (run_copy / "checkpoints").iterdir()):
        recorded = manifest.read(folder)
        note = json.loads((folder / "note" / "metadata").read_text())
        del note["config"]["train.epochs"]
        (folder / "note" / "metadata").write_text(json.dumps(note))
        manifest.write(folder, recorded.step, recorded.run)
    more = flags(train__steps=6, log__sheet_every=0)
    out = succeed("--workdir", run_copy, *more)
    assert [line.split()[0] for line in out.splitlines() if " changes from " in line][:2] == [
        "train.steps",
        "log.sheet_every",
    ]
    succeed("--workdir", straight, *more)
    assert_same(newest(run_copy), newest(straight))
    assert json.loads((run_copy / "config.json").read_text())["data"]["workers"] == 0


def assert_same_shapes(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    assert all((a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding) for a, b in leaves)


def test_a_data_set_that_grew_changes_the_steps_and_says_the_rate():
    """2 epochs of 40 images were 10 steps of 8; of 80 images they are 20."""
    overrides = [("train.steps", "none"), ("train.epochs", "2"), ("train.batch", "8")]
    overrides += [("train.ema_decay", "0.1"), ("model.width", "16"), ("data.split", "train")]
    setup = dataclasses.replace(set_up(config_lib.load(DIGITS, overrides)), images=80)
    assert setup.steps == 20

    class Grown:
        def __len__(self):
            return 80

    state = setup.create_state()
    state = state.replace(opt_state=_at_count(state.opt_state, 5))
    note = {"data": {"images": 40}}
    lines = list(train.describe_start(setup, Grown(), state, 5, note, {}))
    assert "a cosine schedule over 20 steps" in lines[0] and "from 0.001 to 0.00171" in lines[0]
    assert "the data set had 40 images and has 80 now" in lines[1]


def _at_count(opt_state, count):
    return optax.tree.set(opt_state, count=jnp.int32(count))
