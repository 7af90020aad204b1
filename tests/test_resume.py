"""A run that stops for any reason keeps its checkpoints and continues bitwise as if it had not."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sit_jax import config as config_lib
from sit_jax import manifest, train_step
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.loop import Loop
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import open_checkpoints

pytestmark = pytest.mark.usefixtures("quiet_machine")


def config(**settings):
    tiny = {
        "model.depth": 1, "model.width": 16, "model.heads": 2, "train.batch": 8, "train.steps": 9,
        "checkpoint.every": 4, "log.every": 3, "log.sheet_every": 4, "log.sheet_count": 4,
        "log.tensorboard": False,
        "sample.batch": 4, "sample.steps": 2, "data.flip": True,
    }  # fmt: skip
    tiny |= {key.replace("__", "."): value for key, value in settings.items()}
    return config_lib.load("configs/digits.py", [(key, str(value)) for key, value in tiny.items()])


class Stopped(Exception):
    pass


def run_until_step_4(workdir, monkeypatch, **settings):
    """Train until step 4, a checkpoint one step after a row of the log, and end by an exception."""

    def stop(loop, step, ema):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Loop, "_draw_sheet", stop)
        train.train(config(**settings), workdir)
    assert [row["step"] for row in rows(workdir)] == [3] and complete_step(workdir) == 4


def complete_step(workdir):
    with open_checkpoints(config(), workdir) as checkpoints:
        step, problems = checkpoints.newest_complete()
    assert problems == []
    return step


def final_arrays(workdir):
    with open_checkpoints(config(), workdir) as checkpoints:
        assert checkpoints.newest_complete() == (9, [])
        return checkpoints.restore(9, set_up(config()).abstract_state.items())


def rows(workdir):
    """Return the log's rows without the fields that depend on the clock."""
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


def test_a_stopped_and_continued_run_equals_an_uninterrupted_one_bitwise(
    folders, monkeypatch, capsys
):
    straight, stopped = folders
    train.train(config(), straight)
    run_until_step_4(stopped, monkeypatch)
    assert not (stopped / "checkpoints" / "8").exists()
    capsys.readouterr()
    train.train(config(), stopped)
    assert "training from step 4 to 9" in capsys.readouterr().out
    same(stopped, straight)


@pytest.fixture
def not_finite(monkeypatch):
    """`not_finite(6, 7)` makes the images of these steps NaN."""
    draw = train_step.draw_examples

    def poison(*bad_steps):
        def draw_poisoned(objective, codec, seed, step, *batch):
            examples = draw(objective, codec, seed, step, *batch)
            # The state counts finished steps.
            bad = jnp.isin(step + 1, jnp.asarray(bad_steps))
            return {**examples, "x1": jnp.where(bad, jnp.nan, examples["x1"])}

        monkeypatch.setattr(train_step, "draw_examples", draw_poisoned)

    return poison


@pytest.mark.parametrize(("bad", "kept"), [(4, None), (7, 4)])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    folders, not_finite, bad, kept
):
    workdir, _ = folders
    not_finite(bad)
    for _ in range(2):  # the same command again ends the same way
        with pytest.raises(UserError) as caught:
            train.train(config(log__sheet_every=0), workdir)
        message = str(caught.value)
        assert message.startswith(
            f"step {bad}: loss nan and gradient norm nan are not both finite; the last checkpoint"
        )
        assert "\n" not in message and "Try a lower optimizer.learning_rate" in message
        assert complete_step(workdir) == kept
        assert [row["step"] for row in rows(workdir)] == [step for step in (3, 6, 9) if step < bad]


def test_updates_that_are_not_finite_may_be_skipped_and_are_counted(
    folders, not_finite, monkeypatch
):
    straight, stopped = folders
    not_finite(4, 8)
    train.train(config(train__skip_nonfinite=2), straight)
    assert [row.get("skipped_updates") for row in rows(straight)] == [None, 1, 1]
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows(straight))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(final_arrays(straight)))
    run_until_step_4(stopped, monkeypatch, train__skip_nonfinite=2)
    train.train(config(train__skip_nonfinite=2), stopped)
    same(stopped, straight)


def test_no_more_updates_are_skipped_than_allowed_even_after_a_restart(
    folders, not_finite, monkeypatch
):
    straight, stopped = folders
    not_finite(2, 6, 7)
    with pytest.raises(UserError, match="step 7: loss nan"):
        train.train(config(train__skip_nonfinite=2), straight)
    run_until_step_4(stopped, monkeypatch, train__skip_nonfinite=2)
    with pytest.raises(UserError, match="step 7: loss nan"):
        train.train(config(train__skip_nonfinite=2), stopped)
    assert complete_step(stopped) == 4
    # The remedy works for the run that stopped.
    train.train(config(train__skip_nonfinite=3, log__sheet_every=0), stopped)


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(4)` makes the save of step 4 fail as on a full disk."""
    write = manifest.write

    def fill(*steps):
        def fail(folder, step, run):
            if step in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(folder, step, run)

        monkeypatch.setattr(manifest, "write", fail)

    return fill


def test_a_save_that_fails_is_a_warning_and_the_next_one_works(folders, full_disk, capsys):
    workdir, straight = folders
    settings = {"checkpoint__every": 2, "checkpoint__keep_last": 1, "log__sheet_every": 0}
    full_disk(4, 6)
    train.train(config(**settings), workdir)
    warnings = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
    ]
    assert [line.split(" in ")[0] for line in warnings] == [
        f"warning: checkpoint {step} could not be saved" for step in (4, 6)
    ]
    assert all("No space left on device" in line for line in warnings)
    full_disk()
    train.train(config(), straight)
    same(workdir, straight)


def test_the_last_checkpoint_is_kept_when_later_saves_fail(folders, full_disk):
    workdir, _ = folders
    settings = {"checkpoint__every": 2, "checkpoint__keep_last": 1, "log__sheet_every": 0}
    full_disk(4, 6, 8, 9)
    with pytest.raises(
        UserError,
        match=r"checkpoint 9 could not be saved in .*/checkpoints \(OSError: .*No space left",
    ):
        train.train(config(**settings), workdir)
    with open_checkpoints(config(), workdir) as checkpoints:
        step, problems = checkpoints.newest_complete()
    assert (step, len(problems)) == (2, 4)
    full_disk()
    train.train(config(**settings), workdir)  # the same command continues
    assert complete_step(workdir) == 9
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["9"]
