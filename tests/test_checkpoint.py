"""checkpoint: saved arrays are restored exactly, and damaged steps are neither used nor deleted."""

import asyncio
import json
import logging
import pathlib
import re
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sit_jax import checkpoint, manifest, storage
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError

ITEMS = ("params", "ema")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def tree(value, shape=(3, 2)):
    return {"a": {"kernel": jnp.full(shape, value)}, "b": jnp.arange(4.0) * value}


def save(checkpoints, *steps):
    """Save trees filled with the step's number, and wait until each is complete."""
    for step in steps:
        checkpoints.save(
            step, {"params": tree(float(step)), "ema": tree(-float(step))}, {"step": step}
        )
        checkpoints.wait()


def value_of(checkpoints, step):
    """Return the number with which `save` filled this step."""
    restored = checkpoints.restore(step, {"params": jax.eval_shape(lambda: tree(0.0))})["params"]
    (value,) = set(restored["a"]["kernel"].ravel().tolist())
    return value


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def snapshot(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def folder(tmp_path):
    """A folder with the complete checkpoints 4, 8 and 12."""
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        save(checkpoints, 4, 8, 12)
    return tmp_path / "c"


def test_all_items_one_item_and_the_note_round_trip(tmp_path):
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        assert checkpoints.newest_complete() == (None, [])
        checkpoints.save(
            7, {"params": tree(1.5), "ema": tree(2.5)}, {"seed": 3, "rows": [{"loss": 0.1}]}
        )
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        assert checkpoints.newest_complete() == (7, [])
        both = checkpoints.restore(7, {name: jax.eval_shape(lambda: tree(0.0)) for name in ITEMS})
        only_ema = checkpoints.restore(7, {"ema": jax.eval_shape(lambda: tree(0.0))})
        assert checkpoints.note(7) == {"seed": 3, "rows": [{"loss": 0.1}]}
    assert only_ema.keys() == {"ema"}
    jax.tree.map(np.testing.assert_array_equal, both, {"params": tree(1.5), "ema": tree(2.5)})
    jax.tree.map(np.testing.assert_array_equal, only_ema["ema"], tree(2.5))


def test_the_manifest_lists_every_file(folder):
    listed = json.loads((folder / "8" / "manifest.json").read_text())
    files = {
        str(p.relative_to(folder / "8")): p.stat().st_size
        for p in (folder / "8").rglob("*")
        if p.is_file()
    }
    assert files.pop("manifest.json")
    assert {name: entry["bytes"] for name, entry in listed["files"].items()} == files
    run = json.loads((folder.parent / "run.json").read_text())["run"]
    assert (listed["step"], listed["run"]) == (8, run)


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 1}, [7]),
        ({"keep_last": 2}, [6, 7]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 7]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6, 7]),
    ],
)
def test_the_last_and_the_periodic_steps_are_kept(tmp_path, keep, steps):
    with Checkpoints(tmp_path / "c", ITEMS, **keep) as checkpoints:
        save(checkpoints, *range(1, 8))
    assert names(tmp_path / "c") == [str(step) for step in steps]


def test_an_older_step_stays_until_the_newer_one_is_complete(tmp_path, monkeypatch):
    write_text = storage.write_text
    seen = []

    def write_manifest(path, text):
        if path.name == "manifest.json":
            seen.append(names(tmp_path / "c"))
        write_text(path, text)

    monkeypatch.setattr(storage, "write_text", write_manifest)
    with Checkpoints(tmp_path / "c", ITEMS, keep_last=1) as checkpoints:
        save(checkpoints, 1, 2, 3)
    assert seen == [["1"], ["1", "2"], ["2", "3"]]


def test_a_state_donated_after_the_save_is_saved_unchanged(tmp_path):
    double = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t), donate_argnums=0)
    state = {
        name: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree(1.0, (512, 512)))
        for name in ITEMS
    }
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(double(state))
        checkpoints.wait()
        restored = checkpoints.restore(1, {"params": jax.eval_shape(lambda: tree(0.0, (512, 512)))})
    jax.tree.map(np.testing.assert_array_equal, restored["params"], tree(1.0, (512, 512)))


def test_a_note_changed_after_the_save_is_saved_unchanged(tmp_path, monkeypatch):
    """Orbax writes it in the background; here that waits until the caller has changed it."""
    go = threading.Event()
    save_json = ocp.JsonCheckpointHandler._save_fn

    async def save_late(*arguments):
        await asyncio.to_thread(go.wait, 20)
        await save_json(*arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", save_late)
    note = {"steps": [1]}
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(1, {"params": tree(1.0), "ema": tree(1.0)}, note)
        note["steps"].append(2)
        go.set()
        checkpoints.wait()
        assert checkpoints.note(1) == {"steps": [1]}


def test_a_save_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    write_text = storage.write_text
    go = threading.Event()
    monkeypatch.setattr(storage, "write_text", lambda *args: go.wait(20) and write_text(*args))
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(1, {"params": tree(1.0), "ema": tree(1.0)}, {})
        assert not (tmp_path / "c" / "1" / "manifest.json").exists()
        go.set()
    assert (tmp_path / "c" / "1" / "manifest.json").exists()  # leaving waits


def test_another_models_arrays_are_named_with_both_shapes(folder):
    with Checkpoints(folder, ITEMS) as checkpoints:
        with pytest.raises(
            UserError,
            match=r"checkpoint 4: params belongs to another model: a/kernel has shape "
            r"\(3, 2\) in the checkpoint and \(5, 2\) in this config",
        ):
            checkpoints.restore(4, {"params": jax.eval_shape(lambda: tree(0.0, (5, 2)))})
        with pytest.raises(UserError, match="another model: c has shape None in the checkpoint"):
            checkpoints.restore(
                4, {"params": jax.eval_shape(lambda: tree(0.0) | {"c": jnp.zeros(1)})}
            )


def largest(step_folder):
    """Return the file with most of the arrays."""
    files = [
        path for path in step_folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    ]
    return max(files, key=lambda path: (path.stat().st_size, str(path)))


def cut(step_folder):
    path = largest(step_folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip(step_folder):
    path = largest(step_folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def unfinish(step_folder):
    """Leave the folder as a kill during the save does."""
    (step_folder / "manifest.json").unlink()
    step_folder.rename(step_folder.parent / f"{step_folder.name}.orbax-checkpoint-tmp")


DAMAGE = {
    "cut": (cut, r"(params|ema)/\S+ has \d+ bytes instead of \d+"),
    "flipped": (flip, r"the content of (params|ema)/\S+ has changed"),
    "no file": (lambda step: largest(step).unlink(), r"(params|ema)/\S+ is missing"),
    "no manifest": (
        lambda step: (step / "manifest.json").unlink(),
        "its manifest is missing, so the save did not ",
    ),
    "cut manifest": (
        lambda step: cut_manifest(step, 30),
        r"its manifest cannot be read \(JSONDecodeError: .+\)",
    ),
    "empty manifest file": (
        lambda step: cut_manifest(step, 0),
        r"its manifest cannot be read \(JSONDecodeError: ",
    ),
    "binary manifest": (
        lambda step: (step / "manifest.json").write_bytes(b"\xff\xfe"),
        "its manifest cannot be read",
    ),
    "list manifest": (
        lambda step: (step / "manifest.json").write_text("[1]"),
        "its manifest cannot be read",
    ),
    "other manifest": (
        lambda step: (step / "manifest.json").write_text('{"a": 1}'),
        "its manifest cannot be read",
    ),
    "void manifest": (
        lambda step: (step / "manifest.json").write_text("{}"),
        "its manifest is empty",
    ),
    "unfinished": (unfinish, "its manifest is missing, so the save did not finish"),
}


def cut_manifest(step_folder, size):
    path = step_folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_complete_step_is_used_and_nothing_is_changed(folder, kind):
    damage, words = DAMAGE[kind]
    damage(folder / "12")
    before = snapshot(folder)
    with Checkpoints(folder, ITEMS, keep_last=1) as checkpoints:
        step, (problem,) = checkpoints.newest_complete()
        assert (step, value_of(checkpoints, 8)) == (8, 8.0)
    suffix = ".orbax-checkpoint-tmp" if kind == "unfinished" else ""
    assert re.match(f"checkpoint {folder}/12{suffix} is not used: {words}", problem)
    assert "\n" not in problem
    assert snapshot(folder) == before


def test_without_a_complete_step_there_is_none_and_each_is_named(folder):
    cut(folder / "12")
    flip(folder / "8")
    unfinish(folder / "4")
    before = snapshot(folder)
    with Checkpoints(folder, ITEMS) as checkpoints:
        step, problems = checkpoints.newest_complete()
    assert step is None and [problem.split()[1] for problem in problems] == [
        f"{folder}/{name}" for name in ("12", "8", "4.orbax-checkpoint-tmp")
    ]
    assert snapshot(folder) == before


def test_every_file_is_checked(folder):
    """A changed byte is noticed in any file, however small."""
    paths = list((folder / "12").rglob("*"))
    for path in paths:
        if not path.is_file() or not path.stat().st_size:
            continue
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert manifest.problem(storage.epath.Path(folder / "12"), 12, None), path
        path.write_bytes(data)
    assert manifest.problem(storage.epath.Path(folder / "12"), 12, None) is None


@pytest.mark.parametrize("kind", ["cut", "flipped", "no manifest", "unfinished"])
def test_a_damaged_folder_stays_until_its_step_is_complete_again(folder, monkeypatch, kind):
    DAMAGE[kind][0](folder / "12")
    damaged = snapshot(folder / "12") if kind != "unfinished" else None
    write_text = storage.write_text
    seen = []

    def write_manifest(path, text):
        if path.name == "manifest.json":
            seen.append([snapshot(moved) for moved in folder.glob("12.*damaged")])
        write_text(path, text)

    monkeypatch.setattr(storage, "write_text", write_manifest)
    with Checkpoints(folder, ITEMS, keep_last=2) as checkpoints:
        assert checkpoints.newest_complete()[0] == 8
        save(checkpoints, 12)
        assert checkpoints.newest_complete() == (12, []) and value_of(checkpoints, 12) == 12
    assert seen == [[damaged] if damaged else []]
    assert names(folder) == ["12", "8"]


def test_a_step_may_be_damaged_several_times(folder):
    """All damaged folders are kept side by side until a save of the step is complete."""
    cut(folder / "12")
    (folder / "12.1.damaged").mkdir()
    with Checkpoints(folder, ITEMS) as checkpoints:
        checkpoints.save(12, {"params": tree(1.0), "ema": tree(1.0)}, {})
        assert {"12.1.damaged", "12.2.damaged"} <= set(names(folder))
    assert names(folder) == ["12", "4", "8"]


def test_retention_does_not_count_damaged_newer_steps(folder):
    """4 is the last complete step; it stays until 6, saved below the damaged 8 and 12, is."""
    flip(folder / "8")
    flip(folder / "12")
    with Checkpoints(folder, ITEMS, keep_last=1) as checkpoints:
        assert checkpoints.newest_complete()[0] == 4
        save(checkpoints, 6)
        assert checkpoints.newest_complete()[0] == 6
        assert names(folder) == ["12", "6", "8"]
        save(checkpoints, 8)
        assert checkpoints.newest_complete()[0] == 8
        save(checkpoints, 12, 16)
        assert checkpoints.newest_complete() == (16, [])
    assert names(folder) == ["16"]


def test_remains_of_a_killed_save_are_deleted_when_a_newer_step_is_complete(folder):
    unfinish(folder / "8")  # killed during a save
    (folder / "4" / "manifest.json").unlink()  # killed during its deletion
    with Checkpoints(folder, ITEMS, keep_last=1) as checkpoints:
        assert names(folder) == ["12", "4", "8.orbax-checkpoint-tmp"]
        save(checkpoints, 16)
    assert names(folder) == ["16"]


def test_foreign_files_are_left_alone(folder):
    for name in ("notes.txt", "mine.damaged", "mine.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
    with Checkpoints(folder, ITEMS, keep_last=1) as checkpoints:
        assert checkpoints.newest_complete() == (12, [])
        save(checkpoints, 16)
    assert names(folder) == ["16", "mine.damaged", "mine.orbax-checkpoint-tmp", "notes.txt"]


_FULL_DISK = """
import pathlib, resource, sys
import jax.numpy as jnp, numpy as np
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def save(step):
    # Noise, which cannot be compressed.
    noise = np.random.default_rng(step).normal(size=(300, 300)).astype(np.float32)
    items = {name: {"a": jnp.asarray(noise)} for name in ("params", "ema")}
    checkpoints.save(step, items, {})

def contents():
    folder = pathlib.Path(sys.argv[1]) / "4"
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

with Checkpoints(sys.argv[1], ("params", "ema"), keep_last=1) as checkpoints:
    save(4)
    checkpoints.wait()
    before = contents()
    limit(100_000)  # the arrays need 233 kB each
    for step in (8, 12):
        save(step)
        try:
            checkpoints.wait()
            sys.exit(f"{step} was saved")
        except UserError as error:
            print(error)
        assert contents() == before
        assert checkpoints.newest_complete()[0] == 4
    limit(resource.RLIM_INFINITY)
    save(16)
    checkpoints.wait()
    assert checkpoints.newest_complete() == (16, [])
"""


def test_a_disk_that_fills_up_during_a_save_fails_it_and_leaves_the_others(tmp_path):
    """The limit on the size of a process's files fails a write as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "c")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        f"checkpoint {step} could not be saved" for step in (8, 12)
    ]
    for line in lines:
        assert "File too large" in line and "the checkpoints before it are untouched" in line
        assert len(line) < 500
    assert names(tmp_path / "c") == ["16"]


def test_what_orbax_leaves_behind_after_a_failed_save_is_not_printed(monkeypatch, caplog):
    printed = []
    monkeypatch.setattr(checkpoint, "_report_unraisable", printed.append)
    texts = ("Event loop is closed", "Event loop is stopped", "x", "")
    for text in texts:
        unraisable = types.SimpleNamespace(exc_value=RuntimeError(text))
        checkpoint._report_other_unraisable(unraisable)
    assert [str(unraisable.exc_value) for unraisable in printed] == list(texts[1:])
    for text in ("Future exception was never retrieved", "Task exception was never retrieved", "x"):
        logging.getLogger("asyncio").error("%s", text)
    assert caplog.messages == ["x"]


def test_a_manifest_that_cannot_be_written_is_reported_once(tmp_path, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path / "c", ITEMS, keep_last=1) as checkpoints:
        save(checkpoints, 4)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_text", fail)
            checkpoints.save(8, {"params": tree(8.0), "ema": tree(8.0)}, {})
            with pytest.raises(
                UserError,
                match=r"checkpoint 8 could not be saved in .*: .*No space left on device\)",
            ):
                checkpoints.wait()
        checkpoints.wait()
        step, (problem,) = checkpoints.newest_complete()
        assert step == 4 and "8 is not used: its manifest is missing" in problem
        save(checkpoints, 8)
        assert checkpoints.newest_complete() == (8, [])


def test_leaving_reports_a_failed_save_but_hides_no_other_error(tmp_path, monkeypatch):
    def save_and_leave(step, error=None):
        with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
            checkpoints.save(step, {"params": tree(4.0), "ema": tree(4.0)}, {})
            if error:
                raise error

    monkeypatch.setattr(manifest, "write", lambda folder, step, run: 1 / 0)
    with pytest.raises(UserError, match="checkpoint 4 could not be saved"):
        save_and_leave(4)
    with pytest.raises(KeyError):
        save_and_leave(8, KeyError())
