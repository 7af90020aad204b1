"""Measure the share of time that the device waits between training steps, from a profile of digits.

    python tests/benchmarks/device_wait.py [--steps 100] [--latents]

Takes about 30 s on 2 cores; other busy processes on them raise the figure. Trains configs/digits.py
in a temporary folder with `--profile`; with --latents the same network reads stored latents of
8x8x4 in float16 from the disk. The device waits while no thread executes a part of a compiled
program, between the first and the last such event of the trace. Only the CPU backend is supported,
since the names of its executor's events are used. The time in which the loop waits for the readers
is said by itself.

Exits with 1 if the loop waits 2 % or more for data.
"""

import argparse
import gzip
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from sit_jax import main
from sit_jax.data import readers
from sit_jax.record import Record
from tests import caches

FIRST = 60  # the first profiled step, after compilation and warm-up
# With a suffix, an event of this name is the wait for parts that other threads execute.
EXECUTION = "ThunkExecutor::Execute"


def busy_and_total(events: list[dict]) -> tuple[float, float]:
    """Return (seconds with at least one execution, seconds from the first to the last)."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event["name"].startswith(EXECUTION)
    )
    busy = 0.0
    end = spans[0][0]  # of all spans so far
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / 1e6, (end - spans[0][0]) / 1e6


def write_latents(folder: pathlib.Path) -> dict[str, object]:
    """Write latents of noise and return the settings that read them with the digits' network."""
    plan = caches.make_plan(
        shape=(8, 8, 4), dtype="float16", examples=4096, shard_records=1024, scale=(1.0,) * 4,
        shift=(0.0,) * 4,
    )  # fmt: skip
    caches.write(folder, plan)
    return {
        "data.source": "latents", "data.path": folder, "data.split": "all", "data.channels": 4,
        "data.classes": 2, "data.flip": True, "latents.codec": "stored",
    }  # fmt: skip


def time_waits_for_data() -> list[float]:
    """Return a list that grows by the seconds that each batch is waited for."""
    waits = []
    read = readers.Batches.__next__

    def timed(batches: readers.Batches) -> Record:
        began = time.perf_counter()
        batch = read(batches)
        waits.append(time.perf_counter() - began)
        return batch

    readers.Batches.__next__ = timed
    return waits


def run(steps: int, *, latents: bool) -> float:
    """Train and return the share of time that the loop waited for data."""
    with tempfile.TemporaryDirectory() as folder:
        last = FIRST + steps - 1
        flags = ["--config", "configs/digits.py", "--workdir", f"{folder}/run"]
        profile = ["--profile", f"{FIRST}:{last}"]
        settings = {
            "train.steps": last + 20,
            "log.sheet_every": 0,
            "checkpoint.every": 10**6,
            "log.every": 20,
        }
        if latents:
            settings |= write_latents(pathlib.Path(folder) / "latents")
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        waits = time_waits_for_data()
        status = main.main(flags + profile + overrides)
        if status:
            sys.exit(status)
        (trace,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))
    busy, total = busy_and_total(events["traceEvents"] if isinstance(events, dict) else events)
    for_data = sum(waits[FIRST : FIRST + steps]) / total
    print(
        f"{steps} steps in {total:.2f} s, {1e3 * total / steps:.1f} ms each; the device waited "
        f"{1 - busy / total:.2%}, the loop waited {for_data:.2%} for data"
    )
    return for_data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="profiled steps (default: 100)")
    parser.add_argument("--latents", action="store_true", help="train from stored latents")
    options = parser.parse_args()
    sys.exit(run(options.steps, latents=options.latents) >= 0.02)
