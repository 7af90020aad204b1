"""Reads .npz files of any size and any project: headers on their own, arrays in pieces."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from sit_jax import storage
from sit_jax.errors import UserError, check

# What NumPy, zipfile and zlib raise for a damaged or truncated file.
DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
LABELS = ("arr_1", "labels")  # names of the labels: in samples as ADM's, and in our latents


class NpzFile:
    """An .npz file. Nothing is unpickled. Every method raises `UserError` for a damaged file."""

    def __init__(self, path: str):
        self.path = path
        with self._reading(), zipfile.ZipFile(path) as file:
            entries = [name for name in file.namelist() if name.endswith(".npy")]
        self.names = tuple(name.removesuffix(".npy") for name in entries)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Return the shape and type of an array, without reading it."""
        with self._reading(), zipfile.ZipFile(self.path) as file, file.open(f"{name}.npy") as entry:
            shape, is_fortran, dtype = read_header(entry)
        check(
            not is_fortran or len(shape) < 2,
            f"{self.path!r}: {name} is in Fortran order; save np.ascontiguousarray of it instead",
        )
        return shape, dtype

    def array(self, name: str) -> np.ndarray:
        """Return an array, read at once."""
        with self._reading(), np.load(self.path, allow_pickle=False) as file:
            return file[name]

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """Yield an array in pieces of `size` rows, of which the last may be smaller."""
        shape, dtype = self.header(name)
        row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
        with self._reading(), zipfile.ZipFile(self.path) as file, file.open(f"{name}.npy") as entry:
            read_header(entry)
            for start in range(0, shape[0], size):
                rows = min(size, shape[0] - start)
                data = _read_exactly(entry, rows * row_bytes)
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])
            entry.read(1)  # at the end, zipfile compares the checksum

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(
                f"{self.path!r} is damaged or incomplete ({storage.reason(error)}); copy it again"
            ) from error


def read_header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and type of an array; its data come next.

    Raises ValueError for anything but an array in NumPy's format.
    """
    version = np.lib.format.read_magic(entry)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(entry)
    return np.lib.format.read_array_header_2_0(entry)


def _read_exactly(entry: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = entry.read(size)
        if not part:
            raise EOFError("its end is missing")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
