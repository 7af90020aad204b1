"""storage: whatever fails, a reader finds the old file or the new one, never part of one."""

import os
import pathlib

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
        UserError, match=r"--workdir '.*file/run' cannot be written \(.+\); give a folder"
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
