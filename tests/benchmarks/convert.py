"""Measure time and memory of converting XL/2: random weights in the published file's format.

    python tests/benchmarks/convert.py

Writes a bare state dict (learn_sigma, 1001 labels, 256 px: 32x32x4 latents, 2.7 GB), converts it in
a child process and prints the seconds and the peak resident memory. With PyTorch installed, it
compares the forward pass with PyTorch's on the same file. Needs 6 GB of disk. Exits with 1 if a
target is missed.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
MODEL = "SiT-XL/2"
SIDE = 32
CHANNELS = 4
CLASSES = 1000
# Targets: seconds, peak memory, and the difference of forward passes over the largest value.
SECONDS = 60
GIB = 8
RELATIVE = 2e-4


def make_file(path: str, model: str = MODEL, side: int = SIDE) -> None:
    """Write random weights with the scale of a trained network.

    Gates and output are not zero, as they would be in a fresh network.
    """
    from convert.names import POSITION
    from convert.torch_writer import TorchWriter
    from sit_jax.models.embeddings import position_embedding
    from sit_jax.models.sizes import SIZES
    from tests import checkpoints

    draw = np.random.default_rng(0)
    size = SIZES[model]
    shapes = checkpoints.shapes(
        size, side=side, channels=CHANNELS, classes=CLASSES, learn_sigma=True
    )
    position = position_embedding(size.width, side // size.patch)[None]
    with open(path, "wb") as file, TorchWriter(file) as writer:
        tensors = {}
        for name, shape in shapes.items():
            if name == POSITION:
                tensors[name] = writer.tensor(position)
            else:
                tensors[name] = writer.tensor(0.02 * draw.standard_normal(shape, np.float32))
        writer.finish(tensors)


def convert(path: str, workdir: str) -> tuple[float, float, float]:
    """Convert in a child process; return (wall seconds, processor seconds, peak GiB).

    All three include the start of Python.
    """
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "convert.from_torch", path, workdir], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit("error: the conversion failed; its message is above")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def forward_difference(path: str, workdir: str) -> float:
    """Return the largest difference of the two forward passes over the largest value."""
    import jax
    import torch
    from etils import epath

    from sit_jax import config as config_lib
    from sit_jax.jobs.setup import set_up
    from sit_jax.jobs.workdir import restore_weights
    from tests import torch_sit

    draw = np.random.default_rng(1)
    x = draw.standard_normal((2, SIDE, SIDE, CHANNELS), np.float32)
    t = np.array([0.3, 0.9], np.float32)
    y = np.array([207, CLASSES], np.int32)
    setup = set_up(config_lib.load(f"{workdir}/config.json"))
    params = restore_weights(setup, epath.Path(workdir), "ema").params
    ours = np.asarray(jax.jit(setup.network)(params, x, t, y))
    del params
    with torch.device("meta"):
        model = torch_sit.SiT(
            **vars(setup.size),
            input_size=SIDE,
            channels=CHANNELS,
            classes=CLASSES,
            learn_sigma=True,
        )
    frequencies = torch_sit.TimeEmbedder(1).frequencies  # a constant that the file does not hold
    model.load_state_dict(torch.load(path, mmap=True), strict=True, assign=True)
    model.t_embedder.frequencies = frequencies
    with torch.inference_mode():
        theirs = model(
            torch.from_numpy(x).movedim(3, 1), torch.from_numpy(t), torch.from_numpy(y)
        ).movedim(1, 3)
    return float(np.abs(ours - theirs.numpy()).max() / theirs.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", help="where to put the file and the workdir (default: a temporary folder)"
    )
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        path, workdir = f"{folder}/SiT-XL-2-256x256.pt", f"{folder}/run"
        make_file(path)
        print(f"{os.path.getsize(path) / 2**30:.2f} GiB of weights", flush=True)
        seconds, processor, peak = convert(path, workdir)
        met = seconds <= SECONDS and peak <= GIB
        print(
            f"converted in {seconds:.1f} s (target {SECONDS}; {processor:.1f} s of one core), "
            f"peak memory {peak:.2f} GiB (target {GIB})",
            flush=True,
        )
        try:
            difference = forward_difference(path, workdir)
        except ModuleNotFoundError as error:
            print(f"forward not compared: {error}")
        else:
            met &= difference <= RELATIVE
            print(
                f"forward: differs from PyTorch's by {difference:.1e} of the largest value "
                f"(target {RELATIVE:g})"
            )
    return 0 if met else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
