"""The speed of sampling: our sampler against the same loop in plain PyTorch, and what diffrax adds to a bare scan.

    python tests/benchmarks/sampling.py --steps 10                # against PyTorch (bash launch/test.sh --torch)
    python tests/benchmarks/sampling.py --steps 10 --against scan

SiT-S/2 on 32x32x4, Heun's steps of the guided velocity from noise, float32, on this machine's CPU. Both sides do the
same evaluations; a step costs what it costs, so fewer of them give the same ratio sooner. tests/benchmarks/sides.py
says how the two are timed. Exits with 1 if the bar is missed: 1.3 against PyTorch, 0.95 against the scan.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import sides

INPUT, CHANNELS, CLASSES, SCALE = 32, 4, 1000, 4.0


def set_up(options: argparse.Namespace):
    from sit_jax import main
    from sit_jax.jobs.setup import set_up
    from sit_jax.settings import Config, Data, Model, Sample

    main.keep_host_memory()
    return set_up(
        Config(
            model=Model(name=options.model),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
            sample=Sample(solver="heun", steps=options.steps, cfg_scale=SCALE, batch=options.batch),
        )
    )


def ours(options: argparse.Namespace) -> sides.Calls:
    import jax

    from sit_jax.jobs.sampler import labels_of, make_sampler

    setup, indices = set_up(options), np.arange(options.batch, dtype=np.int32)
    params, sampler = jax.jit(setup.init_params)(), make_sampler(setup)
    return {
        "trajectory": lambda: jax.block_until_ready(
            sampler(params, indices, labels_of(setup, indices))
        )
    }


def scanned(options: argparse.Namespace) -> sides.Calls:
    """The same trajectory as a bare lax.scan."""
    import jax
    import jax.numpy as jnp

    from sit_jax import rng
    from sit_jax.jobs.sampler import labels_of
    from sit_jax.sampling.guidance import guide

    setup, indices, h = set_up(options), np.arange(options.batch, dtype=np.int32), 1 / options.steps

    @jax.jit
    def run(params, indices, y):
        null = jnp.full_like(y, setup.null_label)
        predict, unconditional = (
            lambda x, t, y=y: setup.network(params, x, t, y) for y in (y, null)
        )
        velocity = guide(predict, unconditional, SCALE, channels=3)

        def step(x, t):
            first = velocity(x, jnp.full(len(x), t))
            second = velocity(x + h * first, jnp.full(len(x), t + h))
            return x + h / 2 * (first + second), None

        x = rng.normal_by_index(0, "sample", indices, setup.input_shape)
        return jax.lax.scan(step, x, jnp.arange(options.steps) * h)[0]

    params = jax.jit(setup.init_params)()

    def trajectory():
        with jax.default_matmul_precision("highest"):
            jax.block_until_ready(run(params, indices, labels_of(setup, indices)))

    return {"trajectory": trajectory}


def torchs(options: argparse.Namespace) -> sides.Calls:
    import torch

    from sit_jax.models.sizes import size_by_name
    from tests import torch_sit

    size = size_by_name(options.model)
    model = torch_sit.SiT(**vars(size), input_size=INPUT, channels=CHANNELS, classes=CLASSES).eval()
    noise = torch.randn(
        options.batch, CHANNELS, INPUT, INPUT, generator=torch.Generator().manual_seed(0)
    )
    y = torch.cat([torch.arange(options.batch), torch.full((options.batch,), CLASSES)])
    h = 1 / options.steps

    def velocity(x, t):
        both = model(
            torch.cat([x, x]), torch.full((2 * options.batch,), t), y
        )  # one call, as the reference does
        conditional, unconditional = both.chunk(2)
        guided = unconditional[:, :3] + SCALE * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([guided, conditional[:, 3:]], dim=1)

    @torch.inference_mode()
    def trajectory():
        x = noise
        for step in range(options.steps):
            first = velocity(x, step * h)
            second = velocity(x + h * first, (step + 1) * h)
            x = x + h / 2 * (first + second)
        return x

    return {"trajectory": trajectory}


AGAINST = {"torch": ("PyTorch", torchs, 1.3), "scan": ("bare scan", scanned, 0.95)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", choices=AGAINST, default="torch", help="default: %(default)s")
    parser.add_argument("--model", default="SiT-S/2", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    name, side, bar = AGAINST[parser.parse_known_args()[0].against]
    sides.run(parser, {name: side, "ours": ours}, {"trajectory": bar}, memory=False)
