"""Seconds and memory of the full-size SD-VAE, from a file of random weights in the published file's format.

    python tests/benchmarks/vae.py [--size 256] [--images 1] [--batch 1] [--dtype float32]

Writes such a folder (335 MB, in a temporary place), loads it as a run does, and encodes and decodes images of noise.
The file has the published one's number of bytes: names, shapes and types are the same.
"""

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import time

import jax
import numpy as np
import safetensors.numpy

from sit_jax.latents import files, open_codec

OPTIONS = dict(repo=None, revision=None, scale=0.18215)
NEW_NAMES = {new: old for old, new in files.OLD_NAMES.items()}


def write_folder(
    folder: pathlib.Path, block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
) -> int:
    """config.json and weights as published but for the values; returns the bytes of the weights."""
    blocks = len(block_out_channels)
    config = {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    }  # fmt: skip
    (folder / files.CONFIG).write_text(json.dumps(config))
    codec = open_codec("sd-vae", path=str(folder), dtype="float32", batch=1, **OPTIONS)
    tensors, draw = {}, np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(codec.abstract_params):
        name, shape = files.torch_name(path), files.torch_shape(leaf.shape)
        for new, old in NEW_NAMES.items():
            name = name.replace(f".{new}.", f".{old}.")
        spread = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.05
        tensors[name] = spread * draw.standard_normal(shape, np.float32) + (
            "norm" in name and "weight" in name
        )
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / files.WEIGHTS, metadata={"format": "pt"})
    return (folder / files.WEIGHTS).stat().st_size


def timed(what: str, function, *args):
    """The compiled function's result; prints its time, FLOPs and temporary memory."""
    compiled = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*args))
    seconds, temporary = time.perf_counter() - start, compiled.memory_analysis().temp_size_in_bytes
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
        codec = open_codec("sd-vae", path=folder, dtype=flags.dtype, batch=flags.batch, **OPTIONS)
        params = jax.device_put(codec.load())
        jax.block_until_ready(params)
        print(
            f"load: {time.perf_counter() - start:.2f} s, {sum(x.size for x in jax.tree.leaves(params)):,} parameters"
        )
    images = (
        np.random.default_rng(1)
        .uniform(-1, 1, (flags.images, flags.size, flags.size, 3))
        .astype(np.float32)
    )
    x = timed(
        "encode", codec.encode, params, jax.random.split(jax.random.key(0), len(images)), images
    )
    images = timed("decode", codec.decode, params, x)
    assert np.isfinite(x).all() and np.isfinite(images).all()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    published = next(iter(files.PUBLISHED.values())).weights_bytes
    if written != published:
        sys.exit(f"the file has {written:,} bytes, the published one {published:,}")


if __name__ == "__main__":
    main()
