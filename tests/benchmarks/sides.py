"""Compare two programs that do the same work, each in its own process, which are timed in turns.

A side is a function of the options that returns its calls by name. Each call returns when its work
is done. A ratio is the first side's time over the second's in one pair of turns.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Turn(NamedTuple):
    """A call with something to do before its time starts."""

    prepare: Callable[[], object]
    work: Callable[[], object]


Calls = Mapping[str, Callable[[], object] | Turn]
Sides = Mapping[str, Callable[[argparse.Namespace], Calls]]


def run(
    parser: argparse.ArgumentParser, sides: Sides, targets: Mapping[str, float], *, memory: bool
) -> None:
    """Add --one-core and --repeats to the flags, print the table, exit with 1 on a missed target.

    `targets` maps each call to the ratio that the lower quartile must reach. With `memory`, the
    second side must not need more memory than the first.
    """
    parser.add_argument(
        "--repeats", type=int, default=25, help="pairs of turns (default: %(default)s)"
    )
    parser.add_argument(
        "--one-core", action="store_true", help="one thread each; processor time, not wall time"
    )
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _work(sides[options.side], options)
    else:
        sys.exit(0 if _compare(list(sides), targets, options.repeats, memory) else 1)


def _work(side: Callable[[argparse.Namespace], Calls], options: argparse.Namespace) -> None:
    """Run a side as a child process.

    Print the seconds of the call that each line on stdin names, and at the end the peak GiB.
    """
    if options.one_core:
        # Before the frameworks are imported, since they create one thread per core.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    clock = time.process_time if options.one_core else time.perf_counter
    turns = {
        name: call if isinstance(call, Turn) else Turn(lambda: None, call)
        for name, call in side(options).items()
    }
    for turn in turns.values():
        for _ in range(3):
            turn.work()
    print("ready", flush=True)
    for line in sys.stdin:
        turn = turns[line.strip()]
        turn.prepare()
        start = clock()
        turn.work()
        print(clock() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


class _Child:
    """A process that runs one side and answers over pipes."""

    def __init__(self, side: str):
        command = [sys.executable, *sys.argv, "--side", side]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()  # ready

    def _read(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: a side ended with code {self._process.wait()}; its message is above")
        return line

    def seconds(self, call: str) -> float:
        self._process.stdin.write(call + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def peak_memory(self) -> float:
        self._process.stdin.close()
        return float(self._read())


def _compare(sides: list[str], targets: Mapping[str, float], repeats: int, memory: bool) -> bool:
    """Print the table; return True if every target is met."""
    children = [_Child(side) for side in sides]
    print(f"{'':12}{sides[0]:>24}{sides[1]:>24}{'ratio':>24}  target")
    passed = True
    for call, target in targets.items():
        turns = [[child.seconds(call) for child in children] for _ in range(repeats)]
        first, second = np.array(turns).T
        rows = [first * 1e3, second * 1e3, first / second]
        low, middle, high = np.percentile(rows, [25, 50, 75], axis=1)
        cells = [
            f"{m:.{d}f} ({a:.{d}f}..{b:.{d}f})"
            for a, m, b, d in zip(low, middle, high, (0, 0, 2), strict=True)
        ]
        met = low[2] >= target
        verdict = "met" if met else "missed"
        times = f"{cells[0]:>21} ms{cells[1]:>21} ms"
        print(f"{call:12}{times}{cells[2]:>24}  {target:.2f} {verdict}", flush=True)
        passed &= met
    first, second = (child.peak_memory() for child in children)
    if memory:
        verdict = "met" if second <= first else "missed"
        sizes = f"{first:>20.2f} GiB{second:>20.2f} GiB"
        print(f"{'peak memory':12}{sizes}{first / second:>24.2f}  1.00 {verdict}")
        passed &= second <= first
    return bool(passed)
