"""Arrays by index that become one large .npz file, and until then lie in parts.

A folder holds

    samples.npz        arr_0 [n, ...] of the indices 0 to n - 1, and other arrays; once complete
    parts/000128.npz   arr_0 [k, ...] and their `index` [k], ascending, the first of which it names
    samples-50000.npz  an earlier samples.npz that held more than was asked for since

Every file is written at once, and the checksums inside an .npz file show whether it is damaged.
"""

import dataclasses
import io
import os
import shutil
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from sit_jax import storage
from sit_jax.data.npz import DAMAGE, read_header
from sit_jax.errors import UserError, check
from sit_jax.image_io import write_npz

JOINED = "samples.npz"
_PART_BYTES = 2**26  # that are collected in memory at most
_PART_SECONDS = 2.0  # of work that a kill may destroy, unless a single call takes longer


@dataclasses.dataclass(frozen=True)
class _File:
    """An intact file of arrays."""

    path: epath.Path
    indices: np.ndarray  # of its rows, ascending


class Parts:
    """The arrays of a folder, all of one shape and type.

    Several processes may each `add` their own arrays. All other methods are for one of them.
    """

    def __init__(self, folder: epath.Path, shape: tuple[int, ...], dtype: Any):
        self._folder = folder
        self._parts = folder / "parts"
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._row_bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._added: dict[int, np.ndarray] = {}
        self._written_at = 0.0
        self._damaged: set[str] = set()

    def add(self, index: int, array: np.ndarray) -> None:
        """Keep the array of an index; it is safe only after the next `flush`."""
        assert (array.shape, array.dtype) == (self._shape, self._dtype), (array.shape, array.dtype)
        self._added[index] = array.copy()
        if len(self._added) * self._row_bytes >= _PART_BYTES:
            self.flush()

    def flush_if_due(self) -> None:
        """Write what has been added, unless that has just been done."""
        if time.monotonic() - self._written_at >= _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added."""
        if self._added:
            indices = np.array(sorted(self._added), np.int64)
            file = io.BytesIO()
            np.savez(file, arr_0=np.stack([self._added[i] for i in indices]), index=indices)
            self._parts.mkdir(exist_ok=True)
            # No intact part has this name, as its first index would not be missing.
            storage.write_bytes(self._parts / f"{indices[0]:06d}.npz", file.getvalue())
            self._added.clear()
            self._written_at = time.monotonic()

    def survey(self) -> tuple[np.ndarray, list[str]]:
        """Return the indices of all arrays in intact files, ascending, and the damaged files.

        The contents of all files are checked. Damaged parts are deleted.
        """
        damaged = [
            path
            for path in self._paths()
            if _read_indices(path, self._shape, self._dtype, check_content=True) is None
        ]
        for path in damaged:
            if path.parent == self._parts:
                path.unlink()
            else:
                self._damaged.add(os.fspath(path))
        return self.held(), [os.fspath(path) for path in damaged]

    def held(self) -> np.ndarray:
        """Return the indices of all arrays in files that `survey` found intact, ascending."""
        held = [file.indices for file in self._files()]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *held]))

    def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        """Yield the arrays at these indices, ascending, one at a time. Files must hold them all."""
        wanted = np.asarray(indices, np.int64)
        files = self._files()
        file_of = np.full(max([-1, *wanted[-1:], *(file.indices[-1] for file in files)]) + 1, -1)
        for number, file in enumerate(files):
            file_of[file.indices] = number
        is_wanted = np.zeros(len(file_of), bool)
        is_wanted[wanted] = True
        assert (file_of[wanted] >= 0).all(), "arrays that no file holds"
        left = np.bincount(file_of[wanted], minlength=len(files))
        streams: dict[int, Iterator[np.ndarray]] = {}
        for number in file_of[wanted]:
            if number not in streams:
                rows = files[number].indices
                of_rows = is_wanted[rows] & (file_of[rows] == number)
                streams[number] = self._read_rows(files[number], of_rows)
            yield next(streams[number])
            left[number] -= 1
            if not left[number]:
                streams.pop(number).close()  # type: ignore[attr-defined]

    def _read_rows(self, file: _File, is_wanted: np.ndarray) -> Iterator[np.ndarray]:
        try:
            with (
                file.path.open("rb") as opened,
                zipfile.ZipFile(opened) as archive,
                archive.open("arr_0.npy") as entry,
            ):
                shape, _, _ = read_header(entry)
                row_bytes = int(np.prod(shape[1:])) * self._dtype.itemsize
                for wanted in is_wanted:
                    data = entry.read(row_bytes)
                    if wanted:
                        row = np.frombuffer(data, self._dtype).reshape(shape[1:])
                        yield row[..., : self._shape[-1]]  # of a grey image in RGB
        except DAMAGE as error:
            raise UserError(
                f"{os.fspath(file.path)} cannot be read ({storage.reason(error)}); give the same "
                "command again, which replaces it"
            ) from error

    def is_joined(self, count: int) -> bool:
        """Return True if samples.npz holds just the first `count` arrays."""
        file = self._joined_file()
        return file is not None and len(file.indices) == count

    def check_room(self, count: int, missing: int) -> None:
        """Raise `UserError` if the disk is too small for samples.npz and the parts before it."""
        needed = (count + missing) * self._row_bytes
        if self.is_joined(count) or storage.is_remote(self._folder):
            return
        free = shutil.disk_usage(self._folder).free
        check(
            needed < free,
            f"{needed / 1e9:,.1f} GB are needed in {str(self._folder)!r}, which has "
            f"{free / 1e9:,.1f} GB free; make room, give --out on another disk, or lower "
            "sample.count",
        )

    def join(self, arrays: Iterable[np.ndarray], count: int, **others: np.ndarray) -> str | None:
        """Write samples.npz of `count` arrays, and remove the parts that it holds.

        An older one that holds more is kept under another name, which is returned.
        """
        kept = self._keep_larger(count)
        write_npz(self._folder / JOINED, count, arrays, **others)
        self._damaged.discard(os.fspath(self._folder / JOINED))
        self.remove_below(count)
        return kept

    def _keep_larger(self, count: int) -> str | None:
        file = self._joined_file()
        if file is None or len(file.indices) <= count:
            return None
        name = f"samples-{len(file.indices)}.npz"
        file.path.replace(self._folder / name)
        return name

    def remove_below(self, count: int) -> None:
        """Delete the parts that hold only indices below `count`."""
        for file in self._files():
            if file.path.parent == self._parts and file.indices[-1] < count:
                file.path.unlink()
        storage.remove_empty([self._parts])

    def _joined_file(self) -> _File | None:
        return next((file for file in self._files() if file.path.name == JOINED), None)

    def _paths(self) -> list[epath.Path]:
        parts = list(self._parts.glob("[0-9]*.npz")) if self._parts.exists() else []
        larger = self._folder.glob("samples-*.npz")
        joined = [path for path in [self._folder / JOINED] if path.exists()]
        return [*sorted(larger), *joined, *sorted(parts)]

    def _files(self) -> list[_File]:
        files = []
        for path in self._paths():
            indices = _read_indices(path, self._shape, self._dtype)
            if indices is not None and os.fspath(path) not in self._damaged:
                files.append(_File(path, indices))
        return files


def _read_indices(
    path: epath.Path, shape: tuple[int, ...], dtype: np.dtype, check_content: bool = False
) -> np.ndarray | None:
    """Return the indices of a file's rows; None if it is damaged, or holds other arrays."""
    try:
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            if check_content and archive.testzip() is not None:
                return None
            with archive.open("arr_0.npy") as entry:
                stored, fortran_order, stored_dtype = read_header(entry)
            is_same = stored[1:] in (shape, (*shape[:-1], 3) if shape[-1] == 1 else shape)
            if fortran_order or stored_dtype != dtype or not is_same or not stored[0]:
                return None
            if "index.npy" not in archive.namelist():
                return np.arange(stored[0])
            with archive.open("index.npy") as entry:
                indices = np.lib.format.read_array(entry, allow_pickle=False)
            return indices if indices.shape == stored[:1] else None
    except DAMAGE:
        return None
