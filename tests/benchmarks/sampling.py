"""Compare the speed of our sampler with a plain PyTorch loop, or with a lax.scan without diffrax.

    python tests/benchmarks/sampling.py --steps 3                 # PyTorch: launch/test.sh --torch
    python tests/benchmarks/sampling.py --steps 3 --against scan

Takes about 5 minutes on 2 cores with --steps 3, an hour with the default 50. The cost is the same
for every step, so fewer steps give the same ratio. Both sides integrate the guided velocity of
SiT-S/2 on 32x32x4 from noise with Heun's method, in float32 on the CPU, with the same number of
evaluations. tests/benchmarks/sides.py explains how they are timed.

Exits with 1 if the other side takes less than 1.4 (PyTorch) or 0.95 (scan) times as long as ours.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.benchmarks import sides

INPUT = 32
CHANNELS = 4
CLASSES = 1000
SCALE = 4.0


def set_up(options: argparse.Namespace):
    """Return the setup of both JAX sides."""
    from sit_jax import runtime
    from sit_jax.jobs.setup import set_up
    from sit_jax.settings import Config, Data, Model, Sample

    runtime.keep_host_memory()
    return set_up(
        Config(
            model=Model(name=options.model),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
            sample=Sample(solver="heun", steps=options.steps, cfg_scale=SCALE, batch=options.batch),
        )
    )


def ours(options: argparse.Namespace) -> sides.Calls:
    """Sample with sit_jax."""
    import jax

    from sit_jax.jobs.sampler import labels_of, make_sampler

    setup = set_up(options)
    indices = np.arange(options.batch, dtype=np.int32)
    params = jax.jit(setup.init_params)()
    sampler = make_sampler(setup)

    def trajectory():
        jax.block_until_ready(sampler(params, indices, labels_of(setup, indices)))

    return {"trajectory": trajectory}


def scanned(options: argparse.Namespace) -> sides.Calls:
    """Compute the same trajectory with a bare lax.scan."""
    import jax
    import jax.numpy as jnp

    from sit_jax import rng
    from sit_jax.jobs.sampler import labels_of
    from sit_jax.sampling.guidance import in_two_calls, with_guidance

    setup = set_up(options)
    indices = np.arange(options.batch, dtype=np.int32)
    h = 1 / options.steps

    @jax.jit
    def run(params, indices, y):
        null = setup.conditioning.null_like(y)
        predict, unconditional = (
            lambda x, t, y=y: setup.network(params, x, t, y) for y in (y, null)
        )
        both = in_two_calls(predict, unconditional)
        velocity = with_guidance(predict, both, SCALE, channels=3)

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


def pytorch(options: argparse.Namespace) -> sides.Calls:
    """Compute a trajectory of the same model in PyTorch."""
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
        # One call for both halves, as in the reference.
        both = model(torch.cat([x, x]), torch.full((2 * options.batch,), t), y)
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


# Name, side and target ratio.
AGAINST = {"torch": ("PyTorch", pytorch, 1.4), "scan": ("bare scan", scanned, 0.95)}

if __name__ == "__main__":
    # The choice is read first, without --help, which must also list the flags of sides.run.
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument(
        "--against", choices=AGAINST, default="torch", help="the other side (default: %(default)s)"
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[choice],
    )
    parser.add_argument("--model", default="SiT-S/2", help="size (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="Heun steps (default: %(default)s)")
    name, side, target = AGAINST[choice.parse_known_args()[0].against]
    sides.run(parser, {name: side, "ours": ours}, {"trajectory": target}, memory=False)
