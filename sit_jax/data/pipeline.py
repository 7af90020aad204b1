"""Turns a data source into batches on the devices.

Batch `k` is a pure function of (source, seed, k), whatever was read before. So a restart needs only
the number of the next batch, no reader state, and any number of processes read the same global
batches. Shapes: B rows in a global batch, b rows in the part that one process reads.
"""

import collections
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sit_jax.data.source import Source, UnreadableImage
from sit_jax.errors import UserError, check
from sit_jax.record import ArraySpec, Record, RecordSpec

Example = tuple[int, bool]  # the index of a record, and whether to mirror it


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    flip: bool,
    skip_unreadable: bool,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """Return the endless sequence of shuffled batches; element `k` is part of global batch `k`.

    An element holds the record's arrays with a leading axis b, and "skipped", int32 [b]. Every
    epoch has each record once, in its own order; a batch may span the end of an epoch. A process
    holds the given `rows` of each batch, or all of them. With `flip`, each row is mirrored
    with probability 1/2, drawn again in each epoch.

    An image that cannot be read raises `UserError` when its batch is read. With `skip_unreadable`
    the next readable record of the source takes its place, and "skipped" counts the records
    skipped.

    Raises `UserError` for a negative seed or an empty batch.
    """
    check(seed >= 0, f"seed={seed}, but it must not be negative; set it to 0 or more")
    check(batch_size > 0, f"train.batch={batch_size}, but it must be positive; set it to 1 or more")
    check_flip(source.can_mirror, flip)
    numbers = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    # grain seeds a random_map by the number of steps before it, so `map` must stay one of them.
    order = numbers.map(_not_mirrored)
    if flip:
        # Before rows are chosen, so that the draw depends on a row's place in the global order.
        order = order.random_map(_maybe_mirrored)
    rows = range(batch_size) if rows is None else rows
    read = functools.partial(_read_or_skip if skip_unreadable else _read, source)
    return _ProcessRows(order, batch_size, rows).map(functools.partial(_read_batch, read))


def check_flip(can_mirror: bool, flip: bool) -> None:
    """Raise `UserError` if records are to be mirrored and cannot be."""
    check(
        can_mirror or not flip,
        "data.flip=True, but the latents were stored without those of the mirror images; set "
        "data.flip=False, or encode them again",
    )


def batch_spec(spec: RecordSpec) -> RecordSpec:
    """Return the spec of one row of `batches`, given the spec of a record."""
    return {**spec, "skipped": ArraySpec((), np.int32)}


def batch_bytes(spec: RecordSpec, rows: int) -> int:
    """Return the size of a batch of records in bytes."""
    return rows * sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in spec.values()
    )


def in_order(
    source: Source,
    indices: Sequence[int],
    *,
    batch_size: int,
    skip_unreadable: bool,
    mirrored: bool = False,
) -> grain.MapDataset:
    """Return the records of these indices, each once and in this order, in batches.

    With `mirrored`, they are the records of the mirror images. The last batch may be smaller. An
    element holds the record's arrays with a leading axis b, and "index" and "skipped", int32 [b].
    An image that cannot be read raises `UserError`, or with `skip_unreadable` is all zeros, its
    "skipped" 1.
    """
    read = functools.partial(_read_or_blank if skip_unreadable else _read, source)
    numbers = grain.MapDataset.source(indices)
    return numbers.map(functools.partial(_with_index, read, mirrored)).batch(batch_size)


def pad(batch: Record, size: int) -> Record:
    """Repeat the last row of a batch up to `size` rows, so that all batches have the same shape."""
    return {
        name: np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1), mode="edge")
        for name, rows in batch.items()
    }


def prefetch_to_device(
    batches: Iterable[Any], put: Callable[[Any], Any], depth: int = 2
) -> Iterator[Any]:
    """Yield `put(batch)` of each batch, with `depth` further ones already put.

    `put` starts a transfer without waiting for it, as `jax.device_put` does, so the device never
    waits for one.
    """
    batches = iter(batches)
    in_flight = collections.deque(map(put, itertools.islice(batches, depth)))
    for batch in batches:
        in_flight.append(put(batch))
        yield in_flight.popleft()
    yield from in_flight


class _ProcessRows(grain.MapDataset):
    """For each global batch of B examples, the list of the b that one process reads."""

    def __init__(self, order: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        super().__init__(order)
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size

    def __getitem__(self, index: int) -> list[Example]:
        first = index * self._batch_size
        return [self._parent[first + row] for row in self._rows]


def _read_batch(read: Callable[[Example], Record], examples: Sequence[Example]) -> Record:
    """Read the records of a batch into arrays with a leading axis b.

    Not by grain's own `map` and `batch`, which cost as much for each record as reading a latent.
    Each record is copied as soon as it is read, so that its memory can be reused for the next.
    """
    batch: Record = {}
    for row, example in enumerate(examples):
        record = read(example)
        for name, value in record.items():
            if row == 0:
                batch[name] = np.empty((len(examples), *value.shape), value.dtype)
            batch[name][row] = value
    return batch


def _not_mirrored(index: int) -> Example:
    return index, False


def _maybe_mirrored(example: Example, rng: np.random.Generator) -> Example:
    """Mirror an example with probability 1/2."""
    index, _ = example
    return index, rng.random() < 0.5


def _read(source: Source, example: Example) -> Record:
    """Read a record. Raises `UserError` with the remedy if it cannot be read."""
    index, mirrored = example
    try:
        return {**source.read(index, mirrored), "skipped": np.int32(0)}
    except UnreadableImage as error:
        raise with_remedy(error) from error


def with_remedy(error: UnreadableImage) -> UserError:
    """Return the error that ends a run at an image which cannot be read."""
    return UserError(f"{error}; remove it, or set data.skip_unreadable=True to skip such images")


def _read_or_skip(source: Source, example: Example) -> Record:
    """Read the first readable record at or after an index, wrapping around at the end."""
    first, mirrored = example
    for skipped in range(len(source)):
        index = (first + skipped) % len(source)
        try:
            return {**source.read(index, mirrored), "skipped": np.int32(skipped)}
        except UnreadableImage as error:
            _warn_once(str(error))
    raise UserError(f"none of the {len(source)} images can be read; check data.path")


def _read_or_blank(source: Source, example: Example) -> Record:
    """Read a record, or return zeros marked as skipped."""
    index, mirrored = example
    try:
        return {**source.read(index, mirrored), "skipped": np.int32(0)}
    except UnreadableImage as error:
        _warn_once(str(error))
        blank = {name: np.zeros(array.shape, array.dtype) for name, array in source.spec.items()}
        return {**blank, "skipped": np.int32(1)}


def _with_index(read: Callable[[Example], Record], mirrored: bool, index: int) -> Record:
    return {"index": np.int32(index), **read((index, mirrored))}


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning the first time this process gives it: a broken file recurs in every epoch."""
    logging.getLogger(__name__).warning("skipped: %s", message)
