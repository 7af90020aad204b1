"""Check that every job survives SIGKILL and a full disk: it ends like one that nothing disturbed.

    python tests/benchmarks/kill_resume.py                       # 120 kills of training, 20 of each
    python tests/benchmarks/kill_resume.py --only sample --kills 30
    python tests/benchmarks/kill_resume.py --only train,lock,disk --workdir DIR

Takes about 50 minutes on 2 shared cores. Children run the command line on a tiny model of digits:

- train: killed at random times, every second time during a save. Each child takes the lock of the
  dead one over. Parameters, EMA, moments and log rows are compared with those of a run that was
  never killed.
- sample, sample npz, sweep, invert, likelihood, quality, from_torch, to_torch and the two with
  --overwrite: killed at random times after their first write. Their files are compared byte by
  byte, without the seconds, and no other file is left.
- lock: a second run in the workdir of one that trains is refused, and the first is not disturbed.
- disk: on a file system that is full, each ends in one line; with room again it ends as if nothing
  had happened. This mounts a tmpfs, which needs root, and is skipped otherwise.

Exits with 1 at any difference.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import children, full_disk, kill_jobs, kill_training
from tests.benchmarks.kill_training import Life, finish, lives

KILLS_OF_TRAINING = 120
KILLS_OF_A_JOB = 20
_LISTED = 8  # differences


def train(folder: pathlib.Path, cache: pathlib.Path, kills: int) -> list[str]:
    """Train with and without kills; return the differences."""
    killed, straight = folder / "killed", folder / "straight"
    steps = kill_training.STEPS_PER_LIFE * (kills + 1)
    started = time.monotonic()
    finish(straight, cache, steps)
    print(f"{steps} steps without a kill: {time.monotonic() - started:.1f} s", flush=True)
    dead: list[Life] = []
    failures = []
    for life in lives(killed, cache, steps, kills):
        if dead and f"is taken over from process {dead[-1].pid} on" not in life.printed:
            failures.append(f"child {len(dead) + 1} did not say that it takes the lock over")
        dead.append(life)
        print_life(len(dead), life, killed)
    finish(killed, cache, steps)

    restarts = dead[1:]
    seconds = [life.ready_s for life in dead]
    print(
        f"{len(dead)} kills, {sum(bool(life.unfinished) for life in dead)} during a save\n"
        f"{sum(bool(life.warnings) for life in restarts)} restarts passed over an unfinished save\n"
        f"seconds from a start until it trains: median {statistics.median(seconds):.1f}, "
        f"longest {max(seconds):.1f}; {time.monotonic() - started:.0f} s in total"
    )
    failures += kill_training.differences(killed, straight)
    if len(dead) < kills:
        failures.append(f"the run ended after {len(dead)} of {kills} kills")
    arrays = len(kill_training.final_arrays(straight))
    print(f"{arrays} arrays and {len(kill_training.rows(straight))} log rows compared")
    return failures


def print_life(number: int, life: Life, workdir: pathlib.Path) -> None:
    """Print when a child was killed, and its warnings."""
    where = (
        f"during the save of {', '.join(life.unfinished)}" if life.unfinished else "not in a save"
    )
    print(
        f"child {number:3}: from step {life.start:4}, killed after step {life.reached:4}, {where}",
        flush=True,
    )
    for warning in life.warnings:
        print(f"           it printed: {warning.replace(str(workdir), 'RUN')}", flush=True)


def lock(folder: pathlib.Path, cache: pathlib.Path) -> list[str]:
    """Start a second run beside one that trains; return the faults."""
    steps = 600
    straight, workdir, second = (folder / name for name in ("straight", "run", "second"))
    finish(straight, cache, steps)
    first = kill_training.start_child(workdir, cache, steps)
    children.wait_for(first, lambda: kill_training.reached(workdir))
    arguments = ["-m", "sit_jax.main", "--workdir", str(workdir)]
    status = children.end(children.start(arguments, second, cache))
    failures = []
    line = children.printed(second, "err")
    if status != 2 or line.count("\n") != 1 or f"in use by process {first.pid} on" not in line:
        failures.append(f"the second run ended with status {status} and {line!r}")
    if first.poll() is not None:
        failures.append("the first run had ended, so this has shown nothing")
    children.succeed(first, workdir)
    print(f"the second run said: {line.replace(str(folder), 'DIR')}", end="")
    return failures + kill_training.differences(workdir, straight)


def run(only: list[str], kills: int | None, folder: pathlib.Path) -> bool:
    """Run the parts; return True if nothing differs."""
    cache = folder / "cache"
    is_same = True
    for name in only:
        started = time.monotonic()
        (folder / name).mkdir(parents=True)
        print(f"== {name}", flush=True)
        if name == "train":
            failures = train(folder / name, cache, kills or KILLS_OF_TRAINING)
        elif name == "lock":
            failures = lock(folder / name, cache)
        elif name == "disk":
            failures = full_disk.check(folder / name, cache)
        else:
            count = kills or KILLS_OF_A_JOB
            failures = kill_jobs.check(kill_jobs.JOBS[name], folder / name, cache, count)
        is_same &= not failures
        more = [f"and {len(failures) - _LISTED} more"] if len(failures) > _LISTED else []
        result = "; ".join(["DIFFERENT", *failures[:_LISTED], *more]) if failures else "equal"
        print(f"{name}: {result}, {time.monotonic() - started:.0f} s", flush=True)
    return is_same


if __name__ == "__main__":
    parts = ["train", *kill_jobs.JOBS, "lock", "disk"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        help=f"kills of each job (default: {KILLS_OF_TRAINING} of training, {KILLS_OF_A_JOB} of "
        "every other)",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=parts,
        metavar="JOB[,JOB]",
        help=f"only these of {', '.join(parts)}",
    )
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        help="new folder in which to keep the runs (default: a temporary one)",
    )
    flags = parser.parse_args()
    if unknown := set(flags.only) - set(parts):
        parser.error(f"unknown job {', '.join(sorted(unknown))}; known: {', '.join(parts)}")
    with tempfile.TemporaryDirectory() as temporary:
        main_folder = flags.workdir or pathlib.Path(temporary)
        main_folder.mkdir(parents=True, exist_ok=True)
        sys.exit(not run(flags.only, flags.kills, main_folder.resolve()))
