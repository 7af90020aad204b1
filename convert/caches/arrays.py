"""Read .npy and .npz files within bounds, and without running any code in them.

`np.load` allocates what a header claims before it looks at the file. Here the two are compared
first.
"""

import functools
import io
import math
import os
import stat
import zipfile
import zlib

import numpy as np

from sit_jax import storage
from sit_jax.errors import UserError

_LARGEST = 2**26  # bytes of a file of moments, and of each of its arrays
_LARGEST_HEADER = 10_000  # bytes; np.load's own limit
_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4}  # of the header's length, by version
_PARSERS = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
_NPZ_MEMBERS = 16
# What a damaged file may raise.
_DAMAGED = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError),
    *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: str, at_most: int = _LARGEST) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name, or that of a .npy file under the name "".

    Raises UserError that names the file if it is damaged, holds Python objects, claims more than it
    holds, or has more than this many bytes.
    """
    try:
        data = read_file(path, at_most)
        if path.lower().endswith(".npz"):
            return _npz(data, at_most)
        return {"": _npy(data)}
    except _DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({storage.reason(error)[:300]}); get a complete copy of it"
        ) from error


def read_file(path: str, at_most: int) -> bytes:
    """Return the bytes of a regular file. Raises OSError, or ValueError if it has more."""
    # Without O_NONBLOCK, opening a pipe would wait for a writer for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(at_most + 1)
    if len(data) > at_most:
        raise ValueError(f"it has more than {at_most:,} bytes")
    return data


def _npz(data: bytes, at_most: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > _NPZ_MEMBERS:
            raise ValueError(f"it holds {len(entries)} arrays")
        arrays = {}
        for entry in entries:
            with archive.open(entry) as file:
                expanded = file.read(at_most + 1)  # whatever its size claims to be
            arrays[entry.filename.removesuffix(".npy")] = _npy(expanded)
    return arrays


def _npy(data: bytes) -> np.ndarray:
    """Return the array of a .npy file's bytes, without a copy."""
    version = data[len(_MAGIC)] if len(data) > len(_MAGIC) else None
    if not data.startswith(_MAGIC) or version not in _LENGTH_BYTES:
        raise ValueError("it does not start like a .npy file" if data else "it is empty")
    start = len(_MAGIC) + 2
    after_length = start + _LENGTH_BYTES[version]
    offset = after_length + int.from_bytes(data[start:after_length], "little")
    if offset > min(len(data), _LARGEST_HEADER):
        raise ValueError("its header is truncated or too long")
    shape, is_fortran, dtype = _header(data[:offset])
    size = math.prod(shape) * dtype.itemsize
    if len(data) - offset != size:
        raise ValueError(
            f"it holds {len(data) - offset:,} bytes of numbers instead of {size:,}, for shape "
            f"{list(shape)} in {dtype}"
        )
    values = np.frombuffer(data, dtype, offset=offset)
    return values.reshape(shape, order="F" if is_fortran else "C")


@functools.lru_cache(maxsize=16)  # the files of a cache all have the same one
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and type of a .npy file's header."""
    file = io.BytesIO(data[len(_MAGIC) + 2 :])
    shape, is_fortran, dtype = _PARSERS[data[len(_MAGIC)]](file)
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"it has the shape {list(shape)} and type {dtype}")
    return shape, is_fortran, dtype
