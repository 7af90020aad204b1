"""Where files go: every path is an `etils.epath.Path`, so a workdir may be local or gs://.

A local file is written beside its target and renamed, so a reader sees the old file or the new one, never half of
either. An object store writes an object whole anyway, and has no rename worth its price.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator

from etils import epath

from sit_jax.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """True for `gs://...` and its like."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def beside(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a path next to the local `path`, for a file or a folder that takes its name when the block has ended.

    What was there before is kept until then. After an error the new one is removed.
    """
    path = epath.Path(path)
    new, old = (
        path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.{word}" for word in ("tmp", "old")
    )
    try:
        yield new
        if path.is_dir():
            path.rename(old)
        os.replace(new, path)
    except BaseException:
        _remove(new)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    _remove(old)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` whole or not at all."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    with beside(path) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def append_text(path: epath.PathLike, text: str) -> None:
    """Adds UTF-8 to the end of a file. A kill may leave a part of it; an object store writes the whole object anew."""
    if is_remote(path):
        path = epath.Path(path)
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def json_rows(text: bytes) -> Iterator[tuple[bytes, dict]]:
    """(line, its object) of every whole line of JSONL, passing over what a kill or a full disk tore."""
    for line in text.split(b"\n")[:-1]:  # what follows the last newline is torn, or empty
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


def make_writable_folder(path: epath.PathLike) -> epath.Path:
    """The folder, made if need be; `UserError` if it cannot be written."""
    path = epath.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable.{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--workdir {os.fspath(path)!r} cannot be written ({error.strerror or error}); "
            "give a folder that you may create and write"
        ) from error
    return path
