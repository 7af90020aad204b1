"""Reader processes end with their parent, leave nothing behind, and die in one line."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

from sit_jax.data import pipeline, readers
from sit_jax.data.digits import open_digits
from sit_jax.data.source import SourceOptions, image_spec
from sit_jax.data.transforms import Decoding
from sit_jax.errors import UserError
from tests.commands import TINY, refusal, snapshot
from tests.commands import flags as flags_of


def open_batches(workers):
    flags.FLAGS.mark_as_parsed()
    digits = open_digits(SourceOptions(None, None, "test", 8, 1, Decoding(64, False)))
    dataset = pipeline.batches(digits, seed=0, batch_size=8, flip=False, skip_unreadable=False)
    size = pipeline.batch_bytes(digits.spec, 8)
    return dataset, readers.iterate(dataset, 0, workers=workers, batch_bytes=size)


_READERS = """
import multiprocessing, sys
from absl import flags
from sit_jax.data import pipeline, readers, sources
from sit_jax.data.source import SourceOptions

flags.FLAGS.mark_as_parsed()
source = sources.SOURCES["digits"].open(SourceOptions(None, None, "test", 8, 1, None))
dataset = pipeline.batches(source, seed=0, batch_size=8, flip=False, skip_unreadable=False)
batches = readers.iterate(dataset, 0, workers=2, batch_bytes=512)
next(batches), next(batches)
print(*(reader.pid for reader in multiprocessing.active_children()), flush=True)
for _ in sys.stdin:
    print(next(batches)["label"].shape, flush=True)
"""


def test_readers_outlive_signals_but_not_their_parent():
    command = [sys.executable, "-c", _READERS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        for number, pid in itertools.product((signal.SIGTERM, signal.SIGINT), pids):
            os.kill(pid, number)
        for _ in range(40):  # more than the readers prefetch
            parent.stdin.write("next\n")
            assert parent.stdout.readline() == "(8,)\n"
        parent.kill()
    end = time.monotonic() + 20
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(pid, 0)  # signal 0 only checks that it runs
                time.sleep(0.05)
            pytest.fail("a reader outlives its parent")


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (signal.SIGKILL, "killed, as when main memory runs out"),
        (signal.SIGBUS, "shared memory is full"),
        (signal.SIGSEGV, "exit code -11"),
    ],
)
def test_a_reader_that_dies_is_one_line(number, cause):
    dataset, batches = open_batches(workers=2)
    with contextlib.closing(batches):
        np.testing.assert_array_equal(next(batches)["label"], dataset[0]["label"])
        reader = multiprocessing.active_children()[0]
        os.kill(reader.pid, number)
        with pytest.raises(UserError) as error:
            for _ in range(100):  # more than are read ahead
                next(batches)
    message = str(error.value)
    assert f"a reader process died ({cause}): 2 readers need up to 0.0 MB in /dev/shm" in message
    assert "lower data.workers, or set it to 0 to read in threads" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("workers", "rows", "needed", "flag"),
    [
        (8, 256, "1.8 GB", "--shm-size=2g"),  # configs/imagenet.py in docker's default
        (1, 64, "100.7 MB", "--shm-size=1g"),
        (32, 256, "6.6 GB", "--shm-size=7g"),
    ],
)
def test_too_little_shared_memory_is_refused_before_the_first_batch(
    monkeypatch, workers, rows, needed, flag
):
    monkeypatch.setattr(readers, "_shared_memory", lambda: (60e6, 64e6))
    size = pipeline.batch_bytes(image_spec((256, 256, 3)), rows)
    dataset, _ = open_batches(workers=0)
    with pytest.raises(UserError) as error:
        readers.iterate(dataset, 0, workers=workers, batch_bytes=size)
    assert str(error.value) == (
        f"shared memory is too small: {workers} readers need up to {needed} in /dev/shm, which has "
        "60.0 MB free of 64.0 MB; lower data.workers, or set it to 0 to read in threads, or start "
        f"a container with {flag}"
    )
    with contextlib.closing(readers.iterate(dataset, 0, workers=0, batch_bytes=size)) as batches:
        next(batches)  # the remedy works


@pytest.mark.parametrize(
    ("cores", "sharers", "expected"),
    [(1, 1, 0), (2, 1, 1), (8, 1, 7), (208, 1, 32), (208, 8, 25), (8, 8, 0), (4, 8, 0)],
)
def test_one_core_is_left_to_each_process_and_there_are_at_most_32_readers(
    monkeypatch, cores, sharers, expected
):
    monkeypatch.setattr(readers, "_shared_memory", lambda: (np.inf, np.inf))
    assert readers.choose_workers(cores, sharers, 10**9) == (expected, "")


def test_readers_that_are_chosen_are_as_many_as_shared_memory_has_room_for(monkeypatch):
    monkeypatch.setattr(readers, "_shared_memory", lambda: (64e6, 64e6))
    # Four batches for each reader and four more: 20 MB for the first, 16 MB for each further one.
    assert readers.choose_workers(4, 1, 4 * 10**6) == (3, "")
    assert readers.choose_workers(5, 1, 4 * 10**6) == (
        3,
        "/dev/shm has 64.0 MB free, too little for 4: start a container with --shm-size=1g",
    )
    assert readers.choose_workers(3, 1, 8 * 10**6)[0] == 1
    assert readers.choose_workers(4, 2, 4 * 10**6) == (1, "")  # half of it each
    count, lack = readers.choose_workers(64, 1, 50 * 10**6)
    assert count == 0 and "too little for 32: start a container with --shm-size=7g" in lack
    dataset, _ = open_batches(workers=0)
    with contextlib.closing(readers.iterate(dataset, 0, workers=3, batch_bytes=4 * 10**6)):
        pass  # what is chosen is not refused


def test_training_says_it_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_shared_memory", lambda: (1e3, 64e6))
    message = refusal(*TINY, *flags_of(data__workers=2), "--workdir", tmp_path / "run")
    assert "error: shared memory is too small: 2 readers need up to" in message
    assert not any(snapshot(tmp_path).values())


_HOLDS_BATCHES = """
import jax
import numpy as np
from absl import flags
from sit_jax.data import pipeline, readers
from sit_jax.data.digits import open_digits
from sit_jax.data.source import SourceOptions

flags.FLAGS.mark_as_parsed()
source = open_digits(SourceOptions(None, None, "test", 8, 1, None))
dataset = pipeline.batches(source, seed=0, batch_size=64, flip=False, skip_unreadable=False)


def read():
    batches = readers.iterate(dataset, 0, workers=1, batch_bytes=8192)
    held = [next(batches) for _ in range(5)]
    batches.close()
    return held


held = read()
on_device = jax.device_put(held)
for k, batch in enumerate(held):
    np.testing.assert_array_equal(batch["image"], dataset[k]["image"])
"""


def test_batches_held_to_the_end_leave_no_shared_memory():
    process = subprocess.run(
        [sys.executable, "-c", _HOLDS_BATCHES],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_fewer_batches_are_read_ahead_where_memory_is_short():
    assert readers.choose_read_ahead(64 * 10**9, 1, 10**6) == 8
    assert readers.choose_read_ahead(64 * 10**9, 4, 10**9) == 4
    assert readers.choose_read_ahead(10**9, 32, 10**9) == 1


@pytest.mark.parametrize("read_ahead", [1, 3, 20])
def test_how_far_is_read_ahead_changes_no_batch(read_ahead):
    dataset, _ = open_batches(workers=0)
    with contextlib.closing(
        readers.iterate(dataset, 2, workers=0, batch_bytes=1024, read_ahead=read_ahead)
    ) as batches:
        for k in range(2, 30):
            np.testing.assert_array_equal(next(batches)["label"], dataset[k]["label"])
