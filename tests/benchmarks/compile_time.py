"""Measure the time to compile SiT-XL/2's training step with 4 or 28 layers, and to start digits.

    python tests/benchmarks/compile_time.py [--repeats 3]

Takes about 1.5 minutes on 2 cores. Each figure comes from a fresh process. The step is lowered and
compiled for the CPU from abstract arrays, so the model is never allocated. A start of digits lasts
until its first training step, with an empty compilation cache and with a filled one.

Exits with 1 if 28 layers take more than 1.3 times as long as 4, or if a start with a filled cache
takes 10 s or more.
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
overrides = {
    "model.name": "SiT-XL/2",
    "model.depth": sys.argv[1],
    "model.width": "none",
    "model.heads": "none",
    "data.image_size": "32",
    "data.channels": "4",
    "data.classes": "1000",
    "train.batch": "8",
    "sample.batch": "8",
}
xl2 = setup.set_up(config.load("configs/digits.py", list(overrides.items())))
state = xl2.abstract_state
batch = {
    "image": jax.ShapeDtypeStruct((8, 32, 32, 4), "uint8"),
    "label": jax.ShapeDtypeStruct((8,), "int32"),
    "skipped": jax.ShapeDtypeStruct((8,), "int32"),
}
start = time.perf_counter()
train.make_train_step(xl2).lower(state, batch, {}).compile()
print(time.perf_counter() - start)
"""


def compile_seconds(depth: int) -> float:
    """Return the seconds to lower and compile a training step of SiT-XL/2 with `depth` layers."""
    command = [sys.executable, "-c", COMPILE, str(depth)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return float(result.stdout.splitlines()[-1])


def first_step_seconds(cache: str) -> float:
    """Return the seconds from the start of a digits run to the log line of its first step."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "sit_jax.main"]
        flags = ["--config", "configs/digits.py", "--workdir", workdir]
        settings = ["--config.log.every=1", "--config.train.steps=3", "--config.log.sheet_every=0"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        with subprocess.Popen(
            command + flags + settings, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            next(line for line in process.stdout if line.startswith("step 1/"))
            seconds = time.perf_counter() - start
            process.communicate()
    return seconds


def run(repeats: int) -> bool:
    """Print both comparisons; return True if both targets are met."""
    times = {4: [], 28: []}  # seconds of each run, by depth
    for _ in range(repeats):
        for depth in times:
            seconds = compile_seconds(depth)
            times[depth].append(seconds)
            print(f"SiT-XL/2 with {depth} layers: {seconds:.1f} s to lower and compile", flush=True)
    ratio = statistics.median(deep / flat for flat, deep in zip(times[4], times[28], strict=True))
    print(f"28 layers take {ratio:.2f} times as long as 4 (target: 1.3 at most)")
    with tempfile.TemporaryDirectory() as cache:
        empty = first_step_seconds(cache)
        filled = statistics.median(first_step_seconds(cache) for _ in range(repeats))
    print(
        f"digits reaches step 1 in {empty:.1f} s with an empty cache, {filled:.1f} s with a filled "
        "one (target: less than 10 s)"
    )
    return ratio <= 1.3 and filled < 10


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (default: 3)")
    sys.exit(0 if run(parser.parse_args().repeats) else 1)
