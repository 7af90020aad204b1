"""How long SiT-XL/2's training step takes to compile at 28 and at 4 layers, and how soon digits reaches its first step.

    python tests/benchmarks/compile_time.py [--repeats 3]

Every figure comes from a fresh process. The step is lowered and compiled for this machine from abstract arrays:
nothing of the model is allocated. Exits with 1 if 28 layers take more than 1.3 times the time of 4, or if the second
start, which finds the compilation cache filled, takes 10 s or more to its first step.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

COMPILE = """
import sys, time, jax
from sit_jax import config, train_state
from sit_jax.jobs import setup, train
depth = sys.argv[1]
made = setup.set_up(config.load("configs/digits.py", [
    ("model.name", "SiT-XL/2"), ("model.depth", depth), ("model.width", "none"), ("model.heads", "none"),
    ("data.image_size", "32"), ("data.channels", "4"), ("data.classes", "1000"), ("train.batch", "8"),
    ("sample.batch", "8")]))
state = made.abstract_state
batch = {"image": jax.ShapeDtypeStruct((8, 32, 32, 4), "uint8"), "label": jax.ShapeDtypeStruct((8,), "int32"),
         "skipped": jax.ShapeDtypeStruct((8,), "int32")}
began = time.perf_counter()
train.make_train_step(made).lower(state, batch, {}).compile()
print(time.perf_counter() - began)
"""


def compile_seconds(depth: int) -> float:
    """Seconds to lower and compile one training step of XL/2's width."""
    command = [sys.executable, "-c", COMPILE, str(depth)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return float(done.stdout.splitlines()[-1])


def first_step_seconds(cache: str) -> float:
    """Seconds from starting `python -m sit_jax.main` on digits to the log line of its first step."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable,
            "-m",
            "sit_jax.main",
            "--config",
            "configs/digits.py",
            "--workdir",
            workdir,
        ]
        settings = ["--config.log.every=1", "--config.train.steps=3", "--config.log.sheet_every=0"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        began = time.perf_counter()
        with subprocess.Popen(
            command + settings, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            seconds = next(
                time.perf_counter() - began for line in process.stdout if line.startswith("step 1/")
            )
            process.communicate()
    return seconds


def run(repeats: int) -> bool:
    """Prints both comparisons; True if both bars are met."""
    times = {depth: [] for depth in (4, 28)}
    for _ in range(repeats):
        for depth, seconds in times.items():
            seconds.append(compile_seconds(depth))
            print(
                f"SiT-XL/2 with {depth} layers: {seconds[-1]:.1f} s to lower and compile",
                flush=True,
            )
    ratio = statistics.median(b / a for a, b in zip(times[4], times[28], strict=True))
    print(f"28 layers take {ratio:.2f} times the time of 4 (bar 1.3)")
    with tempfile.TemporaryDirectory() as cache:
        first, *later = (first_step_seconds(cache) for _ in range(1 + repeats))
    second = statistics.median(later)
    print(
        f"digits reaches step 1 in {first:.1f} s with an empty cache, {second:.1f} s with a filled one (bar 10 s)"
    )
    return ratio <= 1.3 and second < 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    sys.exit(0 if run(parser.parse_args().repeats) else 1)
