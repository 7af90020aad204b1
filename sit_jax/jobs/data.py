"""Opens the data source of a config, and reads batches of it for the devices."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from sit_jax import sharding
from sit_jax.data import pipeline, sources
from sit_jax.errors import check
from sit_jax.jobs.setup import Setup
from sit_jax.record import Record


def open_source(setup: Setup) -> sources.Source:
    """Open the data source. Raises `UserError` if it is missing or data.classes is wrong."""
    data = setup.config.data
    source = sources.SOURCES[data.source].open(data.path, data.image_shape, data.split)
    classes = len(source.class_names)
    check(
        classes == data.classes,
        f"data.classes is {data.classes}, but the {data.source} source has {classes} classes; set "
        f"data.classes={classes}",
    )
    return source


def describe(source: sources.Source) -> dict[str, Any]:
    """Return what a checkpoint records of the data: the class names and the number of images."""
    return {"class_names": list(source.class_names), "images": len(source)}


def check_same_classes(note: Mapping[str, Any], source: sources.Source) -> None:
    """Raise `UserError` if the labels of the data mean other classes than those trained on.

    `note` is a checkpoint's. Earlier versions recorded no data.
    """
    trained = note.get("data", {}).get("class_names")
    if trained is None:
        return
    pairs = enumerate(itertools.zip_longest(trained, source.class_names))
    label, (before, now) = next(
        ((k, pair) for k, pair in pairs if pair[0] != pair[1]), (0, ("", ""))
    )
    check(
        before == now,
        f"these are other classes than the run was trained on: label {label} was {before!r} and is "
        f"now {now!r}; give the data set it was trained on (data.path), or start a new run",
    )


@contextlib.contextmanager
def open_batches(
    setup: Setup, source: sources.Source, start: int
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Yield training batches start, start + 1, ... on the devices, fetched ahead.

    Leaving the context ends the readers.
    """
    data = setup.config.data
    size = setup.config.train.batch
    dataset = pipeline.batches(
        source,
        seed=setup.config.seed,
        batch_size=size,
        flip=data.flip,
        skip_unreadable=data.skip_unreadable,
        rows=sharding.own_rows(setup.mesh, size),
    )
    with contextlib.closing(pipeline.iterate(dataset, start, workers=data.workers)) as batches:
        yield pipeline.prefetch_to_device(
            batches, lambda batch: sharding.put_batch(setup.mesh, batch, size)
        )


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, types and shardings of the batches of `open_batches`, without any data."""
    rows = setup.config.train.batch
    split = sharding.batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=split)
        for name, array in pipeline.batch_spec(setup.record_spec).items()
    }


def read_in_order(
    setup: Setup,
    source: sources.Source,
    indices: Sequence[int],
    batch_size: int,
    *,
    skip_unreadable: bool,
) -> Iterator[Record]:
    """Yield batches of the records at `indices`, in that order, on the host.

    The last batch may be smaller.
    """
    dataset = pipeline.in_order(
        source, indices, batch_size=batch_size, skip_unreadable=skip_unreadable
    )
    workers = setup.config.data.workers
    with contextlib.closing(pipeline.iterate(dataset, 0, workers=workers)) as batches:
        yield from batches
