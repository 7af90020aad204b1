"""Kills every job but training at random times, and compares its files with those of a quiet run.

Each job works in a copy of a folder with a trained run and a PyTorch checkpoint of it.
"""

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable

import numpy as np
from PIL import Image

from tests.benchmarks import children, kill_training

_MAIN = ("-m", "sit_jax.main", "--workdir", "{}/run")
_STEPS = 20  # of the trained run
_IMAGES = 600


@dataclasses.dataclass(frozen=True)
class KilledJob:
    """A command, with {} for its folder, and the path there that it creates."""

    command: tuple[str, ...]
    output: str
    is_once: bool = False  # True: refused if the output already exists
    is_workdir: bool = False  # True: the output has checkpoints, whose file names are random

    def start(self, folder: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
        """Start the command in a folder. It prints to FOLDER.out and FOLDER.err."""
        return children.start([text.format(folder) for text in self.command], folder, cache)


def _mode(mode: str, folder: str, **settings: object) -> KilledJob:
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return KilledJob((*_MAIN, "--mode", mode, *flags), f"run/{folder}")


def _encode() -> KilledJob:
    settings = {
        "data.path": "{}/images", "data.image_size": 32, "data.classes": 2, "data.workers": 0,
        "latents.path": "tests/golden/vae_legacy", "latents.batch": 2, "encode.shard": 20,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ("-m", "sit_jax.main", "--mode", "encode", "--config", "configs/imagenet.py")
    return KilledJob((*command, "--workdir", "{}/latents", *flags), "latents")


_FROM = ("-m", "convert.from_torch", "{}/run.pt")
_TO = ("-m", "convert.to_torch", "{}/run")
JOBS = {
    "sample": _mode(
        "sample", "samples", sample__count=160, sample__batch=8, sample__frames=3, sample__steps=4
    ),
    "sample npz": _mode(
        "sample", "samples", sample__format="npz", sample__count=2000, sample__microbatch=8,
        sample__steps=20,
    ),
    "sweep": _mode(
        "sweep", "sweeps", sweep__count=40, sweep__steps="2,3", sweep__solvers="euler,heun",
        sweep__reference_count=100,
    ),
    "invert": _mode("invert", "inversions", sample__count=120, sample__batch=8, sample__steps=4),
    "likelihood": _mode("likelihood", "likelihood", likelihood__count=120, likelihood__batch=8),
    "quality": _mode("quality", "quality", sample__count=40, sample__steps=4),
    "encode": _encode(),
    "from_torch": KilledJob((*_FROM, "{}/new"), "new", is_once=True, is_workdir=True),
    "from_torch --overwrite": KilledJob(
        (*_FROM, "{}/old", "--overwrite"), "old", is_workdir=True
    ),
    "to_torch": KilledJob((*_TO, "{}/new.pt"), "new.pt", is_once=True),
    "to_torch --overwrite": KilledJob((*_TO, "{}/run.pt", "--overwrite"), "run.pt"),
}  # fmt: skip


def make_base(folder: pathlib.Path, cache: pathlib.Path) -> pathlib.Path:
    """Return a folder with a trained workdir "run", its checkpoint run.pt, a workdir "old", images.

    The images are of noise, in two classes.
    """
    base = folder / "base"
    base.mkdir()
    for number in range(_IMAGES):
        path = base / "images" / str(number % 2) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    # The second is an older one, for --overwrite to replace.
    for name, steps in (("run", _STEPS), ("old", _STEPS // 2)):
        kill_training.finish(base / name, cache, steps)
        for stream in ("out", "err"):
            (base / f"{name}.{stream}").unlink()
    log = folder / "to_torch"
    children.succeed(
        children.start(["-m", "convert.to_torch", f"{base}/run", f"{base}/run.pt"], log, cache), log
    )
    return base


def contents(folder: pathlib.Path, job: KilledJob) -> dict[str, object]:
    """Return everything in a folder by relative name; of a new workdir the arrays and the rest."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found: dict[str, object] = {str(path.relative_to(folder)): _content(path) for path in files}
    if not job.is_workdir:
        return found
    output = folder / job.output
    inside = f"{job.output}/checkpoints/"
    found = {name: content for name, content in found.items() if not name.startswith(inside)}
    found.pop(f"{job.output}/run.json")  # a random id
    for path in (output / "checkpoints").iterdir():
        found[f"{inside}{path.name}/note"] = (path / "note" / "metadata").read_bytes()
    return found | {
        f"{inside}{name}": array.tobytes()
        for name, array in kill_training.final_arrays(output).items()
    }


def _content(path: pathlib.Path) -> object:
    """Return a file's content without the column of seconds."""
    if path.name == "results.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    if path.name in ("table.csv", "table.md"):
        mark = {".csv": ",", ".md": "|"}[path.suffix]
        table = list(csv.reader(path.read_text().splitlines(), delimiter=mark))
        seconds = [name.strip() for name in table[0]].index("seconds")
        return [row[:seconds] + row[seconds + 1 :] for row in table]
    if path.name == "manifest.json" and path.parent.name == "latents":
        manifest = json.loads(path.read_text())
        del manifest["source"]["path"]  # of this copy of the images
        return manifest
    return path.read_bytes()


def differences(
    job: KilledJob, disturbed: pathlib.Path, quiet: pathlib.Path, ignored: Iterable[str] = ()
) -> list[str]:
    """Return the differences between two folders in which a job has ended, one phrase each."""
    actual, expected = contents(disturbed, job), contents(quiet, job)
    names = sorted((actual.keys() | expected.keys()) - set(ignored))
    return [
        f"{name} {'differs' if name in actual and name in expected else _extra(name, actual)}"
        for name in names
        if name not in actual or name not in expected or actual[name] != expected[name]
    ]


def _extra(name: str, actual: dict[str, object]) -> str:
    return "is left" if name in actual else "is missing"


def _entries(folder: pathlib.Path) -> set[tuple[str, int]]:
    """Return (path, inode) of everything in a folder, at any depth, while a job changes it."""
    found: set[tuple[str, int]] = set()
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = os.path.join(path, name)
            with contextlib.suppress(FileNotFoundError):
                found.add((entry, os.lstat(entry).st_ino))
    return found


def _is_being_replaced(folder: pathlib.Path) -> bool:
    return any(folder.glob(".*.new")) or any(folder.glob(".*.old"))


def _kill(
    job: KilledJob, folder: pathlib.Path, cache: pathlib.Path, delay_s: float, at_renames: bool
) -> bool:
    """Start the job and kill it `delay_s` after its first write; return False if it ended first.

    With `at_renames`, kill it as soon as it begins to replace a folder.
    """
    before = _entries(folder)
    child = job.start(folder, cache)
    if at_renames:
        children.wait_for(child, lambda: _is_being_replaced(folder), poll_s=0)
    elif children.wait_for(child, lambda: _entries(folder) - before):
        time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def _quiet_run(
    job: KilledJob, base: pathlib.Path, folder: pathlib.Path, cache: pathlib.Path
) -> float:
    """Run the job in a copy of the base; return the seconds from its first write to its end."""
    shutil.copytree(base, folder)
    before = _entries(folder)
    child = job.start(folder, cache)
    children.wait_for(child, lambda: _entries(folder) - before)
    wrote = time.monotonic()
    children.succeed(child, folder)
    return time.monotonic() - wrote


def check(job: KilledJob, folder: pathlib.Path, cache: pathlib.Path, kills: int) -> list[str]:
    """Kill a job this often, in as many copies as that takes; return the differences.

    A child is killed at a random time between its first write and its end, and where the job
    replaces a folder, every second one as soon as it begins to.
    """
    base = make_base(folder, cache)
    _quiet_run(job, base, folder / "compiled", cache)  # fills the cache of compiled programs
    quiet = folder / "quiet"
    duration = _quiet_run(job, base, quiet, cache)
    replaces_folder = job.is_workdir and not job.is_once
    draw = random.Random(0)
    failures = []
    killed = copies = in_renames = 0
    while killed < kills and copies < 4 * kills:
        copies += 1
        copy = shutil.copytree(base, folder / f"copy{copies}")
        is_done = False
        while killed < kills and not is_done:
            at_renames = replaces_folder and killed % 2 == 1
            if _kill(job, copy, cache, draw.uniform(0, duration), at_renames):
                killed += 1
                in_renames += _is_being_replaced(copy)
                is_done = job.is_once and (copy / job.output).exists()
            else:
                is_done = True
        if not is_done:
            children.succeed(job.start(copy, cache), copy)
        failures += [f"copy {copies}: {text}" for text in differences(job, copy, quiet)]
        shutil.rmtree(copy)
    renames = f", {in_renames} of them between two renames" if replaces_folder else ""
    print(f"{killed} kills{renames}, {copies} jobs, {duration:.1f} s from first write to end")
    if killed < kills:
        failures.append(f"only {killed} of {kills} kills struck")
    return failures
