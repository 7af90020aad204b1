"""Measure time and memory of the full-size SD-VAE: random weights in the published file's format.

    python tests/benchmarks/vae.py [--size 256] [--images 1] [--batch 1] [--dtype float32]

Writes the VAE's folder (335 MB) to a temporary place, loads it as a run does, and encodes and
decodes images of noise. The file has as many bytes as the published one, because names, shapes and
types are the same.
"""

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from sit_jax.latents import files
from sit_jax.latents.sd_vae import VaeOptions, open_sd_vae

NEW_NAMES = {new: old for old, new in files.OLD_NAMES.items()}


def write_folder(
    folder: pathlib.Path, block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
) -> int:
    """Write config.json and random weights in the published format; return the weights' bytes."""
    blocks = len(block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    (folder / files.CONFIG).write_text(json.dumps(config))
    codec = open_sd_vae(VaeOptions(str(folder), batch=1))
    draw = np.random.default_rng(0)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(codec.abstract_params):
        name = files.torch_name(path)
        shape = files.torch_shape(leaf.shape)
        for new, old in NEW_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        spread = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.05
        mean = 1 if "norm" in name and "weight" in name else 0
        tensors[name] = mean + spread * draw.standard_normal(shape, np.float32)
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / files.WEIGHTS, metadata={"format": "pt"})
    return (folder / files.WEIGHTS).stat().st_size


def timed(what: str, function: Callable, *args: Any) -> Any:
    """Compile and run a function; print its time and temporary memory; return its result."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{what}: {seconds:.2f} s, {temporary / 2**30:.2f} GiB of temporary memory")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("--size", 256), ("--images", 1), ("--batch", 1)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        written = write_folder(pathlib.Path(folder))
        start = time.perf_counter()
        codec = open_sd_vae(VaeOptions(folder, dtype=flags.dtype, batch=flags.batch))
        params = jax.device_put(codec.load())
        jax.block_until_ready(params)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"load: {time.perf_counter() - start:.2f} s, {count:,} parameters")
    draw = np.random.default_rng(1)
    images = draw.integers(0, 256, (flags.images, flags.size, flags.size, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), len(images))
    x = timed("encode", codec.encode, params, keys, {"image": images})
    images = timed("decode", codec.decode, params, x)
    assert np.isfinite(x).all() and np.isfinite(images).all()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    published = next(iter(files.PUBLISHED.values())).weights_bytes
    if written != published:
        sys.exit(f"error: the file has {written:,} bytes, but the published one has {published:,}")


if __name__ == "__main__":
    main()
