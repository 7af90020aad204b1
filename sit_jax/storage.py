"""Where files go: every path is an `etils.epath.Path`, so a workdir may be local or gs://.

A local file is written beside its target and renamed, so a reader sees the old file or the new one, never half of
either. An object store writes an object whole anyway, and has no rename worth its price.
"""

import os
import uuid

from etils import epath

from sit_jax.errors import UserError


def is_remote(path: epath.PathLike) -> bool:
    """True for `gs://...` and its like."""
    return "://" in os.fspath(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `data` whole or not at all."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    beside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def make_workdir(path: epath.PathLike) -> epath.Path:
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
