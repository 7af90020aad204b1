"""sit_jax.data.fetch: copies of stored latents are complete and right, or refused."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
from etils import epath
from etils.epath import backend

from sit_jax.data import fetch
from sit_jax.data.latents import open_latents
from sit_jax.data.source import SourceOptions
from sit_jax.errors import UserError
from tests.caches import make_plan, write
from tests.commands import ROOT, snapshot

SHARDS = 5
FILES = SHARDS + 1  # and labels.npy
FIRST = "latents-00000-of-00005.array_record"
# Runs fetch in small chunks. {patch} may change it first.
PROGRAM = """
import fcntl, os, signal, sys
from sit_jax.data import fetch
fetch._CHUNK = 256
{patch}
sys.exit(fetch.main(sys.argv[1:]))
"""
KILL = """
real = fetch._chunks
left = {chunks}
def dying(path):
    global left
    for chunk in real(path):
        yield chunk
        if path.name != 'manifest.json':
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
fetch._chunks = dying
"""
NO_LOCKS = """
def flock(*_):
    raise OSError('no locks')
fcntl.flock = flock
"""


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "source", make_plan())
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "disk" / "copy"


def start(source, target, patch=""):
    """Return a process that fetches."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(patch=patch), source, target],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_right(source, target):
    """Return True if the target has the files of the source and no other visible ones."""
    found = snapshot(target)
    assert found.pop(fetch._VERIFIED)
    opened = open_latents(SourceOptions(str(target), None, "all", 4, 3, None))
    return found == snapshot(source) and len(opened) == 23


def summary(capsys):
    """Return how many files were copied, read, and taken for right."""
    last = capsys.readouterr().out.splitlines()[-1]
    return [int(count) for count in re.findall(r"(\d+) (?:copied|read|unchanged)", last)]


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path, *, keep_time=False):
    """Change a byte in the middle of a file."""
    status = path.stat()
    middle = status.st_size // 2
    overwrite(path, middle, bytes([path.read_bytes()[middle] ^ 1]))
    changed = status.st_mtime_ns if keep_time else status.st_mtime_ns + 10**9
    os.utime(path, ns=(changed, changed))


def test_a_copy_is_complete_and_a_second_start_reads_nothing(source, target, capsys, monkeypatch):
    fetch.fetch(source, target)
    assert is_right(source, target) and summary(capsys) == [FILES, 0, 0]
    times = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    read = []
    chunks = fetch._chunks
    monkeypatch.setattr(fetch, "_chunks", lambda path: read.append(path) or chunks(path))
    fetch.fetch(source, target)
    assert read == [epath.Path(source / "manifest.json")]
    assert summary(capsys) == [0, 0, FILES]
    assert times == {path: path.stat().st_mtime_ns for path in target.iterdir()}
    fetch.fetch(source, target, verify=True)
    assert summary(capsys) == [0, FILES, 0] and is_right(source, target)


@pytest.mark.parametrize("chunks", [1, 9, 25])
def test_a_copy_that_was_killed_is_continued(source, target, chunks, capsys):
    process = start(source, target, KILL.format(chunks=chunks))
    process.communicate(timeout=120)
    assert process.returncode == -9
    names = set(snapshot(target))
    assert "manifest.json" not in names
    with pytest.raises(UserError, match=re.escape("manifest.json is missing")):
        open_latents(SourceOptions(str(target), None, "all", 4, 3, None))
    assert any(name.endswith(".tmp") for name in names)
    complete = [name for name in names if not name.startswith(".")]
    noted = (target / fetch._VERIFIED).read_text() if fetch._VERIFIED in names else ""
    fetch.fetch(source, target)
    assert is_right(source, target)
    # What was noted is not read again, and a complete file without a note is not copied again.
    lines = noted.count("\n")
    assert summary(capsys) == [FILES - len(complete), len(complete) - lines, lines]


def test_files_that_are_wrong_are_copied_again(source, target, capsys):
    fetch.fetch(source, target)
    shards = sorted(target.glob("*.array_record"))
    flip(shards[0])
    shards[1].unlink()
    os.truncate(shards[2], shards[2].stat().st_size - 1)
    capsys.readouterr()
    fetch.fetch(source, target)
    assert is_right(source, target)
    out = capsys.readouterr().out
    assert f"{shards[0]} has changed; it is copied again" in out
    assert "3 copied, 0 read and correct, 3 unchanged" in out


def test_a_byte_that_flipped_without_a_new_time_is_found_by_verify_only(source, target, capsys):
    fetch.fetch(source, target)
    flip(target / FIRST, keep_time=True)
    capsys.readouterr()
    fetch.fetch(source, target)
    assert summary(capsys) == [0, 0, FILES]
    assert snapshot(target)[FIRST] != snapshot(source)[FIRST]
    fetch.fetch(source, target, verify=True)
    assert summary(capsys) == [1, FILES - 1, 0] and is_right(source, target)


def test_a_damaged_note_only_means_that_a_file_is_read_again(source, target, capsys):
    fetch.fetch(source, target)
    notes = target / fetch._VERIFIED
    *lines, last = sorted(notes.read_text().splitlines(), key=lambda line: FIRST in line)
    notes.write_text("\n".join([*lines[1:], lines[0][:-5], "[1]", last.replace("1", "2"), '{"a']))
    capsys.readouterr()
    fetch.fetch(source, target)
    assert summary(capsys) == [0, 2, FILES - 2] and is_right(source, target)


@pytest.mark.parametrize("name", [FIRST, "labels.npy"])
def test_a_damaged_source_is_named_and_leaves_nothing_that_looks_complete(source, target, name):
    flip(source / name)
    with pytest.raises(UserError, match=rf"{name} is not the file that its manifest\.json names"):
        fetch.fetch(source, target)
    names = set(snapshot(target))
    assert name not in names and "manifest.json" not in names
    assert not any(name.endswith(".tmp") for name in names)


def test_a_shard_that_the_source_lacks_is_named(source, target):
    (source / FIRST).unlink()
    with pytest.raises(UserError, match=rf"{FIRST} cannot be read \(No such file"):
        fetch.fetch(source, target)


def test_a_small_disk_is_refused_before_anything_is_copied(source, target, monkeypatch):
    size = sum(path.stat().st_size for path in source.iterdir() if path.suffix != ".json")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size - 1))
    with pytest.raises(UserError, match=r"0\.0 GB are needed in '.*', which has 0\.0 GB free;"):
        fetch.fetch(source, target)
    assert snapshot(target) == {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size))
    fetch.fetch(source, target)
    # Files that exist need no room.
    first = (target / FIRST).stat().st_size
    (target / FIRST).unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(first))
    fetch.fetch(source, target)
    assert is_right(source, target)


@pytest.mark.parametrize("patch", ["", NO_LOCKS], ids=["locks", "no locks"])
def test_two_processes_do_not_harm_each_other(source, target, patch):
    processes = [start(source, target, patch) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert is_right(source, target)


def test_a_second_process_waits_and_then_copies_nothing(source, target):
    target.mkdir(parents=True)
    descriptor = os.open(target, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    process = start(source, target)
    assert "waiting for another process that copies to" in process.stdout.readline()
    shutil.copytree(source, target, dirs_exist_ok=True)
    os.close(descriptor)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "0 copied, 6 read and correct" in out


def test_progress_says_how_long_it_takes(source, target, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "_REPORT_S", 0.0)
    fetch.fetch(source, target)
    line = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"0\.0 of 0\.0 GB, [\d,]+ MB/s, \d+ min \d\d s left", line)
    assert fetch._duration(3_671.4) == "61 min 11 s"


def test_latents_of_their_own_are_never_overwritten(source, target, tmp_path):
    write(tmp_path / "other", make_plan(scale=(1.0, 1.0, 1.0)))
    shutil.copytree(tmp_path / "other", target)
    before = snapshot(target)
    with pytest.raises(UserError, match="holds other latents than .*manifest.json differ"):
        fetch.fetch(source, target)
    assert snapshot(target) == before
    (target / "manifest.json").rename(target / "plan.json")
    with pytest.raises(UserError, match="holds latents that are being stored"):
        fetch.fetch(source, target)


def test_mistakes_are_one_line(source, target, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for arguments, expected in [
        ((tmp_path / "images", target), "holds no stored latents (manifest.json is missing)"),
        ((tmp_path / "none", target), "holds no stored latents"),
        ((source, source), "SRC and DST are the same folder"),
        ((source, "gs://bucket/copy"), "DST 'gs://bucket/copy' is not on a local disk"),
        (("ftp://host/cache", target), "unknown kind of path in SRC"),
        ((source, source / FIRST / "x"), "cannot be written"),
        ((source,), "the following arguments are required: DST"),
        ((source, target, "--verfy"), "unrecognized arguments: --verfy"),
    ]:
        assert fetch.main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert not target.exists()


@pytest.fixture
def bucket(monkeypatch):
    """Keep what is at gs:// in memory."""
    memory = backend.fsspec_backend._get_filesystem("memory")
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: memory)
    yield
    memory.store.clear()


def test_a_copy_from_a_bucket(bucket, source, target, capsys):
    remote = epath.Path("gs://bucket/my latents")
    for path in source.iterdir():
        (remote / path.name).write_bytes(path.read_bytes())
    assert fetch.main([str(remote), str(target)]) == 0
    assert is_right(source, target) and summary(capsys) == [FILES, 0, 0]
    assert fetch.main([str(remote), str(target)]) == 0
    assert summary(capsys) == [0, 0, FILES]
    (remote / FIRST).unlink()
    assert fetch.main([str(remote), str(target), "--verify"]) == 0
    (target / FIRST).unlink()
    assert fetch.main([str(remote), str(target)]) == 2
    assert f"gs://bucket/my latents/{FIRST} cannot be read" in capsys.readouterr().err
    assert fetch.main(["gs://bucket/none", str(target)]) == 2
    assert "'gs://bucket/none' holds no stored latents" in capsys.readouterr().err
