"""Writes files atomically, to a local path or gs://, each an `etils.epath.Path`.

A local file is written beside its target and then renamed, so a reader sees either the old file or
the new one, never part of one. An object store writes each object atomically, and a rename there
would copy the object.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator

from etils import epath

from sit_jax.errors import UserError, check, unknown_name

_STORES = ("gs://", "s3://", "az://")


def expand(name: str, path: str) -> str:
    """Return a path that a user gave under this name, with a leading ~ as the home folder.

    The shell does not expand the ~ of --workdir=~/runs. A $VARIABLE is not expanded here. Raises
    `UserError` for an empty path, an unknown user, or a $VARIABLE that the shell left as it is.
    """
    check(path, f"{name} is empty; expected a path")
    if is_remote(path):
        return path
    expanded = os.path.expanduser(path)
    check(
        not expanded.startswith("~") or os.path.lexists(expanded.split("/")[0]),
        f"{name} is {path!r}, but {expanded.split('/')[0]!r} is not a user of this machine; give "
        "the path itself",
    )
    end = expanded.find("/", expanded.rfind("$"))  # of the last part that has a $
    check(
        "$" not in expanded or os.path.lexists(expanded if end < 0 else expanded[:end]),
        f"{name} is {path!r}, which does not exist: a $VARIABLE is expanded by the shell, outside "
        "single quotes, and not here; give the path itself",
    )
    return expanded


def check_reachable(name: str, path: str) -> None:
    """Raise `UserError` if `path` is in an object store that cannot be read from here."""
    if not is_remote(path):
        return
    scheme = path.partition("://")[0] + "://"
    if scheme not in _STORES:
        raise unknown_name(f"kind of path in {name}", scheme, _STORES)
    try:
        epath.Path(path).exists()
    except Exception as error:  # each store has errors of its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} {path!r} cannot be read ({type(error).__name__}: {reason}); install what is "
            "missing, log in to the store, or give a local folder"
        ) from error


def is_remote(path: epath.PathLike) -> bool:
    """Return True for a path such as `gs://...`."""
    return "://" in os.fspath(path)


@contextlib.contextmanager
def beside(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a path next to the local `path` for a new file or folder, renamed to `path` at the end.

    The old file or folder stays until then. After an error the new one is removed instead.
    """
    path = epath.Path(path)
    new = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
    try:
        yield new
        if path.is_dir():
            path.rename(old)  # os.replace does not replace a folder that holds files
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
    """Write `data` to a file atomically."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    with beside(path) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: epath.PathLike, text: str) -> None:
    """Write `text` to a file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def append_text(path: epath.PathLike, text: str) -> None:
    """Append UTF-8 text to a file, not atomically: a kill may leave a part of it.

    In an object store this writes the entire object again.
    """
    if is_remote(path):
        path = epath.Path(path)
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def json_rows(text: bytes) -> Iterator[tuple[bytes, dict]]:
    """Yield (line, object) for every complete line of JSONL.

    Skips lines that a kill or a full disk has truncated.
    """
    for line in text.split(b"\n")[:-1]:  # after the last newline: nothing, or a truncated line
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield line, row


def make_writable_folder(path: epath.PathLike) -> epath.Path:
    """Return the folder, created if it does not exist. Raises UserError if it is not writable."""
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
