"""Reads the tensors of a torch.save file without torch, and without running anything that is in it.

Such a file is a zip: `data.pkl` holds the structure, `data/KEY` the raw storages. Before PyTorch 1.6 it was a row of
pickles with the storages behind them, and some published weights still are. The unpickler below knows the handful of
names that a checkpoint is made of and refuses every other, so a hostile file cannot call anything.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sit_jax.errors import UserError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that stays in its file until `read`, or np.asarray, asks for it: no model need be in memory twice."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def in_memory(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    count: int
    read: Callable[[], bytes]


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_) -> Tensor:
    last = (
        offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if all(shape) else -1
    )
    if min([offset, *shape, *strides]) < 0 or last >= storage.count:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} reaches past its storage of {storage.count} elements"
        )

    def read() -> np.ndarray:
        values = np.frombuffer(storage.read(), storage.dtype, storage.count)[offset:]
        return np.lib.stride_tricks.as_strided(
            values, shape, [s * values.itemsize for s in strides], writeable=False
        )

    return Tensor(tuple(shape), storage.dtype, read)


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """`storage(dtype, key, count)` finds what a tensor is made of."""

    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view):
            raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
        return self._storage(np.dtype(dtype), key, count)


def read_torch_file(path: str) -> Any:
    """What torch.save wrote, with a `Tensor` for each tensor. `UserError` for anything that is not such a file."""
    with _readable(path):
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # a damaged or hostile pickle fails in as many ways as there are opcodes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is no readable PyTorch checkpoint ({reason}); expected a whole file written by torch.save"
        ) from error


def _read_zip(path: str) -> Any:
    archive = zipfile.ZipFile(path)
    roots = [
        name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise pickle.UnpicklingError("it holds no data.pkl")
    root = roots[0]
    if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
        raise pickle.UnpicklingError("its numbers are big-endian")

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        entry = archive.getinfo(f"{root}/data/{key}")
        if entry.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {entry.file_size} bytes for {count} {dtype} numbers"
            )

        def read() -> bytes:
            with _readable(path):  # its checksum may be wrong
                return archive.read(entry)

        return _Storage(dtype, count, read)

    with archive.open(f"{root}/data.pkl") as file:
        return _Unpickler(file, storage).load()


def _read_legacy(path: str) -> Any:
    """Five pickles (magic, version, machine, content, storage keys), then a count and the numbers for each key."""
    offsets: dict[str, int] = {}
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        def read() -> bytes:
            with _readable(path), open(path, "rb") as file:
                file.seek(offsets[key])
                return file.read(count * dtype.itemsize)

        return storages.setdefault(key, _Storage(dtype, count, read))

    with open(path, "rb") as file:
        if _Unpickler(file, storage).load() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("its first number is not PyTorch's")
        _, _, content, keys = (_Unpickler(file, storage).load() for _ in range(4))
        for key in keys:
            offsets[key] = file.tell() + 8
            file.seek(offsets[key] + storages[key].count * storages[key].dtype.itemsize)
        if file.tell() > os.path.getsize(path) or storages.keys() - offsets.keys():
            raise pickle.UnpicklingError("it ends too soon")
    return content
