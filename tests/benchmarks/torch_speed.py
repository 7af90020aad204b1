"""Compare our speed and memory with the same SiT in plain PyTorch (tests/torch_sit.py) on the CPU.

    python tests/benchmarks/torch_speed.py                      # SiT-S/2 on 32x32x4, batch 8
    python tests/benchmarks/torch_speed.py --one-core --remat none

Takes about 5 minutes on 2 cores and needs PyTorch (bash launch/test.sh --torch). Times a forward
pass and a training step in float32. Each side runs in its own process and they take turns, so that
idle threads of one do not spin during the other's turn. A ratio is PyTorch's time over ours in one
pair of turns; the lower quartile of the ratios must reach the target. Memory is the peak resident
set of a process that makes the model, trains it, and calls it. Exits with 1 if a target is missed.

Other programs slow down both sides, and PyTorch more: its threads wait for each other after every
operation. On a busy machine use --one-core: each side then has one thread, and processor time is
measured in place of wall time.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import sides

TARGETS = {"forward": 1.2, "train step": 1.1}  # PyTorch's time over ours
INPUT = 32
CHANNELS = 4
CLASSES = 1000


def examples(batch: int) -> dict[str, np.ndarray]:
    """Return random images x1 and noise x0 [b, h, w, c], times t [b] and labels [b]."""
    draw = np.random.default_rng(0)
    x1, x0 = draw.standard_normal((2, batch, INPUT, INPUT, CHANNELS), np.float32)
    return {
        "x1": x1,
        "x0": x0,
        "t": draw.random(batch, np.float32),
        "condition": draw.integers(0, CLASSES + 1, batch),
    }


def ours(options: argparse.Namespace) -> sides.Calls:
    """Train and call the model of sit_jax."""
    import jax

    from sit_jax import runtime, train_step
    from sit_jax.jobs.setup import set_up
    from sit_jax.settings import Config, Data, Model

    runtime.keep_host_memory()
    setup = set_up(
        Config(
            model=Model(name=options.model, remat=options.remat),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
        )
    )
    state = setup.create_state()
    batch = jax.device_put(examples(options.batch))

    def loss(params, examples):
        return train_step.batch_loss(setup.network, setup.objective, params, examples)

    def update(state, batch):
        return train_step.update(
            state, batch, loss=loss, optimizer=setup.optimizer, ema_decay=0.9999
        )

    update = jax.jit(update, donate_argnums=0)
    network = jax.jit(setup.network)

    def step():
        nonlocal state
        state, _ = jax.block_until_ready(update(state, batch))

    def forward():
        jax.block_until_ready(network(state.params, batch["x1"], batch["t"], batch["condition"]))

    return {"train step": step, "forward": forward}


def pytorch(options: argparse.Namespace) -> sides.Calls:
    """Train and call the model in PyTorch."""
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
        model(batch["x1"], batch["t"], batch["condition"])

    return {"train step": lambda: trainer.step(*batch.values()), "forward": forward}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2", help="size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument(
        "--fused", action="store_true", help="PyTorch's fused AdamW in place of its default"
    )
    parser.add_argument("--remat", default="dots", help="our model.remat (default: %(default)s)")
    sides.run(parser, {"PyTorch": pytorch, "ours": ours}, TARGETS, memory=True)
