"""What share of the time the device waits between training steps, read from a profile of a digits run.

    python tests/benchmarks/device_wait.py [--steps 100]

Trains configs/digits.py in a temporary folder with `--profile` and takes, from the trace, the time in which no thread
executes a part of a compiled program, between the first and the last such event. The CPU backend is measured: its
executor's events are named below. Exits with 1 at 2 % or more.
"""

import argparse
import gzip
import json
import pathlib
import sys
import tempfile

from sit_jax import main

FIRST = 60  # after compilation and warm-up
EXECUTION = (
    "ThunkExecutor::Execute"  # and, with a suffix, the wait for the parts that other threads run
)


def busy_and_total(events: list[dict]) -> tuple[float, float]:
    """(seconds in which at least one execution runs, seconds from the first to the last)."""
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e["name"].startswith(EXECUTION)
    )
    busy, end = 0.0, spans[0][0]
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy / 1e6, (end - spans[0][0]) / 1e6


def run(steps: int) -> float:
    """Trains and returns the share of the time that the device waited."""
    with tempfile.TemporaryDirectory() as folder:
        last = FIRST + steps - 1
        flags = [
            "--config",
            "configs/digits.py",
            "--workdir",
            folder,
            "--profile",
            f"{FIRST}:{last}",
        ]
        settings = {
            "train.steps": last + 20,
            "log.sheet_every": 0,
            "checkpoint.every": 10**6,
            "log.every": 20,
        }
        status = main.main(flags + [f"--config.{key}={value}" for key, value in settings.items()])
        if status:
            sys.exit(status)
        (trace,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))
    busy, total = busy_and_total(events["traceEvents"] if isinstance(events, dict) else events)
    print(
        f"{steps} steps in {total:.2f} s, {1e3 * total / steps:.1f} ms each; the device waited {1 - busy / total:.2%}"
    )
    return 1 - busy / total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="steps in the profile (default: 100)"
    )
    sys.exit(run(parser.parse_args().steps) >= 0.02)
