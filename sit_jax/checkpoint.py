"""Checkpoints of a run that can be trusted: by Orbax, each with a manifest that is checked before a restore.

A step's folder holds named items (params, ema, opt_state), so weights restore alone, a JSON note, and manifest.json
with the size and SHA-256 of every file. Orbax commits a step by a rename; the manifest is written after that, so a
step without one is unfinished, and one whose files disagree with it is damaged. Neither is ever used, and neither is
deleted.
"""

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError

_MANIFEST = "manifest.json"
_CHUNK = 2**24  # bytes


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager: leaving waits until the last save is whole."""

    def __init__(
        self, folder: epath.PathLike, items: Sequence[str], keep_last: int | None = None, keep_every: int | None = None
    ):
        """`items` name what a step holds. With `keep_last`, older steps go, but for multiples of `keep_every`."""
        self._folder, self._keep_last, self._keep_every = epath.Path(folder).resolve(), keep_last, keep_every
        handlers = {name: ocp.StandardCheckpointHandler() for name in items} | {"note": ocp.JsonCheckpointHandler()}
        # Orbax's own retention would remove the last whole step as soon as a newer one is committed, manifest or not.
        options = ocp.CheckpointManagerOptions(max_to_keep=None)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        self._finishing: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.wait()
        except UserError:
            if kind is None:  # another error is on its way: that one matters
                raise
        finally:
            self._manager.close()

    def newest_whole(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are as its manifest says, or None; and a line on each newer one that is not."""
        problems = []
        self._manager.reload()
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = _damage(self._folder / str(step))
            if problem is None:
                return step, problems
            problems.append(f"checkpoint {self._folder / str(step)} is not used: {problem}")
        return None, problems

    def save(self, step: int, items: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Starts saving trees of arrays; they are copied before it returns, so the caller may donate them.

        Waits for the save before it, and raises `UserError` if that one failed. A failure of this one (disk full, no
        permission) is raised by the next call, by `wait`, or on leaving.
        """
        self.wait()
        folder = self._folder / str(step)
        if folder.exists():  # a damaged or unfinished one, which stays until this one is whole
            folder.rename(self._folder / f"{step}.damaged")
            self._manager.reload()
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(note=ocp.args.JsonSave(dict(note)), **args))
        except OSError as error:  # what goes wrong later, in the background, is kept for wait() too
            self._failure = step, error
            return
        self._finishing = threading.Thread(target=self._finish, args=(step,))
        self._finishing.start()

    def wait(self) -> None:
        """Returns when everything saved so far is whole; `UserError` if the last save failed."""
        if self._finishing:
            self._finishing.join()
            self._finishing = None
        if self._failure:
            (step, error), self._failure = self._failure, None
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {step} could not be saved in {self._folder} ({type(error).__name__}: {reason}); "
                "make room or mend the folder: the checkpoints before it are untouched"
            ) from error

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of a step, laid out as the abstract trees say. `UserError` if they are another model's."""
        stored = self._manager.item_metadata(step)
        for name, target in targets.items():
            _check_same_arrays(f"checkpoint {step}: {name}", stored[name], target)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in targets}

    def note(self, step: int) -> dict[str, Any]:
        """The note of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))["note"]

    def _finish(self, step: int) -> None:
        """In the background: once Orbax has committed the step, writes its manifest, then lets older ones go."""
        try:
            self._manager.wait_until_finished()
            folder = self._folder / str(step)
            storage.write_text(folder / _MANIFEST, json.dumps(_digests(folder), indent=1))
            self._remove_old()
        except BaseException as error:  # a thread has nobody to raise to; wait() does
            self._failure = step, error

    def _remove_old(self) -> None:
        steps = [step for step in sorted(self._manager.all_steps()) if (self._folder / str(step) / _MANIFEST).exists()]
        for step in steps[: -self._keep_last] if self._keep_last else []:
            if not (self._keep_every and step % self._keep_every == 0):
                self._manager.delete(step)
        for damaged in self._folder.glob("*.damaged"):
            if int(damaged.stem) in steps:  # made again, and whole
                damaged.rmtree()


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Every file below a folder but the manifest, by its relative name."""
    found = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        elif path.name != _MANIFEST:
            found[path.name] = path
    return found


def _digests(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"bytes": size, "sha256": hex}}."""
    return {
        name: {"bytes": path.stat().length, "sha256": _sha256(path)} for name, path in sorted(_files(folder).items())
    }


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _damage(folder: epath.Path) -> str | None:
    """What is wrong with a step's folder, in a few words; None if it is as its manifest says."""
    try:
        wanted = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        return "its manifest is missing, so the save did not finish"
    except (OSError, ValueError) as error:
        return f"its manifest cannot be read ({error})"
    files = _files(folder)
    for name, entry in wanted.items():  # sizes first: they cost nothing
        if name not in files:
            return f"{name} is missing"
        if (size := files[name].stat().length) != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
    for name, entry in wanted.items():
        if _sha256(files[name]) != entry["sha256"]:
            return f"the content of {name} has changed"
    return None


def _check_same_arrays(what: str, stored: Any, target: Any) -> None:
    have, want = _shapes(stored), _shapes(target)
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(
                f"{what} is of another model: {name} has shape {have.get(name)} there and {want.get(name)} in this "
                "config; use the config it was trained with, or another --workdir"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
