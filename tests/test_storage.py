"""storage: whatever fails, a reader finds the old file or the new one, never part of one."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from sit_jax import storage
from sit_jax.errors import UserError


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a file.txt"
    storage.write_text(path, "old and longer")
    storage.write_text(path, "néw")
    assert path.read_bytes() == "néw".encode()
    assert os.listdir(tmp_path) == ["a file.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_whole(tmp_path, monkeypatch, call):
    path = tmp_path / "state.json"
    storage.write_bytes(path, b"old")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(UserError, match=r"state.json cannot be written \(No space.*continues"):
        storage.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_file_is_complete_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def replace(source, target):
        calls.append(("replace", pathlib.Path(source).read_bytes()))
        real_replace(source, target)

    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), real_fsync(fd))
    )
    monkeypatch.setattr(os, "replace", replace)
    storage.write_bytes(tmp_path / "x", b"12345")
    assert calls == [("fsync", 5), ("replace", b"12345")]


def test_a_writable_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    folder = storage.make_writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and os.listdir(folder) == []
    storage.make_writable_folder(folder)


def test_a_workdir_that_is_not_writable_is_a_user_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"'.*file/run' cannot be written \(.+\); give a folder"
    ) as caught:
        storage.make_writable_folder(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


def test_remote_paths_are_recognised_by_their_scheme():
    assert storage.is_remote("gs://bucket/run")
    assert not storage.is_remote("/home/me/run") and not storage.is_remote("runs/gs")


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    run = tmp_path / "run"

    def write(text):
        with storage.beside(run) as new:
            new.mkdir()
            (new / "config.json").write_text(text)
            assert text != "bad"

    def contents():
        return {path.name: (path / "config.json").read_text() for path in tmp_path.iterdir()}

    def no_permission(*_):
        raise PermissionError(13, "Permission denied")

    write("old")
    with pytest.raises(AssertionError):
        write("bad")
    assert contents() == {"run": "old"}
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(os, "rename", no_permission)
        write("new")
    assert contents() == {"run": "old"}
    write("new")
    assert contents() == {"run": "new"}


def run_until_killed(program, *arguments):
    """Run a Python program that kills itself."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, signal, sys\n{program}", *map(str, arguments)],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


KILLED_WHILE_WRITING = """
from sit_jax import storage
with storage.beside(sys.argv[1]) as new:
    new.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "x.png").write_bytes(b"old")
    run_until_killed(KILLED_WHILE_WRITING, tmp_path / "x.png")
    run_until_killed(KILLED_WHILE_WRITING, tmp_path / "000004.png")
    assert len(os.listdir(tmp_path)) == 3
    strangers = [".x.tmp", ".a.b-1.tmp", "note.tmp", f".y.{storage._HOST}x-1-0000.tmp"]
    for name in strangers:
        (tmp_path / name).write_bytes(b"")
    with storage.beside(tmp_path / "z") as mine:
        mine.write_bytes(b"new")
        storage.clean_up(tmp_path)  # this process still runs
        assert sorted(os.listdir(tmp_path)) == sorted([*strangers, "x.png", mine.name])
    assert (tmp_path / "x.png").read_bytes() == b"old" and (tmp_path / "z").read_bytes() == b"new"


def test_what_an_earlier_version_left_is_removed_once_it_is_old(tmp_path):
    old, young = tmp_path / ".000004.png.f8e3ce9e.tmp", tmp_path / ".x.65272f92.tmp"
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (1, 1))
    storage.clean_up(tmp_path)
    assert os.listdir(tmp_path) == [young.name]


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_folder_that_was_being_replaced_has_its_name_again(tmp_path, renames):
    """Killed before and after each of the three renames: there is the old or the new."""
    program = f"""
from etils import epath
from sit_jax import storage
run = epath.Path(sys.argv[1])
rename, left = os.rename, [{renames}]
def count(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
os.rename = count
storage._remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
with storage.beside(run) as new:
    new.mkdir()
    (new / "config.json").write_text("new")
"""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("old")
    (tmp_path / ".other.tmp").mkdir()
    run_until_killed(program, run)
    storage.clean_up(tmp_path, "run")
    assert (run / "config.json").read_text() == ("new" if renames > 1 else "old")
    assert sorted(os.listdir(tmp_path)) == [".other.tmp", "run"]


def test_a_write_to_a_full_disk_is_one_line():
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        storage.append_text("/dev/full", "row")
