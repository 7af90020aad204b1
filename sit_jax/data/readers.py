"""Threads or processes that read batches ahead of the consumer."""

import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from sit_jax import hosts
from sit_jax.errors import UserError, check
from sit_jax.record import Record

# Threads that read in each process, each a batch at a time. Decoding and resizing release the
# interpreter lock, so a few threads help. Beyond these, use `workers`.
_THREADS = 4
# Batches that each process reads ahead where memory allows, and the part of memory they may take.
_READ_AHEAD = 8
_READ_AHEAD_SHARE = 1 / 4
# Reader processes that are chosen without being asked for.
_MOST_CHOSEN = 32
_SHARED_MEMORY = "/dev/shm"
# Batches in shared memory, measured: those that each reader has sent and not yet sent, and those
# that the consumer and `pipeline.prefetch_to_device` hold.
_BATCHES_PER_READER = 4
_BATCHES_HELD = 4


def iterate(
    dataset: grain.MapDataset,
    start: int,
    *,
    workers: int,
    batch_bytes: int,
    read_ahead: int = _READ_AHEAD,
) -> "Batches":
    """Return an iterator of elements `start`, `start + 1`, ... of `dataset`, read ahead.

    A large `start` costs nothing. `workers` processes read them, or threads of this process if 0;
    each process holds up to `read_ahead` of them. In-memory sources are faster without processes.
    Processes need absl's flags to be parsed. `close()` the iterator to end its threads and
    processes.

    Raises `UserError` if the processes need more shared memory than there is, and from the iterator
    if one of them dies.
    """
    needed = _needed(workers, batch_bytes)
    free, _ = _shared_memory()
    check(free >= needed, f"shared memory is too small: {_explanation(workers, needed)}")
    # As many as there are cores for each process: more of them would only take turns.
    threads = min(_THREADS, read_ahead, max(1, hosts.cores() // workers) if workers else _THREADS)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    ahead = dataset.slice(slice(start, None)).to_iter_dataset(options)
    processes = grain.MultiprocessingOptions(num_workers=workers)
    return Batches(iter(ahead.mp_prefetch(processes, _outlive_signals)), workers, needed)


def choose_workers(cores: int, sharers: int, batch_bytes: int) -> tuple[int, str]:
    """Return a number of reader processes for each of the `sharers` of this machine's cores.

    One core is left to the process itself, and there are no more than shared memory has room for.
    If that makes them fewer, the text says so.
    """
    wanted = max(0, min(cores // sharers - 1, _MOST_CHOSEN))
    free, _ = _shared_memory()
    room = max(0.0, (free / sharers / batch_bytes - _BATCHES_HELD) / _BATCHES_PER_READER)
    if room >= wanted:
        return wanted, ""
    needed = sharers * _needed(wanted, batch_bytes)
    return int(room), (
        f"{_SHARED_MEMORY} has {_size(free)} free, too little for {wanted}: start a container with "
        f"{_flag(needed)}"
    )


def choose_read_ahead(memory: int, processes: int, batch_bytes: int) -> int:
    """Return how many batches each of the processes that share this machine's memory reads ahead.

    `memory` is in bytes.
    """
    room = int(_READ_AHEAD_SHARE * memory / (processes * batch_bytes))
    return max(1, min(_READ_AHEAD, room))


def _needed(workers: int, batch_bytes: int) -> int:
    """Return the bytes of shared memory that so many processes need."""
    return (_BATCHES_PER_READER * workers + _BATCHES_HELD) * batch_bytes if workers else 0


def _flag(needed: int) -> str:
    return f"--shm-size={math.ceil(needed / 2**30)}g"


class Batches(Iterator[Record]):
    """Batches of grain's iterator, with one line for a reader process that dies."""

    def __init__(self, iterator: grain.DatasetIterator, workers: int, needed: int):
        self._iterator = iterator
        self._workers = workers
        self._needed = needed  # bytes of shared memory

    def __next__(self) -> Record:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if not code:
                raise
            raise UserError(
                f"a reader process died ({_cause(int(code[1]))}): "
                f"{_explanation(self._workers, self._needed)}"
            ) from error
        for array in batch.values():
            _drop_name(array)
        return batch

    def close(self) -> None:
        """End the threads and processes."""
        self._iterator.close()


def _drop_name(array: Any) -> None:
    """Remove the name of an array's shared memory, which itself lasts as long as the array.

    grain removes it when the array is deleted. Arrays that exist to the end of the program, such as
    those that jax uses without a copy, never are, and Python would warn of a leak.
    """
    if getattr(array, "_unlink_on_del", False):
        array.shm.unlink()
        array._unlink_on_del = False


def _cause(exit_code: int) -> str:
    """Return why a process ended, in words."""
    causes = {
        -signal.SIGBUS: "shared memory is full",
        -signal.SIGKILL: "killed, as when main memory runs out",
    }
    return causes.get(exit_code, f"exit code {exit_code}")


def _shared_memory() -> tuple[float, float]:
    """Return the free and the total bytes of shared memory; infinite where it has no limit."""
    if not os.path.isdir(_SHARED_MEMORY):  # as on macOS
        return np.inf, np.inf
    usage = shutil.disk_usage(_SHARED_MEMORY)
    return usage.free, usage.total


def _explanation(workers: int, needed: int) -> str:
    """Return what the readers need, what there is, and the remedy."""
    free, total = _shared_memory()
    return (
        f"{workers} readers need up to {_size(needed)} in {_SHARED_MEMORY}, which has "
        f"{_size(free)} free of {_size(total)}; lower data.workers, or set it to 0 to read in "
        f"threads, or start a container with {_flag(needed)}"
    )


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _outlive_signals(worker: int, workers: int) -> None:
    """Make a reader process ignore SIGINT and SIGTERM and exit only with its parent.

    A shell's Ctrl-C and a cluster's SIGTERM reach the entire process group, but training takes a
    few more batches until the step at which all hosts save. Closing the iterator ends the readers
    too.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only reader processes run this"
    parent.join()
    os._exit(1)
