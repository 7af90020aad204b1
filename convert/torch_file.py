"""Read the tensors of a torch.save file without torch, and without running any code in the file.

Such a file is a zip: `data.pkl` holds the structure, `data/KEY` the raw storages. Before PyTorch
1.6 it was a sequence of pickles followed by the storages, and some published weights still have
that format. The unpickler below allows only the few names that checkpoints need and refuses all
others, so a hostile file cannot call anything.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

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
    """A tensor that stays in its file until `read` or np.asarray loads it.

    Converting a model therefore never needs two copies of it in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def in_memory(array: np.ndarray) -> Tensor:
    """Return an array as a Tensor."""
    return Tensor(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat run of `count` numbers, which tensors are views of."""

    dtype: np.dtype
    count: int
    read: Callable[[], bytes]


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> Tensor:
    """Return a view of a storage. `offset` and `strides` count elements."""
    last = -1  # index of the last element; an empty tensor has none
    if all(shape):
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min([offset, *shape, *strides]) < 0 or last >= storage.count:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} reaches past its storage of {storage.count} elements"
        )

    def read() -> np.ndarray:
        values = np.frombuffer(storage.read(), storage.dtype, storage.count)[offset:]
        strides_in_bytes = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(values, shape, strides_in_bytes, writeable=False)

    return Tensor(tuple(shape), storage.dtype, read)


# Everything that a file may refer to.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler restricted to _ALLOWED. `storage(dtype, key, count)` returns a tensor's data."""

    def __init__(self, file: IO[bytes], storage: Callable[[np.dtype, str, int], _Storage]):
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
    """Return the object that torch.save wrote, with each tensor as a lazy `Tensor`.

    Raises UserError if the file is not a complete torch.save file.
    """
    with _readable(path):
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn any exception into a UserError that names the file."""
    try:
        yield
    # A damaged or hostile pickle can raise almost any error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not a readable PyTorch checkpoint ({reason}); "
            "expected a complete file written by torch.save"
        ) from error


def _read_zip(path: str) -> Any:
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise pickle.UnpicklingError("it holds no data.pkl")
    root = roots[0]
    if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
        raise pickle.UnpicklingError("its numbers are big-endian")

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        entry = archive.getinfo(f"{root}/data/{key}")
        if entry.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {entry.file_size} bytes for {count} {dtype} numbers"
            )

        def read() -> bytes:
            with _readable(path):  # reading verifies the entry's checksum
                return archive.read(entry)

        return _Storage(dtype, count, read)

    with archive.open(f"{root}/data.pkl") as file:
        return _Unpickler(file, storage).load()


def _read_legacy(path: str) -> Any:
    """Read the format before PyTorch 1.6.

    It consists of five pickles (magic number, version, machine, content, storage keys), then, for
    each key in turn, an element count of 8 bytes and the numbers.
    """
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
            raise pickle.UnpicklingError("it does not start with PyTorch's magic number")
        _, _, content, keys = (_Unpickler(file, storage).load() for _ in range(4))
        for key in keys:
            offsets[key] = file.tell() + 8
            file.seek(offsets[key] + storages[key].count * storages[key].dtype.itemsize)
        if file.tell() > os.path.getsize(path) or storages.keys() - offsets.keys():
            raise pickle.UnpicklingError("it is truncated")
    return content
