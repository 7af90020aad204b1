"""Copies stored latents to a local disk: `python -m sit_jax.data.fetch SRC DST`.

SRC is a folder of stored latents in a bucket or on shared storage. Each file is copied beside its
target, checked against the manifest, and renamed. manifest.json comes last, so a DST that has one
is complete. The same command continues a copy that was interrupted.

A file that has been checked is noted in DST with its size and modification time. Later starts
compare only these; --verify reads every byte again.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from etils import epath

from sit_jax import storage
from sit_jax.data import latent_cache
from sit_jax.data.latent_cache import LABELS, MANIFEST, Manifest
from sit_jax.errors import UserError, check

_VERIFIED = ".verified.jsonl"  # a line for each file of DST that has been checked
_THREADS = 8
_CHUNK = 2**24  # bytes
_REPORT_S = 10.0  # seconds between two lines of progress
_AGAIN = "the same command continues"


class _File(NamedTuple):
    """A file of the folder besides its manifest."""

    name: str
    bytes: int
    sha256: str


class _Stopped(Exception):
    """Another thread has failed, or Ctrl-C has ended the command."""


class _Progress:
    """Counts the bytes that threads have read, and prints a line every few seconds."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._start = self._printed = time.monotonic()
        self._lock = threading.Lock()
        self._stopped = False

    def expect(self, count: int) -> None:
        """Increase the number of bytes to read."""
        with self._lock:
            self._total += count

    def add(self, count: int) -> None:
        """Count bytes that were read. Raises `_Stopped` after `stop`."""
        with self._lock:
            if self._stopped:
                raise _Stopped
            self._done += count
            now = time.monotonic()
            if now - self._printed >= _REPORT_S:
                self._printed = now
                rate = self._done / (now - self._start)
                left = (self._total - self._done) / rate
                print(
                    f"{self._done / 1e9:,.1f} of {self._total / 1e9:,.1f} GB, "
                    f"{rate / 1e6:,.0f} MB/s, {_duration(left)} left",
                    flush=True,
                )

    def stop(self) -> None:
        """Make every further `add` raise `_Stopped`."""
        self._stopped = True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


def fetch(source: epath.PathLike, target: epath.PathLike, *, verify: bool = False) -> None:
    """Copy the stored latents in `source` to the local folder `target`.

    Files of `target` that are already correct are kept; `verify` reads them again. Raises
    `UserError` if `source` is not complete, a file is not the one that its manifest names, or
    `target` holds other latents or lacks the room.
    """
    source = epath.Path(source)
    target = epath.Path(target)
    manifest, manifest_bytes = _read_manifest(source)
    check(
        not storage.is_remote(target),
        f"DST {str(target)!r} is not on a local disk; expected a folder of this machine",
    )
    check(
        not (target.exists() and source.exists() and _same(source, target)),
        f"SRC and DST are the same folder, {str(target)!r}; nothing needs to be copied",
    )
    target = storage.make_writable_folder(target)
    with _alone_in(target):
        storage.clean_up(target)
        _check_target(source, target, manifest_bytes)
        files = _files_of(source, manifest)
        verified = {} if verify else _read_verified(target)
        left = [file for file in files if not _is_verified(target, file, verified)]
        _check_room(target, left)
        copied = _fetch_all(source, target, left)
        if _bytes_of(target / MANIFEST) != manifest_bytes:
            storage.write_bytes(target / MANIFEST, manifest_bytes)
        print(_summary(target, manifest, files, left, copied), flush=True)


def _summary(
    target: epath.Path,
    manifest: Manifest,
    files: Sequence[_File],
    left: Sequence[_File],
    copied: Sequence[_File],
) -> str:
    size = sum(file.bytes for file in files) / 1e9
    parts = [
        f"{len(copied)} copied",
        f"{len(left) - len(copied)} read and correct",
        f"{len(files) - len(left)} unchanged since they were checked",
    ]
    return (
        f"{target}: {manifest.records:,} latents, {len(files)} files, {size:,.1f} GB: "
        f"{', '.join(parts)}"
    )


def _read_manifest(source: epath.Path) -> tuple[Manifest, bytes]:
    """Return the manifest and its bytes. Raises `UserError` if it is missing or damaged."""
    check(
        any((source / name).exists() for name in (MANIFEST, latent_cache.PLAN)),
        f"{str(source)!r} holds no stored latents ({MANIFEST} is missing); only these have "
        "checksums, so read other data from where it is, or mount its bucket",
    )
    manifest = latent_cache.read_manifest(source)
    return manifest, b"".join(_chunks(source / MANIFEST))


def _same(one: epath.Path, other: epath.Path) -> bool:
    return not storage.is_remote(one) and os.path.samefile(one, other)


@contextlib.contextmanager
def _alone_in(folder: epath.Path) -> Iterator[None]:
    """Wait until no other process of this machine fetches into the folder, and keep others out.

    Where the file system has no locks, several processes copy the same files, each under names of
    its own, and the last one to rename wins.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that copies to {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)  # which ends the lock


def _check_target(source: epath.Path, target: epath.Path, manifest_bytes: bytes) -> None:
    """Raise `UserError` if the folder holds latents of its own."""
    check(
        not (target / latent_cache.PLAN).exists(),
        f"{str(target)!r} holds latents that are being stored; give another folder",
    )
    present = _bytes_of(target / MANIFEST)
    check(
        present in (None, manifest_bytes),
        f"{str(target)!r} holds other latents than {str(source)!r} (their {MANIFEST} differ); "
        "delete it, or give another folder",
    )


def _bytes_of(path: epath.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _files_of(source: epath.Path, manifest: Manifest) -> list[_File]:
    labels = source / LABELS
    try:
        size = labels.stat().length
    except Exception as error:  # each store has errors of its own
        raise UserError(
            f"{labels} cannot be read ({storage.reason(error)}); copy it there again from where "
            "the latents were stored"
        ) from error
    shards = [_File(shard.name, shard.bytes, shard.sha256) for shard in manifest.shards]
    return [_File(LABELS, size, manifest.labels_sha256), *shards]


def _read_verified(target: epath.Path) -> dict[str, dict[str, Any]]:
    """Return the last note on each file."""
    text = _bytes_of(target / _VERIFIED) or b""
    return {str(row.get("name")): row for _, row in storage.json_rows(text)}


def _is_verified(target: epath.Path, file: _File, verified: dict[str, dict[str, Any]]) -> bool:
    return file.name in verified and verified[file.name] == _note(target, file)


def _note(target: epath.Path, file: _File) -> dict[str, Any] | None:
    """Return the note on a correct file; None if it is missing or of another size."""
    try:
        status = os.stat(target / file.name)
    except FileNotFoundError:
        return None
    if status.st_size != file.bytes:
        return None
    return {**file._asdict(), "changed_ns": status.st_mtime_ns}


def _check_room(target: epath.Path, left: Sequence[_File]) -> None:
    """Raise `UserError` unless the disk has room for the files that are missing."""
    needed = sum(file.bytes for file in left if not _note(target, file))
    free = shutil.disk_usage(target).free
    check(
        needed <= free,
        f"{needed / 1e9:,.1f} GB are needed in {str(target)!r}, which has {free / 1e9:,.1f} GB "
        "free; make room, or give a folder on another disk",
    )


def _fetch_all(source: epath.Path, target: epath.Path, files: Sequence[_File]) -> list[_File]:
    """Check these files, copy those that are not correct, and return the copied ones."""
    progress = _Progress(sum(file.bytes for file in files))
    noting = threading.Lock()

    def fetch_one(file: _File) -> bool:
        is_correct = _is_correct(target, file, progress)
        if not is_correct:
            _copy(source / file.name, target / file.name, file, progress)
        with noting:
            storage.append_text(target / _VERIFIED, json.dumps(_note(target, file)) + "\n")
        return not is_correct

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        copies = [threads.submit(fetch_one, file) for file in files]
        try:
            for copy in concurrent.futures.as_completed(copies):
                copy.result()
        except BaseException:
            progress.stop()
            threads.shutdown(cancel_futures=True)
            raise
    return [file for file, copy in zip(files, copies, strict=True) if copy.result()]


def _is_correct(target: epath.Path, file: _File, progress: _Progress) -> bool:
    """Return True if the target has the file with its size and SHA-256."""
    if not _note(target, file):
        return False
    sha256 = hashlib.sha256()
    for chunk in _chunks(target / file.name):
        sha256.update(chunk)
        progress.add(len(chunk))
    if sha256.hexdigest() == file.sha256:
        return True
    print(f"{target / file.name} has changed; it is copied again", flush=True)
    progress.expect(file.bytes)
    return False


def _copy(source: epath.Path, target: epath.Path, file: _File, progress: _Progress) -> None:
    """Copy a file. Raises `UserError` if its size or SHA-256 is not the manifest's."""
    sha256 = hashlib.sha256()
    size = 0
    with storage.writing(target), storage.beside(target) as new, open(new, "wb") as written:
        for chunk in _chunks(source):
            written.write(chunk)
            sha256.update(chunk)
            size += len(chunk)
            progress.add(len(chunk))
        check(
            (size, sha256.hexdigest()) == (file.bytes, file.sha256),
            f"{source} is not the file that its {MANIFEST} names ({size:,} bytes of "
            f"{file.bytes:,}; SHA-256 {sha256.hexdigest()[:8]} instead of {file.sha256[:8]}); "
            "copy it there again from where the latents were stored",
        )
        written.flush()
        os.fsync(written.fileno())


def _chunks(path: epath.Path) -> Iterator[bytes]:
    """Yield the content of a file. Raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except Exception as error:  # each store has errors of its own
        raise UserError(f"{path} cannot be read ({storage.reason(error)}); {_AGAIN}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Run the command line and return its exit status: 0, or 2 after one line on stderr."""
    parser = _Parser(
        "python -m sit_jax.data.fetch",
        description="Copy stored latents to a local disk and check every file by its SHA-256. The "
        "same command continues a copy that was interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="folder with manifest.json, local or gs://")
    parser.add_argument("target", metavar="DST", help="local folder, created if it does not exist")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all files of DST again; by default those that have not changed since they were "
        "checked are assumed to be correct",
    )
    try:
        flags = parser.parse_args(argv)
        source = storage.expand("SRC", flags.source)
        storage.check_reachable("SRC", source)
        fetch(source, storage.expand("DST", flags.target), verify=flags.verify)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"error: interrupted; {_AGAIN}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
