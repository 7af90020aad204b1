"""A run that stops, for whatever reason, keeps what it has, and continues bitwise as if it had never stopped."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sit_jax import checkpoint, train_step
from sit_jax import config as config_lib
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.setup import set_up

pytestmark = pytest.mark.usefixtures("quiet_machine")


def config(**settings):
    tiny = {
        "model.depth": 1, "model.width": 16, "model.heads": 2, "train.batch": 8, "train.steps": 9,
        "checkpoint.every": 4, "log.every": 3, "log.sheet_every": 4, "log.sheet_count": 4, "log.tensorboard": False,
        "sample.batch": 4, "sample.steps": 2, "data.flip": True,
    }  # fmt: skip
    tiny |= {key.replace("__", "."): value for key, value in settings.items()}
    return config_lib.load("configs/digits.py", [(key, str(value)) for key, value in tiny.items()])


class Stopped(Exception):
    pass


def run_until_step_4(workdir, monkeypatch, **settings):
    """Trains until the checkpoint of step 4, one step after a row of the log, and ends by an exception."""

    def stop(loop, step, ema):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train.Loop, "_draw_sheet", stop)
        train.run(config(**settings), workdir)
    assert [row["step"] for row in rows(workdir)] == [3] and whole_step(workdir) == 4


def whole_step(workdir):
    with train.open_checkpoints(config(), workdir) as checkpoints:
        step, problems = checkpoints.newest_complete()
    assert problems == []
    return step


def final_arrays(workdir):
    with train.open_checkpoints(config(), workdir) as checkpoints:
        assert checkpoints.newest_complete() == (9, [])
        return checkpoints.restore(9, set_up(config()).abstract_state.items())


def rows(workdir):
    """The log's rows without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in line.keys() - {"images_per_s", "flops_per_s", "mfu"}}
        for line in lines
    ]


def same(workdir, other):
    jax.tree.map(np.testing.assert_array_equal, final_arrays(workdir), final_arrays(other))
    assert rows(workdir) == rows(other)
    assert [row["step"] for row in rows(workdir)] == [3, 6, 9]


@pytest.fixture
def folders(tmp_path):
    return epath.Path(tmp_path / "straight"), epath.Path(tmp_path / "stopped")


def test_stop_and_continue_is_bitwise(folders, monkeypatch, capsys):
    straight, stopped = folders
    train.run(config(), straight)
    run_until_step_4(stopped, monkeypatch)
    assert not (stopped / "checkpoints" / "8").exists()
    capsys.readouterr()
    train.run(config(), stopped)
    assert "training from step 4 to 9" in capsys.readouterr().out
    same(stopped, straight)


@pytest.fixture
def not_finite(monkeypatch):
    """`not_finite(6, 7)`: the images of these steps are NaN from now on."""
    draw = train_step.draw_examples

    def poison(*bad_steps):
        def draw_poisoned(objective, codec, seed, step, *batch):
            examples = draw(objective, codec, seed, step, *batch)
            bad = jnp.isin(
                step + 1, jnp.asarray(bad_steps)
            )  # the state counts the steps that are done
            return {**examples, "x1": jnp.where(bad, jnp.nan, examples["x1"])}

        monkeypatch.setattr(train_step, "draw_examples", draw_poisoned)

    return poison


@pytest.mark.parametrize(("bad", "kept"), [(4, None), (7, 4)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    folders, not_finite, bad, kept
):
    workdir, _ = folders
    not_finite(bad)
    for _ in range(2):  # the same command again comes to the same end
        with pytest.raises(UserError) as caught:
            train.run(config(log__sheet_every=0), workdir)
        message = str(caught.value)
        assert message.startswith(
            f"step {bad}: loss nan and gradient norm nan are not both finite; the last checkpoint"
        )
        assert "\n" not in message and "Try a lower optimizer.learning_rate" in message
        assert whole_step(workdir) == kept
        assert [row["step"] for row in rows(workdir)] == [step for step in (3, 6, 9) if step < bad]


def test_updates_that_are_not_finite_may_be_passed_over_and_are_counted(
    folders, not_finite, monkeypatch
):
    straight, stopped = folders
    not_finite(4, 8)
    train.run(config(train__skip_nonfinite=2), straight)
    assert [row.get("skipped_updates") for row in rows(straight)] == [None, 1, 1]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows(straight))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_arrays(straight)))
    run_until_step_4(stopped, monkeypatch, train__skip_nonfinite=2)
    train.run(config(train__skip_nonfinite=2), stopped)
    same(stopped, straight)


def test_no_more_of_them_than_was_said_also_after_a_restart(folders, not_finite, monkeypatch):
    straight, stopped = folders
    not_finite(2, 6, 7)
    with pytest.raises(UserError, match="step 7: loss nan"):
        train.run(config(train__skip_nonfinite=2), straight)
    run_until_step_4(stopped, monkeypatch, train__skip_nonfinite=2)
    with pytest.raises(UserError, match="step 7: loss nan"):
        train.run(config(train__skip_nonfinite=2), stopped)
    assert whole_step(stopped) == 4
    train.run(
        config(train__skip_nonfinite=3, log__sheet_every=0), stopped
    )  # the remedy works where it stopped


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(4)`: the save of step 4 fails as on a full disk."""
    digests = checkpoint._digests

    def fill(*steps):
        def fail(folder):
            if int(folder.name) in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            return digests(folder)

        monkeypatch.setattr(checkpoint, "_digests", fail)

    return fill


def test_a_save_that_fails_is_a_warning_and_the_next_one_works(folders, full_disk, capsys):
    workdir, straight = folders
    settings = dict(checkpoint__every=2, checkpoint__keep_last=1, log__sheet_every=0)
    full_disk(4, 6)
    train.run(config(**settings), workdir)
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
    ]
    assert [line.split(" in ")[0] for line in warnings] == [
        f"warning: checkpoint {step} could not be saved" for step in (4, 6)
    ]
    assert all("No space left on device" in line for line in warnings)
    full_disk()
    train.run(config(), straight)
    same(workdir, straight)


def test_the_last_checkpoint_outlives_every_save_that_fails(folders, full_disk):
    workdir, _ = folders
    settings = dict(checkpoint__every=2, checkpoint__keep_last=1, log__sheet_every=0)
    full_disk(4, 6, 8, 9)
    with pytest.raises(
        UserError,
        match=r"checkpoint 9 could not be saved in .*/checkpoints \(OSError: .*No space left",
    ):
        train.run(config(**settings), workdir)
    with train.open_checkpoints(config(), workdir) as checkpoints:
        step, problems = checkpoints.newest_complete()
    assert (step, len(problems)) == (2, 4)
    full_disk()
    train.run(config(**settings), workdir)  # the same command continues
    assert whole_step(workdir) == 9 and [
        path.name for path in (workdir / "checkpoints").iterdir()
    ] == ["9"]
