"""Writes a torch.save file without torch, each tensor as it comes: the counterpart of `convert.torch_file`."""

import dataclasses
import pickle
import struct
import zipfile
from typing import Any, BinaryIO

import numpy as np

from convert.torch_file import STORAGES

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch.load(mmap=True) uses the numbers where they lie
_STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor that is in the file already, to be put into the structure."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype


class TorchWriter:
    """`with TorchWriter(file) as writer: writer.finish({name: writer.tensor(array), ...})`.

    content: dicts and lists of plain Python values and of what `tensor` returned.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._archive, self._count = file, zipfile.ZipFile(file, "w"), 0

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, *_) -> None:
        self._archive.close()

    def tensor(self, array: np.ndarray) -> Written:
        """Writes the numbers; holds none of them afterwards."""
        key, self._count = str(self._count), self._count + 1
        self._entry(f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return Written(key, array.shape, array.dtype)

    def finish(self, content: Any) -> None:
        """Writes the structure, without which the file is none."""
        self._entry("data.pkl", pickle.PROTO + b"\x02" + _pickled(content) + pickle.STOP)
        self._entry("byteorder", b"little")
        self._entry("version", b"3\n")

    def _entry(self, name: str, data: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
        header = (
            30 + len(entry.filename) + 4
        )  # the local header, the name, and the head of the padding's extra field
        padding = -(self._file.tell() + header) % _ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        self._archive.writestr(entry, data)


def _pickled(value: Any) -> bytes:
    """The opcodes that push a value. Only what Python's pickler cannot do without torch is spelt out."""
    if isinstance(value, dict):
        items = b"".join(_pickled(part) for item in value.items() for part in item)
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_pickled, value)) + pickle.APPENDS
    if isinstance(value, Written):
        return _pickled_tensor(value)
    return pickle.dumps(value, 2)[2:-1]  # without its version and STOP


def _pickled_tensor(tensor: Written) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward hooks)."""
    strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape))]
    storage = (
        pickle.MARK
        + _pickled("storage")
        + _global("torch", _STORAGE_OF[tensor.dtype])
        + _pickled(tensor.key)
        + _pickled("cpu")
        + _pickled(int(np.prod(tensor.shape)))
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = storage + b"".join(map(_pickled, (0, tensor.shape, tuple(strides), False))) + hooks
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + pickle.MARK
        + arguments
        + pickle.TUPLE
        + pickle.REDUCE
    )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
