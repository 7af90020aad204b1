"""Read the tensors of a torch.save file without torch, and without running any code in the file.

Such a file is a zip: `data.pkl` holds the structure, `data/KEY` the raw storages. Before PyTorch
1.6 it was a sequence of pickles followed by the storages, and some published weights still have
that format. `plain_pickle` reads the structure within bounds, and calls only the few functions
below. What a file claims is compared with its size before anything is expanded.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from convert import plain_pickle
from convert.plain_pickle import of_type
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
# Of torch.dtype, in tensors of types that have no storage class, and in args.
_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_AXES = 8
# Tensors may share storages, as a model and an EMA that are the same do. So the bytes of all of
# them may exceed the file's, but not by more than this.
_MAX_SHARING = 8


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
    of_type(storage, _Storage)
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) > _MAX_AXES or not all(type(n) is int for n in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor has no plain shape")
    last = -1  # index of the last element; an empty tensor has none
    if all(shape):
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min([offset, *shape, *strides]) < 0 or last >= storage.count:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} reaches past its storage of {storage.count} elements"
        )
    if math.prod(shape) > storage.count:
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} repeats the {storage.count} elements of its storage"
        )

    def read() -> np.ndarray:
        values = np.frombuffer(storage.read(), storage.dtype, storage.count)[offset:]
        strides_in_bytes = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(values, shape, strides_in_bytes, writeable=False)

    return Tensor(shape, storage.dtype, read)


def _rebuild_typed_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: Any,
    *_: object,
) -> Tensor:
    """Return a view of bytes as numbers of a type that has no storage class."""
    kind = of_type(dtype, np.dtype)
    typed = dataclasses.replace(storage, dtype=kind, count=storage.count // kind.itemsize)
    return _rebuild_tensor(typed, offset, shape, strides)


class _NumpyType:
    """A NumPy dtype of one number."""

    def __init__(self, name: str, *_: object):
        if of_type(name, str)[:1] not in "fiub" or len(name) > 2:
            raise pickle.UnpicklingError(f"it has a NumPy scalar of type {name!r}")
        self.dtype = np.dtype(name)

    def built(self, state: tuple) -> "_NumpyType":
        """Return the type with the byte order of its pickled state."""
        self.dtype = self.dtype.newbyteorder(of_type(state[1], str)[:1])
        return self


def _numpy_scalar(kind: _NumpyType, data: bytes) -> Any:
    """Return a NumPy scalar as a plain number."""
    (value,) = np.frombuffer(of_type(data, bytes), of_type(kind, _NumpyType).dtype)
    return value.item()


def _path(*parts: str) -> str:
    """Return a path of pathlib as a text."""
    return str(pathlib.PurePosixPath(*(of_type(part, str) for part in parts)))


# Everything that a file may refer to.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): plain_pickle.ordered_dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    # NumPy's types are functions; its dtypes are plain values.
    **{("torch", name): np.dtype(dtype) for name, dtype in (STORAGES | _DTYPES).items()},
    ("torch.storage", "UntypedStorage"): np.dtype(np.uint8),
    # Of args:
    ("torch", "Size"): lambda shape: tuple(of_type(shape, tuple)),
    ("torch", "device"): lambda name, index=0: f"{of_type(name, str)}:{of_type(index, int)}",
    ("numpy", "dtype"): _NumpyType,
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    ("_codecs", "encode"): lambda text, _: of_type(text, str).encode("latin-1"),
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{(module, "dict"): plain_pickle.ordered_dict for module in ("builtins", "__builtin__")},
}


def _persistent(storage: Callable[[np.dtype, str, int], _Storage]) -> Callable[[tuple], _Storage]:
    """Return the function from a persistent id to a storage: `storage(dtype, key, count)`."""
    kinds = {np.dtype(dtype) for dtype in STORAGES.values()}

    def load(pid: tuple) -> _Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or any(view) or of_type(dtype, np.dtype) not in kinds:
            raise pickle.UnpicklingError("it has an unknown persistent object")
        if not 0 <= of_type(count, int) < 2**60:
            raise pickle.UnpicklingError(f"a storage has {count} elements")
        return storage(dtype, of_type(key, str), count)

    return load


def read_torch_file(path: str) -> Any:
    """Return the object that torch.save wrote, with each tensor as a lazy `Tensor`.

    Raises UserError if the file is not a complete torch.save file.
    """
    with _readable(path):
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
        tensors = (value for value in plain_pickle.walk(content) if isinstance(value, Tensor))
        claimed = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
        if claimed > _MAX_SHARING * os.path.getsize(path):
            raise pickle.UnpicklingError(
                f"its tensors claim {claimed} bytes, more than {_MAX_SHARING} times the file's size"
            )
        return content


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn any exception into a UserError that names the file."""
    try:
        yield
    # A damaged or hostile pickle can raise almost any error.
    except Exception as error:
        reason = " ".join(str(error)[:1000].split())[:300] or type(error).__name__
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

    def entry_of(name: str, at_most: float) -> zipfile.ZipInfo:
        """Return an entry, whose bytes are in the file as they are."""
        entry = archive.getinfo(f"{root}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"its {name} is compressed, which torch.save never does")
        if entry.file_size > min(entry.compress_size, at_most):
            raise pickle.UnpicklingError(f"its {name} claims {entry.file_size} bytes")
        return entry

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        entry = entry_of(f"data/{key}", math.inf)
        if entry.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"storage {key} has {entry.file_size} bytes for {count} {dtype} numbers"
            )

        def read() -> bytes:
            with _readable(path):  # reading verifies the entry's checksum
                return archive.read(entry)

        return _Storage(dtype, count, read)

    if f"{root}/byteorder" in names and archive.read(entry_of("byteorder", 100)) != b"little":
        raise pickle.UnpicklingError("its numbers are big-endian")
    structure = archive.read(entry_of("data.pkl", plain_pickle.MAX_BYTES))
    return plain_pickle.load(io.BytesIO(structure), _ALLOWED, _persistent(storage))


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

        def next_pickle() -> Any:
            return plain_pickle.load(file, _ALLOWED, _persistent(storage))

        if next_pickle() != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("it does not start with PyTorch's magic number")
        _, _, content, keys = (next_pickle() for _ in range(4))
        for key in keys:
            offsets[key] = file.tell() + 8
            file.seek(offsets[key] + storages[key].count * storages[key].dtype.itemsize)
        if file.tell() > os.path.getsize(path) or storages.keys() - offsets.keys():
            raise pickle.UnpicklingError("it is truncated")
    return content
