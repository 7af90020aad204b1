"""The folder of results that a job fills, and continues to fill after a kill."""

import argparse
import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, storage
from sit_jax.errors import UserError
from sit_jax.image_io import ImageWriter, encode_png, sheet, write_npz
from sit_jax.jobs.job import Flag
from sit_jax.jobs.workdir import open_for_writing
from sit_jax.settings import Config

Row = dict[str, Any]
_ROWS = "results.jsonl"


OUT = Flag(
    "out",
    "folder for the results, instead of the workdir, which may then be read-only",
    "DIR",
    is_path=True,
)


@contextlib.contextmanager
def open_results(
    flags: argparse.Namespace, workdir: epath.Path, kind: str, name: str, settings: Mapping
) -> Iterator["Results"]:
    """Hold the folder KIND/NAME-HASH of the workdir, or of --out, while a job fills it.

    HASH is that of its settings.json: other settings, other folder. Raises `UserError` if another
    job fills the same folder.
    """
    text = json.dumps(settings, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    folder = epath.Path(flags.out or workdir) / kind / f"{name}-{digest}"
    with open_for_writing(folder):
        results = Results(folder)
        results.write_text("settings.json", text + "\n")
        yield results


class Results:
    """The results of a job in one folder.

    Results are PNG images by index, or rows of results.jsonl, or both. All processes call every
    method, in the same order. Process 0 writes rows and files; images are split among processes.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self._images = ImageWriter(folder)
        self._arrays = folder / "latents"

    def missing_images(self, count: int) -> list[int]:
        """Return the indices below `count` that have no image yet."""
        return hosts.broadcast_from_first(lambda: self._images.missing(count))

    def own_rows(self, size: int) -> Iterator[int]:
        """Yield the rows that this process writes of a batch of `size`, which every process has."""
        yield from range(jax.process_index(), size, jax.process_count())

    def write_image(self, index: int, image_hwc: np.ndarray) -> None:
        """Write the image of an index. Call it last: the image marks the index as complete."""
        self._images.write(index, image_hwc)

    def write_array(self, index: int, array: np.ndarray) -> None:
        """Write an array of an index, before its image."""
        file = io.BytesIO()
        np.save(file, array)
        self._arrays.mkdir(exist_ok=True)
        storage.write_bytes(self._arrays / _array_name(index), file.getvalue())

    def write_arrays(self, name: str, count: int, labels: np.ndarray) -> None:
        """Write the arrays of all indices below `count`, of equal shapes, into one .npz file.

        They are `arr_0` [count, ...], beside `labels` [count].
        """
        if not hosts.is_first():
            return
        arrays = (self._read_array(index) for index in range(count))
        write_npz(self.folder / name, count, arrays, labels=labels)

    def _read_array(self, index: int) -> np.ndarray:
        path = self._arrays / _array_name(index)
        try:
            return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} cannot be read ({storage.reason(error)}); delete {index:06d}.png in "
                f"{str(self.folder)!r}, and give the same command again"
            ) from error

    def remove_image(self, index: int) -> None:
        """Delete the image of an index, which is then missing. Only process 0 calls this."""
        self._images.remove(index)

    def read_rows(self, names: Iterable[str]) -> list[Row]:
        """Return the rows written so far. A row without all these names is not one of the job's."""
        rows = hosts.broadcast_from_first(lambda: _read_rows(self.folder / _ROWS))
        return [row for row in rows if row.keys() >= set(names)]

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Append rows to results.jsonl."""
        if hosts.is_first():
            storage.append_text(self.folder / _ROWS, _lines(rows))

    def keep_rows(self, rows: Sequence[Row]) -> None:
        """Replace results.jsonl by these rows, at once."""
        self.write_text(_ROWS, _lines(rows))

    def finish_images(self, count: int, config: Config) -> None:
        """Wait until all processes have written their images, then write sheet.png of the first."""
        hosts.gather(None)
        if hosts.is_first():
            shown = range(min(count, config.log.sheet_count))
            images = np.stack([self._images.read(index) for index in shown])
            self.write_bytes("sheet.png", encode_png(make_sheet(config, images)))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file beside the results."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file beside the results."""
        if hosts.is_first():
            storage.write_bytes(self.folder / name, data)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self.write_text("summary.json", json.dumps(summary, indent=2) + "\n")


def make_sheet(config: Config, images_bhwc: np.ndarray) -> np.ndarray:
    """Return a grid of uint8 images, laid out as sample.columns and sample.scale say."""
    return sheet(images_bhwc, config.sample.columns, scale=config.sample.scale)


def progress_bar(total: int, unit: str, **options: Any) -> tqdm:
    """Return a progress bar with an ETA, shown by process 0 if stderr is a terminal."""
    return tqdm(total=total, unit=unit, disable=hosts.tqdm_disabled(), **options)


def _array_name(index: int) -> str:
    return f"{index:06d}.npy"


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_rows(path: epath.Path) -> list[Row]:
    """Return the complete rows. Remove a line truncated by a kill, so that its item is redone."""
    if not path.exists():
        return []
    text = path.read_bytes()
    lines_and_rows = list(storage.json_rows(text))
    complete = b"".join(line + b"\n" for line, _ in lines_and_rows)
    if complete != text:
        storage.write_bytes(path, complete)
    return [row for _, row in lines_and_rows]
