"""Are equal runs equal on this machine's GPU? Train twice, and once killed and continued.

    python -m tests.benchmarks.repeat --out repeat.json

Three networks train in three processes each: float32 on digits; bfloat16 with cuDNN's attention on
random images (on a CPU, with einsums), with precision.deterministic and as it is by default. In the
first two cases every process has its own empty compilation cache, so it chooses its own kernels. In
the last the first process fills a cache that the others read. The third process is killed halfway
and started again. The arrays of the last checkpoints, and the logs, must be bitwise equal, except
in the last case, of which nothing is promised; otherwise the status is 1.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import sys
import tempfile
import time

import jax
import numpy as np
from PIL import Image

from tests.benchmarks import children
from tests.benchmarks.kill_training import final_arrays, reached, rows

IMAGES = 64
RUNS = ("first", "second", "killed")
COMMON = {"log.every": 10, "log.sheet_every": 0, "log.tensorboard": False}
BFLOAT16 = {
    # 256 tokens and heads of 72, as in XL/2.
    "data.image_size": 32,
    "data.classes": 2,
    "model.name": "SiT-S/2",
    "model.depth": 2,
    "model.width": 432,
    "model.heads": 6,
    "train.batch": 32,
    "precision.compute": "bfloat16",
}
BY_DEFAULT = "bfloat16, images, one cache"
CASES = {
    "float32, digits": ("configs/digits.py", {}),
    "bfloat16, images, precision.deterministic": (
        "configs/folder.py",
        BFLOAT16 | {"precision.deterministic": True},
    ),
    BY_DEFAULT: ("configs/folder.py", BFLOAT16),
}


def write_images(folder: pathlib.Path) -> None:
    """Write random images of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    for number, image in enumerate(pixels):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


class Run:
    """One training run, with a compilation cache of its own, or of its case."""

    def __init__(self, folder: pathlib.Path, case: str, name: str, steps: int):
        config, settings = CASES[case]
        settings = COMMON | settings | {"train.steps": steps, "checkpoint.every": steps // 4}
        if config == "configs/folder.py":
            settings["data.path"] = folder / "images"
        stem = f"{list(CASES).index(case)}-{name}"
        self.workdir = folder / stem
        self.cache = folder / ("cache" if case == BY_DEFAULT else f"{stem}-cache")
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        self.command = ["-m", "sit_jax.main", "--config", config, "--workdir", str(self.workdir)]
        self.command += flags

    def start(self) -> None:
        """Start the run, or continue it, with a part of the GPU's memory."""
        variables = {
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        self.child = children.start(self.command, self.workdir, self.cache, variables)

    def kill(self, step: int) -> None:
        """Kill the run when it has logged this step. Raises RuntimeError if it ends before."""
        if not children.wait_for(self.child, lambda: reached(self.workdir) >= step):
            raise RuntimeError(f"the run ended early:\n{children.printed(self.workdir, 'err')}")
        self.child.send_signal(signal.SIGKILL)
        if self.child.wait() != -signal.SIGKILL:
            raise RuntimeError("the run ended before it was killed; give more --steps")

    def complete(self, kill_at: int | None = None) -> None:
        """Run to the end, with `kill_at` in two processes. Raises RuntimeError if it fails."""
        self.start()
        if kill_at is not None:
            self.kill(kill_at)
            self.start()
        children.succeed(self.child, self.workdir)


def compare(first: Run, other: Run) -> dict[str, object]:
    """Return how many arrays of the last checkpoints differ, and whether the logs do."""
    expected, actual = final_arrays(first.workdir), final_arrays(other.workdir)
    different = [
        name for name in expected if expected[name].tobytes() != actual[name].tobytes()
    ]  # fmt: skip
    return {
        "arrays": len(expected),
        "differ": len(different),
        "names": different[:5],
        "logs_equal": rows(first.workdir) == rows(other.workdir),
    }


def measure(folder: pathlib.Path, steps: int) -> list[dict[str, object]]:
    """Train all runs; compare the second and the killed one of each case to the first."""
    write_images(folder / "images")
    runs = {(case, name): Run(folder, case, name, steps) for case in CASES for name in RUNS}
    kill_at = {"killed": steps // 2}
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:

        def start(case: str, name: str) -> concurrent.futures.Future:
            return pool.submit(runs[case, name].complete, kill_at.get(name))

        ends = [start(case, name) for case, name in runs if case != BY_DEFAULT]
        start(BY_DEFAULT, RUNS[0]).result()
        ends += [start(BY_DEFAULT, name) for name in RUNS[1:]]
        for end in ends:
            end.result()
    return [
        {"case": case, "run": name, **compare(runs[case, "first"], runs[case, name])}
        for case in CASES
        for name in RUNS[1:]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of each run (default: 400)")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    if arguments.steps < 80:
        parser.error(f"--steps is {arguments.steps}; expected 80 or more, to be killed halfway")
    jax.config.update("jax_platforms", "cpu")  # this process only compares
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        comparisons = measure(pathlib.Path(folder), arguments.steps)
        printed = children.printed(pathlib.Path(folder) / "0-first")
    report = {
        "devices": next(line for line in printed.splitlines() if line.startswith("devices: ")),
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "steps": arguments.steps,
        "seconds": round(time.monotonic() - start, 1),
        "comparisons": comparisons,
    }
    print(f"{report['devices']}, jax {jax.__version__}, {report['seconds']} s")
    print("| network | run | arrays that differ from the first run | log |\n|---|---|---|---|")
    for row in comparisons:
        log = "equal" if row["logs_equal"] else "differs"
        print(f"| {row['case']} | {row['run']} | {row['differ']} of {row['arrays']} | {log} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    promised = [row for row in comparisons if row["case"] != BY_DEFAULT]
    return int(any(row["differ"] or not row["logs_equal"] for row in promised))


if __name__ == "__main__":
    sys.exit(main())
