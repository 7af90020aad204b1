"""Measure the share of time that the device waits between training steps, from a profile of digits.

    python tests/benchmarks/device_wait.py [--steps 100]

Takes about 30 s on 2 cores; other busy processes on them raise the figure. Trains configs/digits.py
in a temporary folder with `--profile`. The device waits while no thread executes a part of a
compiled program, between the first and the last such event of the trace. Only the CPU backend is
supported, since the names of its executor's events are used.

Exits with 1 at 2 % or more.
"""

import argparse
import gzip
import json
import pathlib
import sys
import tempfile

from sit_jax import main

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


def run(steps: int) -> float:
    """Train and return the share of time that the device waited."""
    with tempfile.TemporaryDirectory() as folder:
        last = FIRST + steps - 1
        flags = ["--config", "configs/digits.py", "--workdir", folder]
        profile = ["--profile", f"{FIRST}:{last}"]
        settings = {
            "train.steps": last + 20,
            "log.sheet_every": 0,
            "checkpoint.every": 10**6,
            "log.every": 20,
        }
        overrides = [f"--config.{key}={value}" for key, value in settings.items()]
        status = main.main(flags + profile + overrides)
        if status:
            sys.exit(status)
        (trace,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))
    busy, total = busy_and_total(events["traceEvents"] if isinstance(events, dict) else events)
    waited = 1 - busy / total
    print(
        f"{steps} steps in {total:.2f} s, {1e3 * total / steps:.1f} ms each; "
        f"the device waited {waited:.2%}"
    )
    return waited


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="profiled steps (default: 100)")
    sys.exit(run(parser.parse_args().steps) >= 0.02)
