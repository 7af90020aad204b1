"""Batches are a pure function of (seed, batch number), on any number of processes.

The order and the way in which they are read do not matter either.
"""

import contextlib
import itertools
import logging
import time

import jax
import numpy as np
import pytest
from absl import flags

from sit_jax.data import pipeline, readers, source, sources
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError

DECODING = Decoding(max_pixels=64, exif_orientation=False)


class Counting(source.ImageRecords):
    """`size` records, labelled by index, with a 1x2 image that shows whether it was flipped.

    Reading an index in `broken` raises UnreadableImage.
    """

    class_names = ("all",)
    spec = source.image_spec((1, 2, 1))

    def __init__(self, size, broken=()):
        self.size = size
        self.broken = broken

    def __len__(self):
        return self.size

    def read(self, index, mirrored=False):
        if index in self.broken:
            raise source.UnreadableImage(
                f"image 'broken-{self.size}-{index}' cannot be read (torn)"
            )
        image = np.array([[[0], [1]]], np.uint8)
        return {"image": image[:, ::-1] if mirrored else image, "label": np.int32(index)}


def build(size=10, broken=(), **options):
    defaults = {"seed": 0, "batch_size": 4, "flip": True, "skip_unreadable": False}
    return pipeline.batches(Counting(size, broken), **{**defaults, **options})


def labels(dataset, start, stop):
    return np.concatenate([dataset[k]["label"] for k in range(start, stop)])


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_shapes_and_types():
    batch = build()[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 1, 2, 1), "uint8"),
        "label": ((4,), "int32"),
        "skipped": ((4,), "int32"),
    }
    assert batch["skipped"].sum() == 0
    assert build(batch_size=1)[0]["label"].shape == (1,)


def test_a_batch_depends_only_on_seed_and_number():
    fresh = build()
    used = build()
    for k in (9, 3, 0):
        used[k]  # earlier reads must not change later batches
    assert_same(fresh[7], used[7])
    assert not np.array_equal(labels(build(seed=1), 0, 5), labels(fresh, 0, 5))


def test_each_epoch_has_each_record_once_in_its_own_order():
    order = labels(build(size=10), 0, 15).reshape(6, 10)  # batches of 4 straddle the epochs of 10
    for epoch in order:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in order}) == 6


def test_seeds_share_no_epoch():
    """No epoch of one seed reappears under another.

    Grain adds the epoch to the seed of a shuffle. Given raw seeds, it would return the data of
    seed 0 for seed 1, one epoch late.
    """
    epochs = [
        tuple(epoch)
        for seed in range(5)
        for epoch in labels(build(seed=seed), 0, 10).reshape(4, 10)
    ]
    assert len(set(epochs)) == len(epochs)


@pytest.mark.parametrize("count", [2, 4])
def test_rows_of_all_processes_joined_are_the_batch_of_one_process(count):
    options = {"size": 23, "batch_size": 8}
    complete = build(**options)
    rows_of_process = [range(i, 8, count) for i in range(count)]
    parts = [build(**options, rows=rows) for rows in rows_of_process]
    for k in (0, 2, 11):
        for rows, part in zip(rows_of_process, parts, strict=True):
            expected = {key: value[list(rows)] for key, value in complete[k].items()}
            assert_same(part[k], expected)


def test_flip_mirrors_about_half_of_the_rows_drawn_again_each_epoch():
    dataset = build(size=100, batch_size=100)
    by_record = []
    for k in range(2):
        batch = dataset[k]
        flipped = batch["image"][:, 0, 0, 0] == 1
        assert 25 < flipped.sum() < 75
        by_record.append(flipped[np.argsort(batch["label"])])
    assert (by_record[0] != by_record[1]).sum() > 25
    assert all((build(flip=False)[k]["image"][:, 0, 0, 0] == 0).all() for k in range(3))


def test_a_row_is_mirrored_half_of_the_time():
    batch = build(size=1, batch_size=1000)[0]
    flipped = int(batch["image"][:, 0, 0, 0].sum())
    assert abs(flipped - 500) < 80  # five standard deviations


@pytest.mark.parametrize("start", [0, 6])
def test_iterating_from_a_start_continues_as_if_never_stopped(start):
    dataset = build()
    with contextlib.closing(readers.iterate(dataset, start, workers=0, batch_bytes=0)) as iterator:
        for k in range(start, start + 12):
            assert_same(next(iterator), dataset[k])


def test_a_far_start_on_a_huge_source_is_immediate():
    began = time.monotonic()
    with contextlib.closing(
        readers.iterate(build(size=10**9, batch_size=64), 3_000_000, workers=0, batch_bytes=0)
    ) as iterator:
        batch = next(iterator)
    # It took 0.07 s when measured. Reading the 3,000,000 batches before it would take hours.
    assert time.monotonic() - began < 5
    assert_same(batch, build(size=10**9, batch_size=64)[3_000_000])


def test_worker_processes_give_the_same_batches():
    flags.FLAGS.mark_as_parsed()
    digits = sources.SOURCES["digits"].open(
        source.SourceOptions(None, None, "test", 8, 1, DECODING)
    )
    dataset = pipeline.batches(digits, seed=3, batch_size=16, flip=True, skip_unreadable=False)
    with contextlib.closing(readers.iterate(dataset, 5, workers=2, batch_bytes=1024)) as iterator:
        ahead = pipeline.prefetch_to_device(itertools.islice(iterator, 6), jax.device_put)
        on_device = list(ahead)
    # Compared after the workers have ended: the arrays must not point into their shared memory.
    for k, batch in enumerate(on_device, start=5):
        assert_same(batch, dataset[k])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_the_run_with_one_line(workers):
    flags.FLAGS.mark_as_parsed()
    with (
        contextlib.closing(
            readers.iterate(build(size=10, broken={3}), 0, workers=workers, batch_bytes=8)
        ) as iterator,
        pytest.raises(
            UserError, match="'broken-10-3' cannot be read.*skip_unreadable=True"
        ) as error,
    ):
        for _ in range(4):  # more than one epoch
            next(iterator)
    assert type(error.value) is UserError and "\n" not in str(error.value)


def test_unreadable_images_are_replaced_by_the_next_and_reported_once(caplog):
    size = 11
    dataset = build(size=size, broken={3, 4, 10}, skip_unreadable=True, batch_size=size)
    intact = build(size=size, batch_size=size)
    with caplog.at_level(logging.WARNING):
        for k in range(3):
            batch = dataset[k]
            intact_labels = intact[k]["label"]
            replaced = [{3: 5, 4: 5, 10: 0}.get(label, label) for label in intact_labels]
            skipped = [{3: 2, 4: 1, 10: 1}.get(label, 0) for label in intact_labels]
            np.testing.assert_array_equal(batch["label"], replaced)
            np.testing.assert_array_equal(batch["skipped"], skipped)
    assert sorted(record.getMessage().split("'")[1] for record in caplog.records) == [
        "broken-11-10",
        "broken-11-3",
        "broken-11-4",
    ]


def test_skipping_ends_when_nothing_can_be_read():
    with pytest.raises(UserError, match="none of the 5 images can be read; check data.path"):
        build(size=5, broken=range(5), skip_unreadable=True)[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "train.batch=0"),
        ({"seed": -1}, "seed=-1.*0 or more"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_prefetch_keeps_depth_batches_in_flight(depth):
    sent = []

    def send(batch):
        sent.append(batch)
        return -batch

    received = []
    for batch in pipeline.prefetch_to_device(range(1, 6), send, depth):
        received.append(batch)
        assert len(sent) == min(len(received) + depth, 5)
    assert received == [-1, -2, -3, -4, -5]
