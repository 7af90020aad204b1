"""From a source to batches on the device. Batch `k` is a pure function of (source, seed, k), whatever was read before.

So a restart needs no reader state, only the number of the next batch, and any number of processes read the same global
batches. Shapes: B rows in a global batch, b in the part of it that one process reads.
"""

import collections
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sit_jax.data import transforms
from sit_jax.data.sources import Record, Source, UnreadableImage
from sit_jax.errors import UserError, check

# Threads that read in each process, each a batch at a time, and twice as many batches in memory. Decoding and resizing
# run outside the interpreter lock, so that a few threads help; beyond these `workers` do.
_THREADS = 4


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    flip: bool,
    skip_unreadable: bool,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The endless row of shuffled batches; element `k` is this process's part of global batch `k`.

    An element is {"image": uint8 [b, h, w, c], "label": int32 [b], "skipped": int32 [b]}. Every epoch has each record
    once, in an order of its own; batches run on across its end. A process holds the `rows` of each batch that it is
    given, or all of them. With `flip`, each row is mirrored with probability 1/2, anew each epoch.

    An image that cannot be read raises `UserError` when its batch is read. With `skip_unreadable` the next readable
    record of the source takes its place, and "skipped" counts those passed over.

    Raises `UserError` for a negative seed or an empty batch.
    """
    check(seed >= 0, f"seed={seed}, but it must not be negative; set it to 0 or more")
    check(batch_size > 0, f"data.batch_size={batch_size}, but a batch has at least one row")
    read = _read_or_skip if skip_unreadable else _read
    order = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .map(functools.partial(read, source))
    )
    if flip:  # before the choice of rows, so that its randomness is keyed by a row's place in the global order
        order = order.random_map(_flip)
    rows = range(batch_size) if rows is None else rows
    return _ProcessRows(order, batch_size, rows).batch(len(rows))


def in_order(
    source: Source,
    indices: Sequence[int],
    *,
    batch_size: int,
    skip_unreadable: bool,
    shape: tuple[int, int, int],
) -> grain.MapDataset:
    """The records of these indices, each once and in this order, in batches; the last one may be smaller.

    An element is {"index": int32 [b], "image": uint8 [b, h, w, c], "label": int32 [b], "skipped": int32 [b]}. An image
    that cannot be read raises `UserError`, or with `skip_unreadable` is black, of this `shape`, its "skipped" 1.
    """
    read = (
        functools.partial(_read_or_blank, source, shape)
        if skip_unreadable
        else functools.partial(_read, source)
    )
    return (
        grain.MapDataset.source(indices).map(functools.partial(_with_index, read)).batch(batch_size)
    )


def pad(batch: Record, size: int) -> Record:
    """A batch of at most `size` rows with its last row repeated to `size`: one shape, one compilation."""
    return {
        name: np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        for name, rows in batch.items()
    }


def iterate(dataset: grain.MapDataset, start: int, *, workers: int) -> grain.DatasetIterator:
    """Elements `start`, `start + 1`, ... of `dataset`, read in the background; takes no longer for a large `start`.

    `workers` processes read them, or threads of this one if 0: in-memory sources are faster without processes, which
    also need absl's flags parsed. `close()` the iterator to end its threads and processes.
    """
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
    ahead = dataset.slice(slice(start, None)).to_iter_dataset(options)
    return iter(
        ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _outlive_signals)
    )


def _outlive_signals(worker: int, workers: int) -> None:
    """Of a reader process: it ends when its parent closes the iterator or dies, and by no signal that asks for an end.

    A shell's Ctrl-C and a cluster's SIGTERM go to the whole process group; the step at which all hosts save takes a
    few more batches.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def prefetch_to_device(
    batches: Iterable[Any], put: Callable[[Any], Any], depth: int = 2
) -> Iterator[Any]:
    """Yields `put(batch)` of each batch, with `depth` further ones already put while the caller works on it.

    `put` starts a transfer and does not wait for it, as `jax.device_put` does: the device then never waits for one.
    """
    batches = iter(batches)
    on_their_way = collections.deque(map(put, itertools.islice(batches, depth)))
    for batch in batches:
        on_their_way.append(put(batch))
        yield on_their_way.popleft()
    yield from on_their_way


class _ProcessRows(grain.MapDataset):
    """The rows of the global order that one process reads: its b of each B."""

    def __init__(self, order: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(order)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Record:
        batch, row = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[row]]


def _flip(record: Record, rng: np.random.Generator) -> Record:
    return {**record, "image": transforms.flip(rng, record["image"])}


def _read(source: Source, index: int) -> Record:
    """Record `index` of `source`, nothing skipped."""
    try:
        return {**source[index], "skipped": np.int32(0)}
    except UnreadableImage as error:
        raise UserError(
            f"{error}; remove it, or set data.skip_unreadable=True to pass over it"
        ) from error


def _read_or_skip(source: Source, index: int) -> Record:
    """The first readable record at or after `index`, going round at the end of the source."""
    for skipped in range(len(source)):
        try:
            return {**source[(index + skipped) % len(source)], "skipped": np.int32(skipped)}
        except UnreadableImage as error:
            _warn_once(str(error))
    raise UserError(f"none of the {len(source)} images can be read; check data.path")


def _read_or_blank(source: Source, shape: tuple[int, int, int], index: int) -> Record:
    """Record `index` of `source`, or a black image marked as skipped."""
    try:
        return _read(source, index)
    except UserError as error:
        _warn_once(str(error.__cause__))
        return {"image": np.zeros(shape, np.uint8), "label": np.int32(0), "skipped": np.int32(1)}


def _with_index(read: Callable[[int], Record], index: int) -> Record:
    return {"index": np.int32(index), **read(index)}


@functools.cache
def _warn_once(message: str) -> None:
    """Logs a warning the first time this process gives it: a broken file comes round every epoch."""
    logging.getLogger(__name__).warning("skipped: %s", message)
