"""The folder of results that a job fills, and continues to fill after a kill."""

import argparse
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, metric_log, storage
from sit_jax.image_io import ImageWriter, encode_png, numbered_images, sheet
from sit_jax.jobs.job import Flag
from sit_jax.jobs.workdir import open_for_writing
from sit_jax.settings import Config

Row = dict[str, Any]
SUMMARY = "summary.json"
_ROWS = "results.jsonl"
_IMAGES = "images"
_LINE_EVERY_S = 60.0


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

    HASH is that of its settings.json, `as_named`: other settings, other folder. Raises `UserError`
    if another job fills the same folder.
    """
    hashed = json.dumps(as_named(settings), indent=2)
    digest = hashlib.sha256(hashed.encode()).hexdigest()[:6]
    folder = epath.Path(flags.out or workdir) / kind / f"{name}-{digest}"
    with open_for_writing(folder):
        hosts.broadcast_from_first(lambda: _move_images(folder))
        results = Results(folder)
        results.write_text("settings.json", json.dumps(settings, indent=2) + "\n")
        yield results


def as_named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as names of results count them: precision.matmul "highest" is null.

    Earlier versions recorded null for "highest", which was their default. Its results keep their
    name, and other precisions never share it.
    """
    named = dict(settings)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            named[key] = as_named(value)
    if "precision" in named and named["precision"]["matmul"] == "highest":
        named["precision"]["matmul"] = None
    return named


class Results:
    """The results of a job in one folder.

    Results are PNG images by index in images/, or rows of results.jsonl, or both. All processes
    call every method, in the same order, unless its docstring says otherwise. Process 0 writes rows
    and files; images are split among processes.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder

    @functools.cached_property
    def images(self) -> ImageWriter:
        """The folder of images. Not collective."""
        return ImageWriter(self.folder / _IMAGES)

    def missing_images(self, count: int) -> list[int]:
        """Return the indices below `count` that have no intact image yet."""
        return hosts.broadcast_from_first(lambda: sorted(self.survey_images(count)))

    def survey_images(self, count: int, shape: tuple[int, int, int] | None = None) -> set[int]:
        """Return the indices without an intact image of this shape. Only process 0 calls this.

        Prints which images are damaged, and whether there are more than `count`.
        """
        images = self.images
        absent, damaged = images.survey(count, shape)
        if damaged:
            listed = ", ".join(f"{index:06d}.png" for index in damaged[:8])
            print(
                f"{len(damaged)} images in {images.folder} are damaged and are made again: {listed}"
            )
        more = len(images.names()) - (count - len(absent))
        if more:
            print(
                f"{images.folder} holds {more} more images than the {count} asked for now; "
                "programs that read the folder count them too"
            )
        return {*absent, *damaged}

    def own_rows(self, size: int) -> Iterator[int]:
        """Yield the rows that this process writes of a batch of `size`, which every process has."""
        yield from range(jax.process_index(), size, jax.process_count())

    def write_image(self, index: int, image_hwc: np.ndarray) -> None:
        """Write the image of an index. Call it last: the image marks the index as complete."""
        self.images.write(index, image_hwc)

    def remove_image(self, index: int) -> None:
        """Delete the image of an index, which is then missing. Only process 0 calls this."""
        self.images.remove(index)

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
            self.write_sheet(config, np.stack(list(self.images.read_all(shown))))

    def write_sheet(self, config: Config, images_bhwc: np.ndarray) -> None:
        """Write sheet.png, beside the folder of images."""
        self.write_bytes("sheet.png", encode_png(make_sheet(config, images_bhwc)))

    def write_text(self, name: str, text: str) -> None:
        """Write a text file beside the results."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file beside the results."""
        if hosts.is_first():
            storage.write_bytes(self.folder / name, data)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self.write_text(SUMMARY, json.dumps(summary, indent=2) + "\n")


def _move_images(folder: epath.Path) -> None:
    """Move the images of an earlier version, which lay beside the sheet, into their own folder."""
    names = numbered_images(folder)
    if not names:
        return
    (folder / _IMAGES).mkdir(exist_ok=True)
    for name in names:
        (folder / name).replace(folder / _IMAGES / name)
    print(f"the {len(names)} images in {folder} are now in {folder / _IMAGES}")


def make_sheet(config: Config, images_bhwc: np.ndarray) -> np.ndarray:
    """Return a grid of uint8 images, laid out as sample.columns and sample.scale say."""
    return sheet(images_bhwc, config.sample.columns, scale=config.sample.scale)


class Progress(tqdm):
    """A progress bar of process 0. Where stderr is not a terminal: a line a minute on stdout."""

    def __init__(self, total: int, unit: str, **options: Any):
        super().__init__(total=total, unit=unit, disable=hosts.tqdm_disabled(), **options)
        self._prints_lines = self.disable and hosts.is_first()
        self._units = f"{unit}s"
        self._done = 0
        self._printed_at = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and number done after the first update

    def update(self, n: float | None = 1) -> bool | None:
        """Add to what is done."""
        if self._prints_lines:
            self._done += int(n or 0)
            self._print_if_due()
        return super().update(n)

    def _print_if_due(self) -> None:
        now = time.monotonic()
        if self._first is None:  # the first update may have waited for the compiler
            self._first = now, self._done
        began_at, began_with = self._first
        if now - self._printed_at < _LINE_EVERY_S or self._done == began_with:
            return
        self._printed_at = now
        rate = (self._done - began_with) / (now - began_at)
        left = tqdm.format_interval((self.total - self._done) / rate)
        print(
            f"{self._done:,} of {self.total:,} {self._units}, {rate:.3g} {self._units}/s, {left} "
            "left",
            flush=True,
        )


def warn(text: str) -> None:
    """Print a warning to stderr, from process 0."""
    if hosts.is_first():
        metric_log.warn(text)


def progress_bar(total: int, unit: str, **options: Any) -> Progress:
    """Return a `Progress` with an ETA."""
    return Progress(total, unit, **options)


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
