"""Our speed and memory against the same SiT in plain PyTorch (tests/torch_sit.py), float32, on this machine's CPU.

    python tests/benchmarks/torch_speed.py                      # SiT-S/2 on 32x32x4, batch 8
    python tests/benchmarks/torch_speed.py --one-core --remat none

Needs PyTorch (bash launch/test.sh --torch installs it). Each side lives in its own process and they take turns, so
that neither's idle threads spin during the other's turn: PyTorch, ours, PyTorch, ours, ... A ratio is PyTorch's time
over ours in one pair of turns; a bar is met when the lower quartile of the ratios meets it. Memory is the peak resident
set of a process that makes the model, trains it, and calls it. Exits with 1 if a bar is missed.

Other programs disturb both sides, and PyTorch more: its threads wait for each other after every operation. --one-core
is for a busy machine: each side has one thread, and what is measured is the processor time that it uses.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

BARS = {"forward": 1.2, "train step": 1.0}
INPUT, CHANNELS, CLASSES = 32, 4, 1000
ROOT = pathlib.Path(__file__).parents[2]


def examples(batch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    x1, x0 = draw.standard_normal((2, batch, INPUT, INPUT, CHANNELS), np.float32)
    return {"x1": x1, "x0": x0, "t": draw.random(batch, np.float32), "y": draw.integers(0, CLASSES + 1, batch)}


def ours(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What there is to time, as calls that return when the work is done."""
    import jax

    from sit_jax import main, train_state, train_step
    from sit_jax.jobs.setup import set_up
    from sit_jax.settings import Config, Data, Model

    main.keep_host_memory()
    setup = set_up(
        Config(
            model=Model(name=options.model, remat=options.remat),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
        )
    )
    state = train_state.create(setup.init_params, setup.optimizer, setup.mesh)
    batch = jax.device_put(examples(options.batch))

    def loss(params, examples):
        return train_step.batch_loss(setup.network, setup.objective, params, examples)

    def update(state, batch):
        return train_step.update(state, batch, loss=loss, optimizer=setup.optimizer, ema_decay=0.9999)

    update, network = jax.jit(update, donate_argnums=0), jax.jit(setup.network)

    def step():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, batch))

    return {
        "train step": step,
        "forward": lambda: jax.block_until_ready(network(state.params, batch["x1"], batch["t"], batch["y"])),
    }


def torchs(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    import torch

    from sit_jax.models.sizes import size_by_name
    from tests import torch_sit

    size = size_by_name(options.model)
    model = torch_sit.SiT(**vars(size), input_size=INPUT, channels=CHANNELS, classes=CLASSES)
    trainer = torch_sit.Trainer(model, fused=options.fused)
    batch = {name: torch.from_numpy(value) for name, value in examples(options.batch).items()}
    batch |= {name: batch[name].movedim(3, 1).contiguous() for name in ("x1", "x0")}

    @torch.inference_mode()
    def forward():
        model(batch["x1"], batch["t"], batch["y"])

    return {"train step": lambda: trainer.step(**batch), "forward": forward}


SIDES = {"PyTorch": torchs, "ours": ours}


def work(options: argparse.Namespace) -> None:
    """A child: for each line on stdin, the name of a call, writes the seconds that it took; at the end its peak GiB."""
    if options.one_core:  # before the frameworks are imported: they make as many threads as they have cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    clock = time.process_time if options.one_core else time.perf_counter
    calls = SIDES[options.side](options)
    for call in calls.values():
        for _ in range(3):
            call()
    print("ready", flush=True)
    for line in sys.stdin:
        began = clock()
        calls[line.strip()]()
        print(clock() - began, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


class Child:
    def __init__(self, side: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
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


def compare(repeats: int) -> bool:
    """Prints the table; True if every bar is met."""
    children = {side: Child(side) for side in SIDES}
    print(f"{'':12}{'PyTorch':>24}{'ours':>24}{'ratio':>24}  bar")
    passed = True
    for call, bar in BARS.items():
        turns = [[child.seconds(call) for child in children.values()] for _ in range(repeats)]
        theirs, ours = np.array(turns).T
        rows = [theirs * 1e3, ours * 1e3, theirs / ours]
        low, middle, high = np.percentile(rows, [25, 50, 75], axis=1)
        cells = [f"{m:.{d}f} ({a:.{d}f}..{b:.{d}f})" for a, m, b, d in zip(low, middle, high, (0, 0, 2), strict=True)]
        met = low[2] >= bar
        verdict = "met" if met else "missed"
        print(f"{call:12}{cells[0]:>21} ms{cells[1]:>21} ms{cells[2]:>24}  {bar:.1f} {verdict}", flush=True)
        passed &= met
    theirs, ours = (child.peak_memory() for child in children.values())
    verdict = "met" if ours <= theirs else "missed"
    print(f"{'peak memory':12}{theirs:>20.2f} GiB{ours:>20.2f} GiB{theirs / ours:>24.2f}  1.0 {verdict}")
    return bool(passed and ours <= theirs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=25, help="pairs of turns (default: %(default)s)")
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW in place of its default")
    parser.add_argument("--remat", default="dots", help="our model.remat (default: %(default)s)")
    parser.add_argument("--one-core", action="store_true", help="one thread each; processor time, not wall time")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    sys.exit(work(options) if options.side else 0 if compare(options.repeats) else 1)
