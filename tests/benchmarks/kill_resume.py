"""Whether a training run survives SIGKILL at any moment: killed again and again, it ends as one never killed.

    python tests/benchmarks/kill_resume.py [--kills 50] [--workdir DIR]

Trains a tiny model on digits as a child process, which is killed at random times, every second time inside a save, and
started again with the same command until it ends by itself. Then its parameters, EMA, moments and log rows are compared
bitwise with those of a run that was never killed. Exits with 1 at any difference.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sit_jax import config as config_lib
from sit_jax.jobs import train
from sit_jax.jobs.setup import set_up

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS_PER_LIFE = 20  # planned, so that a life passes several checkpoints
SETTINGS = {
    "model.depth": 2, "model.width": 32, "model.heads": 2, "train.batch": 16, "train.ema_decay": 0.9,
    "checkpoint.every": 5, "log.every": 3, "log.sheet_every": 0, "log.tensorboard": False, "data.flip": True,
}  # fmt: skip
_TIMEOUT_S = 180  # for one thing to happen in a child


@dataclasses.dataclass(frozen=True)
class Life:
    """What became of a child that was killed."""

    start: int  # the step it started from
    reached: int  # the last step in its log
    warnings: list[str]
    ready_s: float  # from its start until it trained
    unfinished: list[str]  # the folders of the save that the kill interrupted


def start_child(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    steps: int,
    program: Sequence[str] = ("-m", "sit_jax.main"),
) -> subprocess.Popen:
    """The run, or what is left of it, as a process that writes to workdir.out and workdir.err."""
    flags = [
        f"--config.{key}={value}" for key, value in (SETTINGS | {"train.steps": steps}).items()
    ]
    command = [
        sys.executable,
        *program,
        "--config",
        "configs/digits.py",
        "--workdir",
        str(workdir),
        *flags,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(f"{workdir}.out", "wb") as out, open(f"{workdir}.err", "wb") as err:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=err)


def printed(workdir: pathlib.Path, stream: str = "out") -> str:
    """What the last child wrote so far."""
    return pathlib.Path(f"{workdir}.{stream}").read_text()


def wait_for(child: subprocess.Popen, condition: Callable[[], object]) -> bool:
    """Returns whether the condition came true before the child ended."""
    end = time.monotonic() + _TIMEOUT_S
    while not condition():
        if child.poll() is not None:
            return False
        if time.monotonic() > end:
            child.kill()
            raise TimeoutError(f"{' '.join(child.args)} hangs")
        time.sleep(0.001)
    return True


def rows(workdir: pathlib.Path) -> list[tuple]:
    """The log's rows, without what depends on the clock; a torn last line is left out."""
    path, names = workdir / "metrics.jsonl", ("step", "loss", "grad_norm", "learning_rate")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(row[name] for name in names) for row in map(json.loads, lines)]


def reached(workdir: pathlib.Path) -> int:
    return max((row[0] for row in rows(workdir)), default=0)


def unfinished(workdir: pathlib.Path) -> dict[str, int]:
    """The folders of saves that are not whole, by Orbax's name for them or by the lack of a manifest: {name: inode}."""
    found = {}
    for path in (workdir / "checkpoints").glob("*"):
        try:
            if path.name.endswith("-tmp") or (
                path.name.isdigit() and not (path / "manifest.json").exists()
            ):
                found[path.name] = path.stat().st_ino
        except FileNotFoundError:
            pass  # it has just been renamed, or let go
    return found


def start_step(workdir: pathlib.Path) -> int | None:
    """Where the last child started to train; None before it says so."""
    _, found, after = printed(workdir).partition("training from step ")
    return int(after.split()[0]) if found and "\n" in after else None


def live_and_die(
    workdir: pathlib.Path,
    cache: pathlib.Path,
    steps: int,
    ahead: float,
    delay_s: float,
    inside_save: bool,
) -> Life | None:
    """Starts a child and kills it when `ahead` steps are logged and `delay_s` has passed, or a save is under way.

    None if it ended first.
    """
    before, began = unfinished(workdir), time.monotonic()
    child = start_child(workdir, cache, steps)
    if not wait_for(child, lambda: start_step(workdir) is not None):
        raise RuntimeError(
            f"the child ended before it trained:\n{printed(workdir)}{printed(workdir, 'err')}"
        )
    start, started = start_step(workdir), time.monotonic()
    # What an earlier run logged after `start` is gone by now: rows beyond it are this one's.
    if not wait_for(child, lambda: reached(workdir) >= min(start + ahead, steps)):
        return None
    time.sleep(delay_s)
    if inside_save and not wait_for(child, lambda: unfinished(workdir).items() - before.items()):
        return None
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        return None
    torn = sorted(dict(unfinished(workdir).items() - before.items()))
    return Life(
        start, reached(workdir), printed(workdir, "err").splitlines(), started - began, torn
    )


def lives(
    workdir: pathlib.Path, cache: pathlib.Path, steps: int, kills: int, seed: int = 0
) -> Iterator[Life]:
    """Kills a run of `steps` steps so often, if it does not end before; each life is to go through an equal share."""
    draw, start = random.Random(seed), 0
    for number in range(kills):
        ahead = draw.uniform(0, 1.5) * (steps - start) / (kills - number + 1)
        life = live_and_die(
            workdir, cache, steps, ahead, draw.uniform(0, 0.1), inside_save=number % 2 == 1
        )
        if life is None:
            return
        start = life.start
        yield life


def finish(workdir: pathlib.Path, cache: pathlib.Path, steps: int) -> None:
    """Lets the run go to its end."""
    child = start_child(workdir, cache, steps)
    wait_for(child, lambda: False)
    if child.returncode:
        raise RuntimeError(
            f"the run ended with status {child.returncode}:\n{printed(workdir, 'err')}"
        )


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters, EMA and moments at the end of a run, by name."""
    config = config_lib.load(str(workdir / "config.json"))
    with train.open_checkpoints(config, workdir) as checkpoints:
        step, _ = checkpoints.newest_complete()
        state = checkpoints.restore(config.train.steps, set_up(config).abstract_state.items())
    assert step == config.train.steps
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def differences(killed: pathlib.Path, straight: pathlib.Path) -> list[str]:
    """What is not the same, bit by bit, in two finished runs."""
    have, want = final_arrays(killed), final_arrays(straight)
    found = [f"{name} differs" for name in want if have[name].tobytes() != want[name].tobytes()]
    if rows(killed) != rows(straight):
        found.append(
            f"rows {sorted(set(rows(killed)) ^ set(rows(straight)))[:6]} are not in both logs, or not once"
        )
    steps, every = rows(straight)[-1][0], SETTINGS["log.every"]
    if [row[0] for row in rows(straight)] != sorted({*range(every, steps + 1, every), steps}):
        found.append("the log of the run that was never killed has a gap or a double")
    return found


def run(workdir: pathlib.Path, kills: int) -> bool:
    """Makes both runs, prints what happens, and returns whether they are the same."""
    cache, killed, straight = (workdir / name for name in ("cache", "killed", "straight"))
    steps, began = STEPS_PER_LIFE * (kills + 1), time.monotonic()
    finish(straight, cache, steps)
    print(f"{steps} steps without a kill: {time.monotonic() - began:.1f} s", flush=True)
    done = []
    for life in lives(killed, cache, steps, kills):
        done.append(life)
        where = (
            f"inside the save of {', '.join(life.unfinished)}"
            if life.unfinished
            else "outside of a save"
        )
        print(
            f"life {len(done):2}: from step {life.start:4}, killed after step {life.reached:4} {where}",
            flush=True,
        )
        for warning in life.warnings:
            print(f"         it said: {warning.replace(str(killed), 'RUN')}", flush=True)
    finish(killed, cache, steps)
    found, restarts = differences(killed, straight), done[1:]
    print(
        f"{len(done)} kills, {sum(bool(life.unfinished) for life in done)} of them inside a save\n"
        f"restarts from steps {', '.join(str(life.start) for life in restarts)} and {start_step(killed)}; "
        f"{sum(bool(life.warnings) for life in restarts)} had to pass over an unfinished save\n"
        f"seconds from a start until it trains: median {statistics.median(life.ready_s for life in done):.1f}, "
        f"longest {max(life.ready_s for life in done):.1f}; {time.monotonic() - began:.0f} s in all"
    )
    if len(done) < kills:
        found.append(f"the run ended after {len(done)} of {kills} kills")
    names, count = len(final_arrays(straight)), len(rows(straight))
    print(
        "DIFFERENT: " + "; ".join(found)
        if found
        else f"bitwise equal: {names} arrays and {count} log rows"
    )
    return not found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="how often the run is killed (default: 50)"
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        help="a new folder to keep the runs in; default: a temporary one",
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.workdir or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(not run(folder.resolve(), flags.kills))
