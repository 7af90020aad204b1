"""LightningDiT's cache: safetensors files of latents, and latents_stats.pt.

A file latents_rank00_shard000.safetensors holds `latents` and `latents_flip`, one draw each from
the posterior of the image and of its mirror image [n, c, h, w], and `labels` [n]. Training sees
(z - mean) / std * multiplier, with mean and std of each channel [1, c, 1, 1] in latents_stats.pt.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from convert.caches.cache import NONE, Cache, Normalisation, find_axes, to_views
from convert.torch_file import Tensor, read_torch_file
from sit_jax import storage
from sit_jax.errors import UserError, check

EXTENSION = ".safetensors"
STATS = "latents_stats.pt"
_IMAGE, _MIRROR, _LABELS = "latents", "latents_flip", "labels"
_FLOATS = ("F16", "BF16", "F32", "F64")
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "U16", "U32")
_LARGEST_HEADER = 2**20  # bytes
_LARGEST_STATS = 2**24
_CHUNK = 2**24  # bytes that are read at a time
_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
# safe_open raises the first of them for a damaged file.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of latents: its examples are first, ..., first + count - 1."""

    path: str
    first: int
    count: int
    shape: tuple[int, ...]  # of a latent, CHW
    mirrored: bool
    labels: np.ndarray


def open_lightning(folder: str, multiplier: float, needs_stats: bool) -> Cache:
    """Open a folder of safetensors files, in the order of their names."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(EXTENSION))
    check(names, f"{folder!r} holds no {EXTENSION} files; give the folder of the latents")
    _check_none_missing(folder, names)
    files: list[_File] = []
    for name in names:
        first = files[-1].first + files[-1].count if files else 0
        files.append(_open_file(os.path.join(folder, name), first))
    for file in files:
        check(
            (file.shape, file.mirrored) == (files[0].shape, files[0].mirrored),
            f"{file.path} has {_described(file)}, where {files[0].path} has {_described(files[0])};"
            " all files of a cache have the same",
        )
    find_axes(files[0].path, files[0].shape, "chw")
    channels, height, width = files[0].shape

    def read(numbers: range) -> Iterator[np.ndarray]:
        for file in files:
            own = range(max(numbers.start, file.first), min(numbers.stop, file.first + file.count))
            yield from _read(file, own)

    return Cache(
        layout="lightningdit",
        shape=(height, width, channels),
        mirrored=files[0].mirrored,
        variance=False,
        labels=list(itertools.chain.from_iterable(file.labels.tolist() for file in files)),
        labels_file=folder,
        read=read,
        file_of=lambda number: next(
            file.path for file in files if number < file.first + file.count
        ),
        details={"files": _fingerprint(files)},
        normalisation=_read_stats(folder, channels, multiplier) if needs_stats else None,
    )


def _check_none_missing(folder: str, names: list[str]) -> None:
    """Raise UserError that names a file that is missing in the sequence of ranks and shards."""
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    found = {(int(match[1]), int(match[2])) for match in matches}
    for rank, shard in sorted(found):
        for before in ((rank, shard - 1), (rank - 1, 0)):
            check(
                min(before) < 0 or before in found,
                f"latents_rank{before[0]:02d}_shard{before[1]:03d}{EXTENSION} is missing in "
                f"{folder!r}; copy all files",
            )


def _described(file: _File) -> str:
    beside = f" and {_MIRROR}" if file.mirrored else ""
    return f"latents of shape {list(file.shape)} in {_IMAGE}{beside}"


def _open_file(path: str, first: int) -> _File:
    """Return what a file's header says, and its labels."""
    try:
        with open(path, "rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > _LARGEST_HEADER:
            raise ValueError(f"its header claims {header:,} bytes")
        with safetensors.safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            types = {name: part.get_dtype() for name, part in slices.items()}
            _check_tensors(path, shapes, types)
            labels = file.get_tensor(_LABELS)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return _File(
        path, first, len(labels), shapes[_IMAGE][1:], mirrored=_MIRROR in shapes, labels=labels
    )


def _check_tensors(path: str, shapes: Mapping[str, tuple], types: Mapping[str, str]) -> None:
    names = set(shapes)
    check(
        {_IMAGE, _LABELS} <= names <= {_IMAGE, _MIRROR, _LABELS},
        f"{path} holds {', '.join(sorted(names)) or 'nothing'}; expected {_IMAGE}, {_LABELS} and, "
        f"if there are mirror images, {_MIRROR}",
    )
    for name in names:
        is_label = name == _LABELS
        check(
            types[name] in (_INTEGERS if is_label else _FLOATS),
            f"{path}: {name} holds {types[name]} numbers; expected "
            f"{'whole numbers' if is_label else 'float16, bfloat16, float32 or float64'}",
        )
    count = shapes[_LABELS]
    latents = shapes[_IMAGE]
    listed = ", ".join(f"{name} {list(shapes[name])}" for name in sorted(names))
    check(
        len(latents) == 4 and latents[:1] == count and shapes.get(_MIRROR, latents) == latents,
        f"{path} has the shapes {listed}; expected [n, channels, height, width] for the latents "
        "and [n] for the labels",
    )


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a readable safetensors file ({storage.reason(error)[:200]}); get the "
        "complete file"
    )


def _read(file: _File, numbers: range) -> Iterator[np.ndarray]:
    """Yield moments_vhwm of a part of a file's examples, read in slices of a few megabytes."""
    if not numbers:
        return
    names = [_IMAGE, _MIRROR] if file.mirrored else [_IMAGE]
    count = max(1, _CHUNK // (4 * len(names) * int(np.prod(file.shape))))
    try:
        with safetensors.safe_open(file.path, "numpy") as opened:
            slices = [opened.get_slice(name) for name in names]
            for number in range(numbers.start, numbers.stop, count):
                start = number - file.first
                stop = min(start + count, numbers.stop - file.first)
                chunks_nchw = [part[start:stop] for part in slices]
                for row, views_chw in enumerate(zip(*chunks_nchw, strict=True), start):
                    name = f"latent {row} in {file.path}"
                    yield to_views(name, [view.transpose(1, 2, 0) for view in views_chw], NONE)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(file.path, error) from error


def _read_stats(folder: str, channels: int, multiplier: float) -> Normalisation:
    """Return scale = multiplier / std and shift = mean, of each channel."""
    path = os.path.join(folder, STATS)
    check(
        os.path.exists(path),
        f"{path} does not exist, so the scale of the latents is unknown; copy it, or give --scale "
        "and --shift (for latent_norm: false, --scale with its latent_multiplier)",
    )
    check(
        os.path.isfile(path) and os.path.getsize(path) <= _LARGEST_STATS,
        f"{path} is not a file of two small tensors; get the one that LightningDiT has written",
    )
    content: Any = read_torch_file(path)
    tensors = {}
    for name in ("mean", "std"):
        tensor = content.get(name) if isinstance(content, Mapping) else None
        check(
            isinstance(tensor, Tensor) and tensor.shape in ((1, channels, 1, 1), (channels,)),
            f"{path} has no {name} of shape [1, {channels}, 1, 1]; get the one that LightningDiT "
            "has written for these latents",
        )
        tensors[name] = np.asarray(tensor).astype(np.float64).reshape(-1)
    check(
        np.isfinite([*tensors.values()]).all() and tensors["std"].min() > 0,
        f"{path} has a mean or std that is not finite, or a std that is not positive; delete it, "
        "and let LightningDiT compute it again",
    )
    return Normalisation(
        scale=tuple((multiplier / tensors["std"]).tolist()), shift=tuple(tensors["mean"].tolist())
    )


def _fingerprint(files: list[_File]) -> str:
    """Return a digest of the files' names and labels: a run continues only with the same."""
    result = hashlib.sha256()
    for file in files:
        result.update(f"{os.path.basename(file.path)}\n{file.count}\n".encode())
        result.update(file.labels.astype(np.int64).tobytes())
    return result.hexdigest()[:16]
