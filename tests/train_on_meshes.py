"""Trains and samples on every mesh of its devices and prints JSON, for test_sharding.py."""

import json

import jax
import numpy as np

from sit_jax import config as config_lib
from sit_jax.jobs import likelihood, sampler, train
from sit_jax.jobs.data import open_batches, open_source
from sit_jax.jobs.setup import set_up

TINY = [
    ("model.depth", "2"), ("model.width", "32"), ("model.heads", "4"),
    ("train.batch", "32"), ("train.steps", "6"), ("sample.batch", "16"), ("sample.steps", "4"),
    ("likelihood.batch", "16"), ("likelihood.solver", "heun"), ("likelihood.steps", "2"),
    ("optimizer.schedule", "constant"),
]  # fmt: skip


def run(data: int, fsdp: int, tensor: int, accumulation: int = 1) -> dict:
    mesh = [("mesh.data", str(data)), ("mesh.fsdp", str(fsdp)), ("mesh.tensor", str(tensor))]
    config = config_lib.load(
        "configs/digits.py", TINY + mesh + [("train.accumulation", str(accumulation))]
    )
    setup = set_up(config)
    state = setup.create_state()
    step = train.make_train_step(setup)
    losses = []
    with open_batches(setup, open_source(setup), 0) as batches:
        for _ in range(config.train.steps):
            state, metrics = step(state, next(batches), setup.codec_params)
            losses.append(float(metrics["loss"]))
    kernel = state.opt_state[0].mu["blocks"]["mlp"]["fc1"]["kernel"]
    rows = [
        row
        for rows, _ in likelihood.evaluate(setup, open_source(setup), state.params, range(6))
        for row in rows
    ]
    samples, *_ = sampler.sample_images(
        setup, sampler.make_sampler(setup), state.params, np.arange(16)
    )
    return {
        "losses": losses,
        "shard": list(kernel.addressable_shards[0].data.shape),
        "global": list(kernel.shape),
        "log_prob": [row["log_prob"] for row in rows],
        "images": samples.images_bfhwc.astype(int).ravel().tolist(),
    }


if __name__ == "__main__":
    if jax.device_count() == 1:
        results = {"single": run(1, 1, 1)}
    else:
        meshes = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all three": (2, 2, 2)}
        results = {name: run(*mesh) for name, mesh in meshes.items()}
        results["accumulated"] = run(4, 2, 1, accumulation=2)
    print(json.dumps(results))
