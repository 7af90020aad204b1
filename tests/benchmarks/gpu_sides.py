"""The child processes of gpu_speed.py, which hold the programs that it times.

    python -m tests.benchmarks.gpu_sides '[["ours", "training", "bfloat16", 128, "SiT-XL/2"]]'

A child prepares its programs, answers what preparing each of them took, and then times or profiles
the program that each line on stdin names. Without tasks it answers what it finds on the machine.

A program makes `UNITS` training steps, or samples in that many steps of Euler's method, waits until
that is done and returns a number to check. Weights are random: products of zeros would take less
power, and so less time.
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCALE = 4.0
# Steps or evaluations of a program. After a wait, the host takes 50 ms to start the first of our
# training steps (H200, XL/2); later ones start while the device is busy, as in a real run.
UNITS = {"training": 12, "sampling": 10}
# The formats of each side; training takes the first.
FORMATS = {"ours": ("bfloat16", "TF32"), "torch.compile": ("bfloat16",), "torch eager": ("TF32",)}

Program = Callable[[], float]


class Task(NamedTuple):
    """A program to time."""

    side: str  # of `FORMATS`
    part: str  # of `UNITS`
    format: str
    batch: int
    model: str
    remat: str = "dots"  # our model.remat, in training

    def __str__(self) -> str:
        remat = "" if self.remat == "dots" else f" remat {self.remat}"
        return f"{self.side} {self.part} {self.format} batch {self.batch}{remat}"


def machine() -> dict[str, Any]:
    """Return the device that both frameworks find, its memory, and the versions."""
    import jax
    import torch

    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    return {
        "gpu": gpu,
        "device": torch.cuda.get_device_name(0) if gpu else "no GPU",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if gpu else None,
        "jax sees": str(jax.devices()[0]),
        "torch sees": "a GPU" if torch.cuda.is_available() else "no GPU",
        "jax": jax.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


class ChildEnded(Exception):
    """A child ended before it answered."""


class Child:
    """A process that holds the programs of one side and answers over pipes."""

    def __init__(self, arguments: Sequence[str], environment: dict, log: IO, seconds: float):
        command = [sys.executable, "-m", "tests.benchmarks.gpu_sides", *arguments]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._late = threading.Event()
        self._timer = threading.Timer(max(1.0, seconds), self._stop)
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        self._late.set()
        self._process.kill()

    def answer(self) -> dict:
        """Wait for the next answer. Raises ChildEnded if there is none."""
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        if self._late.is_set():
            raise ChildEnded("stopped, since its time was up")
        raise ChildEnded(f"ended with code {code}; its messages are in gpu_speed.log")

    def ask(self, do: str, task: Task) -> dict:
        """Have the child "time" or "profile" a program; return its answer."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps({"do": do, "task": task}), file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Let the child end, which gives its memory back."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._timer.cancel()


def serve(tasks: list[Task], requests: Iterable[str], reply: Callable[[dict], None]) -> None:
    """Prepare the programs of one framework, then time and profile them as requested."""
    name = "gpu_ours" if tasks[0].side == "ours" else "gpu_torch"
    framework = importlib.import_module(f"tests.benchmarks.{name}")
    framework.start()

    def answer(function: Callable[..., dict], *arguments: Any) -> None:
        try:
            reply(function(framework, *arguments))
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reply({"error": line[:300], "memory": framework.out_of_memory(error)})

    programs: dict[Task, Program] = {}
    for task in tasks:
        answer(_prepare, task, programs)
    for line in requests:
        request = json.loads(line)
        task = Task(*request["task"])
        answer({"time": _time, "profile": _profile}[request["do"]], task, programs[task])


def _prepare(framework: Any, task: Task, programs: dict[Task, Program]) -> dict:
    framework.peak_bytes()  # forget the tasks before
    times = [time.perf_counter()]
    program = framework.prepare(task)
    for _ in range(2):
        times.append(time.perf_counter())
        program()
    times.append(time.perf_counter())
    programs[task] = program
    make, first, second = np.diff(times)
    return {
        "make_s": make,
        "compile_s": max(0.0, first - second),
        "peak_gib": framework.peak_bytes() / 2**30,
    }


def _time(framework: Any, task: Task, program: Program) -> dict:
    start = time.perf_counter()
    result = program()
    seconds = time.perf_counter() - start
    if not math.isfinite(result):
        raise ValueError(f"the result is {result}")
    return {"ms": seconds * 1e3 / UNITS[task.part]}


def _profile(framework: Any, task: Task, program: Program) -> dict:
    from tests.benchmarks import gpu_kernels

    return gpu_kernels.summary(framework.trace(program), UNITS[task.part])


@contextlib.contextmanager
def _replies() -> Iterator[Callable[[dict], None]]:
    """Give a function that prints a line of JSON to stdout; all else goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield lambda message: print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    with _replies() as _reply:
        if len(sys.argv) == 1:
            _reply(machine())
        else:
            serve([Task(*task) for task in json.loads(sys.argv[1])], sys.stdin, _reply)
