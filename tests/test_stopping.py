"""A run that is killed or asked to stop, and then continued, ends bitwise like one that was not.

The signals and processes are real; tests/benchmarks/kill_resume.py does the same for longer.
"""

import os
import signal

import pytest

from tests.benchmarks import kill_training
from tests.benchmarks.kill_training import printed, reached, start_child, wait_for

STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of compiled programs, shared by all processes here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache):
    """The workdir of a run that is not interrupted."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    kill_training.finish(workdir, cache, STEPS)
    return workdir


def same(workdir, straight):
    assert kill_training.differences(workdir, straight) == []


@pytest.mark.slow
def test_a_run_killed_three_times_ends_like_one_never_killed(tmp_path, cache, straight):
    workdir = tmp_path / "run"
    lives = list(kill_training.lives(workdir, cache, STEPS, kills=3))
    assert len(lives) == 3 and any(life.unfinished for life in lives)
    assert lives[0].start == 0 < lives[1].start < lives[2].start  # each passed a checkpoint
    kill_training.finish(workdir, cache, STEPS)
    assert kill_training.start_step(workdir) > lives[2].start
    same(workdir, straight)


_SLOW_SAVE = """
import sys, time
from sit_jax import checkpoint, main

def save(*_):
    print("saving", flush=True)
    time.sleep(100)

checkpoint.Checkpoints.save = save
sys.exit(main.main())
"""


def test_signals_save_and_end_the_run_and_a_second_one_ends_it_at_once(tmp_path, cache, straight):
    workdir = tmp_path / "run"
    last = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        child = start_child(workdir, cache, STEPS)
        assert wait_for(child, lambda step=last + 7: reached(workdir) >= step)
        os.kill(child.pid, number)
        assert child.wait(60) == 0 and printed(workdir, "err") == ""
        step = last_saved(workdir)
        assert printed(workdir).splitlines()[-1] == (
            f"stopped at step {step} of {STEPS}, saved; the same command continues"
        )
        assert last + 7 <= step < STEPS and kill_training.unfinished(workdir) == {}
        last = step

    child = start_child(workdir, cache, STEPS, ("-c", _SLOW_SAVE))
    assert wait_for(child, lambda: f"training from step {last} to" in printed(workdir))
    os.kill(child.pid, signal.SIGINT)
    assert wait_for(child, lambda: "saving" in printed(workdir))
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(10) == -signal.SIGINT and "Traceback" not in printed(workdir, "err")
    assert last_saved(workdir) == last

    kill_training.finish(workdir, cache, STEPS)
    same(workdir, straight)


def last_saved(workdir):
    return max(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )
