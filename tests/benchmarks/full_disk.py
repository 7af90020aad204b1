"""Runs jobs on a file system without room, and again when there is room.

Each works in a folder on a small tmpfs, which only root may mount.
"""

import contextlib
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator

from tests.benchmarks import children, kill_jobs, kill_training

_BYTES = 64 * 2**20
_STEPS = 600
_SOON_S = 60  # a job on a full disk ends within this time, the start of Python included
_ROOM = (0, 20_000)  # bytes left on the full disk


@contextlib.contextmanager
def _mounted(folder: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Yield a new small file system at `folder`; None if this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_BYTES}", "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True, check=False).returncode:
            yield None
            return
    except FileNotFoundError:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(disk: pathlib.Path, room: int) -> pathlib.Path:
    """Return a file that takes all of the disk but about `room` bytes."""
    path = disk / "fill"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with open(path, "r+b") as file:
        file.truncate(max(path.stat().st_size - room, 0))
    return path


def _faults_of_end(log: pathlib.Path, status: int, seconds: float) -> list[str]:
    """Return the faults in how a job ended on a full disk, one phrase each."""
    lines = children.printed(log, "err").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    others = [line for line in lines if not line.startswith(("error: ", "warning: "))]
    failures = []
    if status != 2 or len(errors) != 1 or others:
        failures.append(f"on a full disk it ends with status {status}: {lines[-4:]}")
    if seconds > _SOON_S:
        failures.append(f"on a full disk it takes {seconds:.0f} s")
    print(f"  on the full disk, {seconds:.1f} s, {len(lines)} lines; the last: {lines[-1:]}")
    return failures


def _check_job(
    job: kill_jobs.KilledJob, base: pathlib.Path, quiet: pathlib.Path, cache: pathlib.Path
) -> list[str]:
    """Run a job in copies of the base on full disks, then with room; return the faults."""
    failures = []
    for room in _ROOM:
        with _mounted(quiet.parent / "disk") as disk:
            assert disk
            copy = shutil.copytree(base, disk / "copy")
            log = quiet.parent / "log"
            fill = _fill(disk, room)
            started = time.monotonic()
            child = children.start([text.format(copy) for text in job.command], log, cache)
            failures += _faults_of_end(log, children.end(child), time.monotonic() - started)
            fill.unlink()
            child = children.start([text.format(copy) for text in job.command], log, cache)
            children.succeed(child, log)
            failures += kill_jobs.differences(job, copy, quiet)
        disk.rmdir()
    return failures


def _check_training(folder: pathlib.Path, cache: pathlib.Path, after: int | None) -> list[str]:
    """Train on a disk that is full from the start, or from step `after` on; then with room."""
    failures = []
    with _mounted(folder / "disk") as disk:
        assert disk
        workdir, log = disk / "run", folder / "run"
        if after is None:
            _fill(disk, 0)
        started = time.monotonic()
        child = kill_training.start_child(workdir, cache, _STEPS, log=log)
        if after is not None:
            children.wait_for(child, lambda: kill_training.reached(workdir) >= after)
            _fill(disk, 0)
        failures += _faults_of_end(log, children.end(child), time.monotonic() - started)
        (disk / "fill").unlink()
        children.succeed(kill_training.start_child(workdir, cache, _STEPS, log=log), log)
        failures += kill_training.differences(workdir, folder / "straight")
    disk.rmdir()
    return failures


def check(folder: pathlib.Path, cache: pathlib.Path) -> list[str]:
    """Run training and four other jobs on full disks; return the faults."""
    with _mounted(folder / "probe") as disk:
        if disk is None:
            print("skipped: only root may mount a small file system")
            return []
    base = kill_jobs.make_base(folder, cache)
    kill_training.finish(folder / "straight", cache, _STEPS)
    failures = []
    for after in (None, 30):
        print(f"training, full from step {after or 0} on")
        failures += [f"train: {text}" for text in _check_training(folder, cache, after)]
    for name in ("sample", "likelihood", "from_torch", "to_torch"):
        print(name)
        quiet = shutil.copytree(base, folder / name / "quiet")
        job = kill_jobs.JOBS[name]
        children.succeed(job.start(quiet, cache), quiet)
        failures += [f"{name}: {text}" for text in _check_job(job, base, quiet, cache)]
    return failures
