"""The programs of sit_jax that gpu_speed.py times."""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import runtime, sharding
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.sampler import jit_sampler, labels_of
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.train import make_train_step
from sit_jax.settings import Config, Data, Model, Precision, Sample, Train
from tests.benchmarks import gpu_kernels
from tests.benchmarks.gpu_sides import SCALE, UNITS, Task
from tests.benchmarks.torch_speed import CHANNELS, CLASSES, INPUT

_PRECISION = {"bfloat16": Precision(compute="bfloat16"), "TF32": Precision()}


def start() -> None:
    """Set up the process as the program does."""
    runtime.keep_host_memory()


def prepare(task: Task) -> Callable[[], float]:
    """Return the program of a task."""
    setup = set_up(
        Config(
            model=Model(name=task.model, remat=task.remat),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
            train=Train(batch=task.batch),
            sample=Sample(
                solver="euler", steps=UNITS["sampling"], cfg_scale=SCALE, batch=task.batch
            ),
            precision=_PRECISION[task.format],
        )
    )
    return {"training": _training, "sampling": _sampling}[task.part](setup, task.batch)


def _training(setup: Setup, batch: int) -> Callable[[], float]:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state)
    state = setup.create_state()
    state = jax.device_put(state.replace(params=_randomised(state.params)), shardings)
    draw = np.random.default_rng(0)
    records = {
        "image": draw.integers(0, 256, (batch, INPUT, INPUT, CHANNELS), np.uint8),
        "label": draw.integers(0, CLASSES, batch, np.int32),
        "skipped": np.zeros(batch, np.int32),
    }
    on_device = {
        name: jax.device_put(records[name].astype(spec.dtype), spec.sharding)
        for name, spec in abstract_batch(setup).items()
    }
    update = make_train_step(setup)

    def steps() -> float:
        nonlocal state
        for _ in range(UNITS["training"]):
            state, scalars = update(state, on_device, setup.codec_params)
        jax.block_until_ready(state)
        return float(scalars["loss"])

    return steps


def _sampling(setup: Setup, batch: int) -> Callable[[], float]:
    sampler = jit_sampler(setup)
    params = _sampled_params(setup.config.model.name)
    indices = np.arange(batch, dtype=np.int32)
    arguments = sharding.shard_global_batch(setup.mesh, (indices, labels_of(setup, indices)))

    def trajectory() -> float:
        images, _, _ = sampler((params, None), setup.codec_params, *arguments)
        return float(jnp.mean(images))

    return trajectory


@functools.cache
def _sampled_params(model: str) -> Any:
    """Return float32 weights, which all samplers share."""
    setup = set_up(
        Config(
            model=Model(name=model),
            data=Data(image_size=INPUT, channels=CHANNELS, classes=CLASSES),
        )
    )
    return _randomised(jax.jit(setup.init_params)())


@jax.jit
def _randomised(params: Any) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draws = [
        0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, draws)


def peak_bytes() -> int:
    """Return the most memory that this process has used on the device; 0 if it is unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def trace(work: Callable[[], object]) -> list[gpu_kernels.Kernel]:
    """Return the kernels that run on the GPU during a call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            work()
        return gpu_kernels.from_jax(pathlib.Path(folder))


def out_of_memory(error: Exception) -> bool:
    """Return whether the device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
