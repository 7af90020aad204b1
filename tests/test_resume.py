"""A run stopped at a checkpoint and continued ends bitwise equal to one that never stopped."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from sit_jax import config as config_lib
from sit_jax import train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.jobs import train
from sit_jax.jobs.setup import set_up

CONFIG = config_lib.load(
    "configs/digits.py",
    [
        ("model.depth", "2"), ("model.width", "32"), ("model.heads", "2"), ("train.batch", "16"), ("train.steps", "9"),
        ("checkpoint.every", "4"), ("log.every", "2"), ("log.sheet_every", "4"), ("log.sheet_count", "4"),
        ("sample.batch", "4"), ("sample.steps", "2"), ("data.flip", "true"),
    ],
)  # fmt: skip


class Stopped(Exception):
    pass


def final_arrays(workdir):
    setup = set_up(CONFIG)
    with Checkpoints(workdir / "checkpoints", train_state.CHECKPOINT_ITEMS) as checkpoints:
        assert checkpoints.latest_step() == 9
        return checkpoints.restore(9, train.abstract_state(setup).items())


def logged(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows]


def test_stop_and_continue_is_bitwise(tmp_path, monkeypatch):
    straight, stopped = epath.Path(tmp_path / "straight"), epath.Path(tmp_path / "stopped")
    train.run(CONFIG, straight)

    def stop(setup, workdir, sampler, params, step, log):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "_draw_sheet", stop)  # right after the checkpoint of step 4
        train.run(CONFIG, stopped)
    assert [row[0] for row in logged(stopped)] == [2, 4]
    assert not (stopped / "checkpoints" / "8").exists()
    train.run(CONFIG, stopped)

    jax.tree.map(np.testing.assert_array_equal, final_arrays(stopped), final_arrays(straight))
    assert logged(stopped) == logged(straight)
    assert [row[0] for row in logged(straight)] == [2, 4, 6, 8, 9]
