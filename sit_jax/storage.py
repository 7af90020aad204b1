"""Writes files atomically, to a local path or gs://, each an `etils.epath.Path`.

A local file is written beside its target and then renamed, so a reader sees either the old file or
the new one, never part of one. An object store writes each object atomically, and a rename there
would copy the object.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator

from etils import epath

from sit_jax.errors import UserError, check, unknown_name

_STORES = ("gs://", "s3://", "az://")
_CHUNK = 2**24  # bytes that are read at a time


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

    The old file or folder stays until then. After an error the new one is removed instead. After a
    kill, `clean_up` removes what is left, or completes the replacement of a folder.
    """
    path = epath.Path(path)
    new = _sibling(path, "tmp")
    try:
        yield new
        if path.is_dir():
            _replace_folder(path, new)
        else:
            os.replace(new, path)
    except BaseException:
        _remove(new)
        raise


@contextlib.contextmanager
def large_file(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a local path for a new file that is written in pieces, and becomes `path` at the end.

    For an object store it is in a temporary folder, from where it is copied.
    """
    path = epath.Path(path)
    if not is_remote(path):
        with beside(path) as new:
            yield new
        return
    with tempfile.TemporaryDirectory() as folder:
        new = epath.Path(folder) / path.name
        yield new
        new.copy(path, overwrite=True)


def _replace_folder(path: epath.Path, new: epath.Path) -> None:
    """Rename a folder away, which os.replace does not do if it holds files, and `new` to `path`."""
    complete = _sibling(path, "new")
    old = _sibling(path, "old")
    new.rename(complete)  # this name says that it is complete
    path.rename(old)
    try:
        complete.rename(path)
    except BaseException:
        old.rename(path)
        _remove(complete)
        raise
    _remove(old)


def _sibling(path: epath.Path, kind: str) -> epath.Path:
    """Return a hidden name beside a path that tells which process uses it."""
    owner = f"{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
    return path.parent / f".{path.name}.{owner}.{kind}"


_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())
_SIBLING = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)-(?P<pid>\d+)-\w{4}\.(?P<kind>tmp|new|old)")
# Earlier versions did not name the process. Such a file is dead if it has not changed for an hour.
_OLD_SIBLING = re.compile(r"\.(?P<name>.+)\.\w{8}\.(?P<kind>tmp|old)")
_DEAD_AFTER_S = 3600


def clean_up(folder: epath.PathLike, name: str | None = None) -> None:
    """Remove what writers that were killed have left in a local folder; only of `name`, if given.

    A folder that was being replaced gets its name back: the new one if it is complete, otherwise
    the old one. What a process that still runs, or one on another machine, is writing stays.
    """
    folder = epath.Path(folder)
    if is_remote(folder) or not folder.is_dir():
        return
    left: dict[str, dict[str, epath.Path]] = {}
    for path in _listed(folder):
        match = _SIBLING.fullmatch(path.name) or _OLD_SIBLING.fullmatch(path.name)
        if match and name in (None, match["name"]) and _is_dead(path, match):
            left.setdefault(match["name"], {})[match["kind"]] = path
            if match["kind"] == "tmp":
                _remove(path)
    for target_name, by_kind in left.items():
        target = folder / target_name
        for kind in ("new", "old"):
            if kind in by_kind and not target.exists():
                by_kind[kind].rename(target)
            elif kind in by_kind:
                _remove(by_kind[kind])


def _listed(folder: epath.Path) -> list[epath.Path]:
    """Return what a folder holds; nothing if it may not be listed, as a parent of a workdir."""
    try:
        return list(folder.iterdir())
    except PermissionError:
        return []


def _is_dead(path: epath.Path, match: re.Match[str]) -> bool:
    if "pid" in match.groupdict():
        return match["host"] == _HOST and not is_running(int(match["pid"]))
    try:
        return time.time() - path.stat().mtime > _DEAD_AFTER_S
    except FileNotFoundError:
        return False


def is_running(pid: int) -> bool:
    """Return True if a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user, or no process number at all
        return True
    return True


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def remove_empty(folders: Iterable[epath.Path]) -> None:
    """Remove local folders, in this order, as far as they are empty."""
    for folder in folders:
        if not is_remote(folder):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def reason(error: BaseException) -> str:
    """Return an error's reason in a few words, without a path."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Raise `UserError` that names the file for an error of the file system."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)} cannot be written ({reason(error)}); make room or repair the "
            "folder: the same command then continues"
        ) from error


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Write `data` to a file atomically. Raises `UserError` if it cannot be written."""
    path = epath.Path(path)
    with writing(path):
        if is_remote(path):
            path.write_bytes(data)
            return
        with beside(path) as new, open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def write_text(path: epath.PathLike, text: str) -> None:
    """Write `text` to a file atomically, as UTF-8. Raises `UserError` if it cannot be written."""
    write_bytes(path, text.encode())


def append_text(path: epath.PathLike, text: str) -> None:
    """Append UTF-8 text to a file, not atomically: a kill may leave a part of it.

    In an object store this writes the entire object again. Raises `UserError` if it cannot be
    written.
    """
    with writing(path):
        if is_remote(path):
            path = epath.Path(path)
            path.write_text((path.read_text() if path.exists() else "") + text)
            return
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def sha256(path: epath.Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read in chunks."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()


def json_rows(text: bytes) -> Iterator[tuple[bytes, dict]]:
    """Yield (line, object) for every complete line of JSONL.

    Skips lines that a kill or a full disk has truncated.
    """
    for line in text.split(b"\n")[:-1]:  # after the last newline: nothing, or a truncated line
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the latter for brackets without end
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
            f"{os.fspath(path)!r} cannot be written ({error.strerror or error}); "
            "give a folder that you may create and write"
        ) from error
    return path
