"""Write a torch.save file without torch, one tensor at a time. `convert.torch_file` reads it."""

import dataclasses
import pickle
import struct
import zipfile
from typing import IO, Any

import numpy as np

from convert.torch_file import STORAGES

_ROOT = "archive"
_ALIGNMENT = 64  # bytes; torch.load(mmap=True) uses the numbers in place
_STORAGE_OF = {np.dtype(dtype): name for name, dtype in STORAGES.items()}


@dataclasses.dataclass(frozen=True)
class Written:
    """A reference to a tensor already in the file, for use in the content."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype


class TorchWriter:
    """The writer of one file.

    `with TorchWriter(file) as writer: writer.finish({name: writer.tensor(array), ...})`
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._archive = zipfile.ZipFile(file, "w")
        self._count = 0

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def tensor(self, array: np.ndarray) -> Written:
        """Write an array's numbers at once, without keeping them in memory."""
        key = str(self._count)
        self._count += 1
        self._entry(f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return Written(key, array.shape, array.dtype)

    def finish(self, content: Any) -> None:
        """Write the content: dicts and lists of plain Python values and of results of `tensor`.

        The file is not valid without it.
        """
        self._entry("data.pkl", pickle.PROTO + b"\x02" + _pickled(content) + pickle.STOP)
        self._entry("byteorder", b"little")
        self._entry("version", b"3\n")

    def _entry(self, name: str, data: bytes | memoryview) -> None:
        """Add an entry whose data starts at a multiple of _ALIGNMENT."""
        entry = zipfile.ZipInfo(f"{_ROOT}/{name}")
        # Before the data: the local header (30 bytes), the name, and the extra field "FB", which
        # has a head of 4 bytes and then the padding.
        header = 30 + len(entry.filename) + 4
        padding = -(self._file.tell() + header) % _ALIGNMENT
        entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        self._archive.writestr(entry, data)


def _pickled(value: Any) -> bytes:
    """Return the opcodes that push a value on the unpickler's stack.

    Tensors are written opcode by opcode, because Python's pickler would need torch for them, and so
    are the containers that may hold them.
    """
    if isinstance(value, dict):
        items = b"".join(_pickled(part) for item in value.items() for part in item)
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_pickled, value)) + pickle.APPENDS
    if isinstance(value, Written):
        return _pickled_tensor(value)
    return pickle.dumps(value, 2)[2:-1]  # without the protocol's two bytes and STOP


def _pickled_tensor(tensor: Written) -> bytes:
    """Return the opcodes of a call of torch._utils._rebuild_tensor_v2.

    Its arguments are (storage, offset, shape, strides, requires_grad, backward hooks).
    """
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
    strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape))]
    offset_to_grad = b"".join(map(_pickled, (0, tensor.shape, tuple(strides), False)))
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    return (
        _global("torch._utils", "_rebuild_tensor_v2")
        + pickle.MARK
        + storage
        + offset_to_grad
        + hooks
        + pickle.TUPLE
        + pickle.REDUCE
    )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
