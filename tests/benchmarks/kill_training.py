"""Trains in children that are killed, and compares the result with a run that was not.

A tiny model on digits. A child is killed at random times, every second time during a save, and
started again with the same command until it finishes.
"""

import dataclasses
import json
import pathlib
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from sit_jax import config as config_lib
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import open_checkpoints
from tests.benchmarks import children
from tests.benchmarks.children import printed, wait_for

STEPS_PER_LIFE = 20  # on average, so that a child saves several checkpoints before it is killed
SETTINGS = {
    "model.depth": 2,
    "model.width": 32,
    "model.heads": 2,
    "train.batch": 16,
    "train.ema_decay": 0.9,
    "checkpoint.every": 5,
    "log.every": 3,
    "log.sheet_every": 0,
    "log.tensorboard": False,
    "data.flip": True,
}


@dataclasses.dataclass(frozen=True)
class Life:
    """The record of a child that was killed."""

    start: int  # step that it started from
    reached: int  # last step in its log
    pid: int
    printed: str
    warnings: list[str]
    ready_s: float  # seconds from its start until it trained
    unfinished: list[str]  # folders of the save that the kill interrupted


def start_child(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    steps: int,
    program: Sequence[str] = ("-m", "sit_jax.main"),
    log: pathlib.Path | None = None,
) -> subprocess.Popen:
    """Start or continue the run. The process prints to LOG.out and LOG.err (log: WORKDIR)."""
    flags = [
        f"--config.{key}={value}" for key, value in (SETTINGS | {"train.steps": steps}).items()
    ]
    run_flags = ["--config", "configs/digits.py", "--workdir", str(workdir)]
    return children.start([*program, *run_flags, *flags], log or workdir, cache)


def rows(workdir: pathlib.Path) -> list[tuple]:
    """Return the rows of the log without timings. A truncated last line is skipped."""
    path = workdir / "metrics.jsonl"
    names = ("step", "loss", "grad_norm", "learning_rate")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(row[name] for name in names) for row in map(json.loads, lines)]


def reached(workdir: pathlib.Path) -> int:
    """Return the last logged step."""
    return max((row[0] for row in rows(workdir)), default=0)


def unfinished(workdir: pathlib.Path) -> dict[str, int]:
    """Return {name: inode} of the folders of incomplete saves.

    Such a folder has Orbax's temporary name or lacks a manifest.
    """
    inodes = {}
    for path in (workdir / "checkpoints").glob("*"):
        try:
            if path.name.endswith("-tmp") or (
                path.name.isdigit() and not (path / "manifest.json").exists()
            ):
                inodes[path.name] = path.stat().st_ino
        except FileNotFoundError:
            pass  # it has just been renamed or deleted
    return inodes


def start_step(workdir: pathlib.Path) -> int | None:
    """Return the step from which the last child trains, or None if it has not printed it yet."""
    _, words, after = printed(workdir).partition("training from step ")
    return int(after.split()[0]) if words and "\n" in after else None


def train_and_kill(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    steps: int,
    ahead: float,
    delay_s: float,
    inside_save: bool,
) -> Life | None:
    """Start a child and kill it `delay_s` after it logged `ahead` further steps.

    With `inside_save`, wait then until a save is under way. Return None if the child ended first.
    """
    before = unfinished(workdir)
    started = time.monotonic()
    child = start_child(workdir, cache, steps)
    if not wait_for(child, lambda: start_step(workdir) is not None):
        raise RuntimeError(
            f"the child ended before it trained:\n{printed(workdir)}{printed(workdir, 'err')}"
        )
    ready = time.monotonic()
    start = start_step(workdir)
    # The rows that an earlier child logged after `start` are deleted by now: later ones are new.
    if not wait_for(child, lambda: reached(workdir) >= min(start + ahead, steps)):
        return None
    time.sleep(delay_s)
    if inside_save and not wait_for(child, lambda: unfinished(workdir).items() - before.items()):
        return None
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        return None
    return Life(
        start=start,
        reached=reached(workdir),
        pid=child.pid,
        printed=printed(workdir),
        warnings=printed(workdir, "err").splitlines(),
        ready_s=ready - started,
        unfinished=sorted(dict(unfinished(workdir).items() - before.items())),
    )


def lives(
    workdir: pathlib.Path, cache: pathlib.Path, steps: int, kills: int, seed: int = 0
) -> Iterator[Life]:
    """Kill a run of `steps` steps `kills` times, unless it ends first; yield the killed children.

    Each child is planned to get through an equal share of the steps that are left.
    """
    draw = random.Random(seed)
    start = 0
    for number in range(kills):
        ahead = draw.uniform(0, 1.5) * (steps - start) / (kills - number + 1)
        life = train_and_kill(
            workdir, cache, steps, ahead, draw.uniform(0, 0.1), inside_save=number % 2 == 1
        )
        if life is None:
            return
        start = life.start
        yield life


def finish(workdir: pathlib.Path, cache: pathlib.Path, steps: int) -> None:
    """Continue the run to its end."""
    children.succeed(start_child(workdir, cache, steps), workdir)


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the parameters, EMA and moments at the end of a run, by name."""
    config = config_lib.load(str(workdir / "config.json"))
    with open_checkpoints(config, workdir) as checkpoints:
        step, _ = checkpoints.newest_complete()
        state = checkpoints.restore(config.train.steps, set_up(config).abstract_state.items())
    assert step == config.train.steps
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def differences(killed: pathlib.Path, straight: pathlib.Path) -> list[str]:
    """Return the bitwise differences between two finished runs, one sentence each."""
    actual = final_arrays(killed)
    expected = final_arrays(straight)
    sentences = [
        f"{name} differs" for name in expected if actual[name].tobytes() != expected[name].tobytes()
    ]
    if rows(killed) != rows(straight):
        different = sorted(set(rows(killed)) ^ set(rows(straight)))[:6]
        sentences.append(f"the logs differ in rows {different}, or in order or number")
    logged = [row[0] for row in rows(straight)]
    steps = logged[-1]
    every = SETTINGS["log.every"]
    if logged != sorted({*range(every, steps + 1, every), steps}):
        sentences.append("the log of the run that was never killed lacks or repeats a row")
    return sentences
