"""Checkpoints of a run that can be trusted: by Orbax, each with a manifest that is checked before a restore.

A step's folder holds named items (params, ema, opt_state), so weights restore alone, a JSON note, and manifest.json
with the size and SHA-256 of every file. Orbax commits a step by a rename; the manifest is written after that, so a
step without one is unfinished, and one whose files disagree with it is damaged. Neither is ever used, and neither is
deleted before a newer step is whole.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sit_jax import hosts, storage
from sit_jax.errors import UserError

_MANIFEST = "manifest.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix, until it renames
_DAMAGED = ".damaged"  # ours, for a folder whose step is saved again
_CHUNK = 2**24  # bytes


# What goes wrong is told here, once and in a line; Orbax logs it as pages of tracebacks, and its own clearing up.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager: leaving waits until the last save is whole."""

    def __init__(
        self,
        folder: epath.PathLike,
        items: Sequence[str],
        keep_last: int | None = None,
        keep_every: int | None = None,
    ):
        """`items` name what a step holds. With `keep_last`, older steps go, but for multiples of `keep_every`."""
        self._folder, self._keep_last, self._keep_every = (
            epath.Path(folder).resolve(),
            keep_last,
            keep_every,
        )
        self._items = tuple(items)
        self._manager = self._open()
        self._finishing: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def _open(self) -> ocp.CheckpointManager:
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in self._items}
        handlers["note"] = ocp.JsonCheckpointHandler()
        # Orbax's own retention would remove the last whole step as soon as a newer one is committed, manifest or not.
        options = ocp.CheckpointManagerOptions(max_to_keep=None)
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind and hosts.is_multiprocess() and not issubclass(kind, UserError):
            return  # a host may be dead: a save would wait for its part; main ends the process
        try:
            if kind is None:
                self.wait()
            else:  # another error is on its way: that one matters, and may be of this process alone
                self._join()
        finally:
            self._manager.close()

    def newest_complete(self) -> tuple[int | None, list[str]]:
        """The newest step whose files are as its manifest says, or None; and a line on each newer one that is not."""
        self._manager.reload()
        step, problems = hosts.broadcast_from_first(
            self._newest_whole
        )  # one decides: what is read anew may be another thing
        if step is not None:
            hosts.check_all_see(self._folder / str(step) / _MANIFEST)
        return step, problems

    def _newest_whole(self) -> tuple[int | None, list[str]]:
        problems = []
        found = [(step, self._folder / str(step)) for step in self._steps()]
        for step, folder in sorted(found + self._set_aside(_UNFINISHED), reverse=True):
            problem = _damage(folder)
            if problem is None:
                return step, problems
            problems.append(f"checkpoint {folder} is not used: {problem}")
        return None, problems

    def save(self, step: int, items: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Starts saving trees of arrays, and a note; both are copied before it returns: the caller may donate them.

        Waits for the save before it, and raises `UserError` if that one failed. A failure of this one (disk full, no
        permission) is raised by the next call, by `wait`, or on leaving.
        """
        self.wait()
        folder = self._folder / str(step)
        if hosts.broadcast_from_first(lambda: self._put_aside(folder)):
            self._manager.reload()
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["note"] = ocp.args.JsonSave(
            copy.deepcopy(dict(note))
        )  # written in the background: a log's rows go on
        try:
            # Forced, as Orbax skips a step below its newest, which may be one that is damaged.
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except OSError as error:  # what goes wrong later, in the background, is kept for wait() too
            self._failure = step, error
            return
        self._finishing = threading.Thread(target=self._finish, args=(step,))
        self._finishing.start()

    def _put_aside(self, folder: epath.Path) -> bool:
        """Renames the folder of a step, which is damaged or unfinished, if there is one: it stays until a newer is."""
        if not folder.exists():
            return False
        names = (f"{folder.name}.{number}{_DAMAGED}" for number in itertools.count(1))
        folder.rename(
            next(self._folder / name for name in names if not (self._folder / name).exists())
        )
        return True

    def wait(self) -> None:
        """Returns when everything saved so far is whole, in all processes; `UserError` if the last failed in any."""
        self._join()
        try:
            hosts.run_on_all(self._raise_failure)
        except UserError:
            with contextlib.suppress(
                Exception
            ):  # a manager raises what failed a save again, whatever it is asked
                self._manager.close()
            self._manager = self._open()
            raise

    def _join(self) -> None:
        if self._finishing:
            self._finishing.join()
            self._finishing = None

    def _raise_failure(self) -> None:
        if self._failure:
            (step, error), self._failure = self._failure, None
            reason = " ".join(str(error).split())
            reason = (
                reason if len(reason) <= 200 else f"... {reason[-180:]}"
            )  # the cause comes last
            raise UserError(
                f"checkpoint {step} could not be saved in {self._folder} ({type(error).__name__}: {reason}); "
                "make room or mend the folder: the checkpoints before it are untouched"
            ) from error

    def stored(self, step: int) -> set[str]:
        """Which of the named items a step holds."""
        return set(self._manager.item_metadata(step).keys()) & set(self._items)

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
        return self._manager.restore(step, args=ocp.args.Composite(note=ocp.args.JsonRestore()))[
            "note"
        ]

    def _finish(self, step: int) -> None:
        """In the background: once Orbax has committed the step, writes its manifest, then lets older ones go."""
        try:
            self._manager.wait_until_finished()  # for the shards of all processes: Orbax commits when they are there
            if not hosts.is_first():
                return
            folder = self._folder / str(step)
            storage.write_text(folder / _MANIFEST, json.dumps(_digests(folder), indent=1))
            self._remove_old(step)
        except BaseException as error:  # a thread has nobody to raise to; wait() does
            self._failure = step, error

    def _remove_old(self, newest: int) -> None:
        """Removes what `newest`, which has just become whole, makes needless.

        Steps beyond it stay and count for nothing: they are damaged, or it would not have been made.
        """
        steps = sorted(step for step in self._steps() if step <= newest)
        finished = [step for step in steps if (self._folder / str(step) / _MANIFEST).exists()]
        oldest_kept = finished[-self._keep_last :][0] if self._keep_last else 0
        for (
            step
        ) in steps:  # also one without a manifest, which a kill while it was removed may leave
            if step < oldest_kept and not (self._keep_every and step % self._keep_every == 0):
                (
                    self._folder / str(step)
                ).rmtree()  # Orbax's own way waits for all processes, from this thread
        for step, folder in self._set_aside(_UNFINISHED) + self._set_aside(_DAMAGED):
            if step <= newest:
                folder.rmtree()

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]

    def _set_aside(self, suffix: str) -> list[tuple[int, epath.Path]]:
        """(step, folder) of those whose name is a step, with that suffix."""
        found = [(path.name.partition(".")[0], path) for path in self._folder.glob(f"*{suffix}")]
        return [(int(step), path) for step, path in found if step.isdigit()]


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
        name: {"bytes": path.stat().length, "sha256": _sha256(path)}
        for name, path in sorted(_files(folder).items())
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
        entries = json.loads((folder / _MANIFEST).read_text())
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return "its manifest is missing, so the save did not finish"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    if not wanted:
        return "its manifest is empty"
    files = _files(folder)
    for name, (size, _) in wanted.items():  # sizes first: they cost nothing
        if name not in files:
            return f"{name} is missing"
        if (found := files[name].stat().length) != size:
            return f"{name} has {found} bytes instead of {size}"
    for name, (_, digest) in wanted.items():
        if _sha256(files[name]) != digest:
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
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
