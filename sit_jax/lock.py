"""A lock on a folder, so that only one job at a time writes there.

On a local file system it is the kernel's lock of an open file, which ends with its process, however
that ends. An object store, and a file system without locks, has a lease instead: an object that its
owner writes again every few seconds.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_BEAT_S = 20.0  # the owner of a lease writes it this often
_LEASE_S = 4 * _BEAT_S  # a lease that is not written for so long has lost its owner
_POLL_S = 2.0


@contextlib.contextmanager
def hold(folder: epath.Path) -> Iterator[None]:
    """Hold the lock of a folder. Not collective: only process 0 of a run calls it.

    A lock whose owner is dead is taken over, with a line that says so. Raises `UserError` that
    names the owner if it is alive.
    """
    path = folder / NAME
    with contextlib.ExitStack() as stack:
        file = None if storage.is_remote(folder) else _lock_file(path)
        if file:
            stack.enter_context(_held_file(path, file))
        else:
            stack.enter_context(_held_lease(path))
        yield


def _lock_file(path: epath.Path) -> IO[str] | None:
    """Return the locked, open file; None if this file system has no locks."""
    if fcntl is None:
        return None
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is held while the lock is
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise _in_use(path, _owner(file)) from None
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the owner before has just deleted it


@contextlib.contextmanager
def _held_file(path: epath.Path, file: IO[str]) -> Iterator[None]:
    with file:
        if owner := _owner(file):
            _say_taken_over(path, owner)
        try:
            with storage.writing(path):
                file.truncate(0)
                # Not buffered: closing the file would try again, and raise another error.
                os.write(file.fileno(), json.dumps(_self()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)


def _owner(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    return _parsed(file.read())


@contextlib.contextmanager
def _held_lease(path: epath.Path) -> Iterator[None]:
    own = _self()
    _wait_for_lease(path)
    storage.write_text(path, json.dumps(own))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with contextlib.suppress(OSError, UserError):  # a network that fails for a moment
                owner = _parsed(path.read_text())
                if owner and owner["id"] != own["id"]:
                    print(f"error: {path.parent} was taken over by {_name(owner)}", file=sys.stderr)
                    os._exit(1)  # anything written from now on would damage the other's run
                storage.write_text(path, json.dumps(own | {"beat": uuid.uuid4().hex}))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _wait_for_lease(path: epath.Path) -> None:
    """Return once the lease is free, or its owner is dead. Raises `UserError` if it is alive."""
    first = _read(path)
    if not first:
        return
    if not _is_dead(first):
        print(
            f"{path.parent} is in use by {_name(first)}; waiting up to {_LEASE_S:.0f} s to see "
            "whether that still runs",
            flush=True,
        )
        end = time.monotonic() + _LEASE_S
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            now = _read(path)
            if not now:
                return
            if now != first:
                raise _in_use(path, now)
    _say_taken_over(path, first)


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_text())
    except OSError:
        return {}


def _parsed(text: str) -> dict[str, Any]:
    """Return the owner; {} for an empty or damaged file."""
    try:
        owner = json.loads(text)
        return {name: owner[name] for name in ("host", "pid", "started", "id", "beat")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "id": uuid.uuid4().hex,
        "beat": "",
    }


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return True if the owner ran on this machine and has ended."""
    return owner["host"] == socket.gethostname() and not storage.is_running(owner["pid"])


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}, since {owner['started']}"


def _say_taken_over(path: epath.Path, owner: dict[str, Any]) -> None:
    print(f"{path.parent} is taken over from {_name(owner)}, which has died", flush=True)


def _in_use(path: epath.Path, owner: dict[str, Any]) -> UserError:
    by = _name(owner) if owner else "another process"
    return UserError(
        f"{str(path.parent)!r} is in use by {by}; wait for it, stop it, or give another --workdir"
    )
