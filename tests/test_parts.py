"""Parts: arrays that become one .npz file, whatever happens before it is complete."""

import os
import resource
import shutil
from collections import namedtuple

import numpy as np
import pytest
from etils import epath

from sit_jax.errors import UserError
from sit_jax.jobs.parts import Parts

SHAPE = (3, 2, 1)


def array(index):
    return np.full(SHAPE, index, np.uint8)


def fill(folder, indices):
    parts = Parts(folder, SHAPE, np.uint8)
    for index in indices:
        parts.add(index, array(index))
    parts.flush()
    return parts


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path)


def joined(folder):
    with np.load(folder / "samples.npz") as file:
        return {name: file[name] for name in file.files}


def test_arrays_of_interleaved_parts_are_joined_in_order(folder):
    fill(folder, [0, 2, 4, 6])
    fill(folder, [5, 3, 1])
    parts = fill(folder, [7])
    held, damaged = parts.survey()
    assert held.tolist() == list(range(8)) and damaged == []
    assert [int(a[0, 0, 0]) for a in parts.read([1, 2, 5, 7])] == [1, 2, 5, 7]
    assert parts.join(parts.read(range(8)), 8, arr_1=np.arange(8)) is None
    assert joined(folder)["arr_0"][:, 0, 0, 0].tolist() == list(range(8))
    assert joined(folder)["arr_1"].tolist() == list(range(8))
    assert os.listdir(folder) == ["samples.npz"] and parts.is_joined(8)


def test_a_joined_file_is_a_source_of_a_larger_one_and_grey_rows_of_it_are_grey(folder):
    parts = fill(folder, range(4))
    parts.join((np.repeat(a, 3, axis=-1) for a in parts.read(range(4))), 4)
    assert joined(folder)["arr_0"].shape == (4, 3, 2, 3)
    parts = fill(folder, [4, 5])
    assert parts.survey()[0].tolist() == list(range(6)) and not parts.is_joined(6)
    np.testing.assert_array_equal(list(parts.read(range(6))), [array(i) for i in range(6)])


def test_a_smaller_file_destroys_neither_a_larger_one_nor_parts_beyond_it(folder):
    parts = fill(folder, range(6))
    parts.join(parts.read(range(6)), 6)
    fill(folder, [8, 9])
    assert parts.join(parts.read(range(4)), 4) == "samples-6.npz"
    assert len(joined(folder)["arr_0"]) == 4
    assert parts.survey()[0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
@pytest.mark.parametrize("name", ["parts/000000.npz", "samples.npz"])
def test_what_a_damaged_file_held_counts_as_missing(folder, how, name):
    parts = fill(folder, range(4))
    if name == "samples.npz":
        parts.join(parts.read(range(4)), 4)
    fill(folder, [6, 7])
    path = folder / name
    data = bytearray(path.read_bytes())
    data[150] ^= 1  # in the rows
    path.write_bytes({"cut": bytes(data[:-40]), "flipped": bytes(data), "empty": b""}[how])
    parts = Parts(folder, SHAPE, np.uint8)
    held, damaged = parts.survey()
    assert held.tolist() == [6, 7] and damaged == [str(path)]
    assert path.exists() == (name == "samples.npz") and not parts.is_joined(4)
    for index in range(6):
        parts.add(index, array(index))
    parts.flush()
    parts.join(parts.read(range(8)), 8)
    assert joined(folder)["arr_0"][:, 0, 0, 0].tolist() == list(range(8))
    assert parts.survey()[1] == []


def test_arrays_of_another_shape_or_type_do_not_count(folder):
    fill(folder, range(4))
    for shape, dtype in (((2, 2, 1), np.uint8), (SHAPE, np.float32)):
        assert Parts(folder, shape, dtype).survey()[0].tolist() == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_drawn(folder, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(11 * 6))
    parts = Parts(folder, SHAPE, np.uint8)
    parts.check_room(10, 0)
    with pytest.raises(UserError, match=r"needed in .*free; make room, give --out on another disk"):
        parts.check_room(10, 1)


@pytest.mark.slow
def test_large_arrays_are_not_in_memory_together(folder):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = Parts(folder, (512, 512, 3), np.uint8)
    for index in range(1000):  # 786 MB
        parts.add(index, np.full((512, 512, 3), index % 251, np.uint8))
    parts.flush()
    parts.survey()
    parts.join(parts.read(range(1000)), 1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
