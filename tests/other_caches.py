"""Small caches in the layouts of other projects, for tests of convert.latents."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.latents import Options, convert
from convert.torch_writer import TorchWriter
from sit_jax.data.latents import open_latents
from sit_jax.data.source import SourceOptions
from sit_jax.errors import UserError

CLASSES = 3


def opened(folder, side=4, channels=4):
    """Open converted latents."""
    return open_latents(SourceOptions(str(folder), None, "all", side, channels, None))


def converted(tmp_path, src, side=4, channels=4, **options):
    """Convert into dst and return it as a source."""
    convert(str(src), str(tmp_path / "dst"), Options(**options))
    return opened(tmp_path / "dst", side, channels)


def refused(src, message, **options):
    """Assert that a conversion is refused in one line that matches."""
    with pytest.raises(UserError, match=message) as error:
        convert(str(src), str(src.parent / "dst"), Options(**options))
    assert "\n" not in str(error.value)


def noise(number, *shape, dtype=np.float32):
    """Return the normal noise of this number."""
    return np.random.default_rng(number).standard_normal(shape).astype(dtype)


def mean_and_std(number, channels=4, side=4):
    """Return mean and standard deviation [2c, h, w] of an example, as REPA stores them."""
    moments = noise(number, 2 * channels, side, side)
    moments[channels:] = np.exp(moments[channels:] - 3)
    return moments


def write_repa(folder, count=7, channels=4, side=4, labels=None):
    """Write REPA's data folder, with sub-folders of three files; return the folder."""
    entries = []
    for number in range(count):
        name = f"{number // 3:05d}/img-mean-std-{number:08d}.npy"
        save(folder / "vae-sd" / name, mean_and_std(number, channels, side))
        entries.append([name, number % CLASSES if labels is None else labels[number]])
    write_json(folder / "vae-sd" / "dataset.json", {"labels": entries})
    return folder


def lightning_latent(number, view, channels=8, side=4):
    """Return a latent [c, h, w]: view 0 of the image, 1 of its mirror image."""
    return noise(1000 * view + number, channels, side, side)


def write_lightning(
    folder, counts=(4, 5, 2), channels=8, side=4, mirrored=True, dtype=np.float32, stats=True
):
    """Write LightningDiT's folder with a file for each count, on two ranks; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(sum(counts)))
    for index, count in enumerate(counts):
        own = [next(numbers) for _ in range(count)]
        tensors = {"labels": np.array([number % CLASSES for number in own], np.int64)}
        for view, name in enumerate(["latents", "latents_flip"][: 1 + mirrored]):
            latents = [lightning_latent(number, view, channels, side) for number in own]
            tensors[name] = np.stack(latents).astype(dtype)
        name = f"latents_rank{index // 2:02d}_shard{index % 2:03d}.safetensors"
        save_file(tensors, folder / name, {"total_size": str(count)})
    if stats:
        write_stats(folder, *stats_of(channels))
    return folder


def stats_of(channels=8):
    """Return the mean and the standard deviation of each channel [1, c, 1, 1]."""
    return noise(77, 1, channels, 1, 1), np.exp(noise(78, 1, channels, 1, 1))


def write_stats(folder, mean, std):
    """Write latents_stats.pt."""
    with (folder / "latents_stats.pt").open("wb") as file, TorchWriter(file) as writer:
        writer.finish({"mean": writer.tensor(mean), "std": writer.tensor(std)})


def save(path, array):
    """Write a .npy file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_json(path, content):
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_moments(folder, arrays, labels="labels.json"):
    """Write {name: array, or a dict of arrays for .npz} and labels 0, 1, 2, 0, ... as JSON."""
    for name, array in arrays.items():
        path = folder / name
        if isinstance(array, dict):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **array)
        else:
            save(path, array)
    if labels:
        names = [name.replace(os.sep, "/") for name in arrays]
        entries = {name: number % CLASSES for number, name in enumerate(names)}
        write_json(folder / labels, entries)
    return folder
