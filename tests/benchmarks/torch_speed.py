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
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import sides

BARS = {"forward": 1.2, "train step": 1.0}
INPUT, CHANNELS, CLASSES = 32, 4, 1000


def examples(batch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    x1, x0 = draw.standard_normal((2, batch, INPUT, INPUT, CHANNELS), np.float32)
    return {
        "x1": x1,
        "x0": x0,
        "t": draw.random(batch, np.float32),
        "y": draw.integers(0, CLASSES + 1, batch),
    }


def ours(options: argparse.Namespace) -> sides.Calls:
    """What there is to time, as calls that return when the work is done."""
    import jax

    from sit_jax import main, train_step
    from sit_jax.jobs.setup import set_up
    from sit_jax.settings import Config, Data, Model

    main.keep_host_memory()
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

    update, network = jax.jit(update, donate_argnums=0), jax.jit(setup.network)

    def step():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, batch))

    return {
        "train step": step,
        "forward": lambda: jax.block_until_ready(
            network(state.params, batch["x1"], batch["t"], batch["y"])
        ),
    }


def torchs(options: argparse.Namespace) -> sides.Calls:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-S/2", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--fused", action="store_true", help="PyTorch's fused AdamW in place of its default"
    )
    parser.add_argument("--remat", default="dots", help="our model.remat (default: %(default)s)")
    sides.run(parser, {"PyTorch": torchs, "ours": ours}, BARS, memory=True)
