"""Checkpoints by Orbax, each with a manifest that is checked before the checkpoint is used.

The folder of a step holds named items (params, ema, opt_state), so that weights can be restored by
themselves, a JSON note, and a manifest. Orbax commits a step by a rename, and the manifest is
written after that. So a step without a manifest is unfinished, and one whose files disagree with
its manifest is damaged. Neither is ever used, and neither is deleted before a newer step is
complete.

Beside the folder lies run.json with a random id of the run. It is written once the first checkpoint
is complete, so it also tells a run that has lost its checkpoints from one that never had any.
"""

import contextlib
import copy
import itertools
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sit_jax import hosts, manifest, storage
from sit_jax.errors import UserError, check

_RECORD = "run.json"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's suffix for a folder until it renames it
_DAMAGED = ".damaged"  # our suffix for the old folder of a step that is saved again


# Errors are reported here, once and in one line. Orbax also logs them, as pages of tracebacks, and
# logs its own cleanup.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
# When one of Orbax's writers has failed, the others end after their event loop: more tracebacks.
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
_report_unraisable = sys.unraisablehook


def _report_other_unraisable(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _report_unraisable(unraisable)


sys.unraisablehook = _report_other_unraisable


class Checkpoints:
    """The checkpoints in a folder, as a context manager: leaving it waits for the last save."""

    def __init__(
        self,
        folder: epath.PathLike,
        items: Sequence[str],
        keep_last: int | None = None,
        keep_every: int | None = None,
    ):
        """Open a folder of checkpoints whose steps hold the named `items`.

        With `keep_last`, older steps are deleted, except multiples of `keep_every`.
        """
        self._folder = epath.Path(folder).resolve()
        self._record = self._folder.parent / _RECORD
        self._run = _read_run(self._record)  # None: not known yet
        self._items = tuple(items)
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._manager = self._open()
        self._protected: int | None = None
        self._finishing: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def _open(self) -> ocp.CheckpointManager:
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in self._items}
        handlers["note"] = ocp.JsonCheckpointHandler()
        # Orbax's own retention would delete the last complete step as soon as a newer one is
        # committed, that is before its manifest is written.
        options = ocp.CheckpointManagerOptions(max_to_keep=None)
        return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error and hosts.is_multiprocess() and not issubclass(error, UserError):
            return  # a host may be dead: a save would wait for its shards; main ends the process
        try:
            if error is None:
                self.wait()
            else:  # not wait(), which is collective: only this process may have failed
                self._join()
        finally:
            self._manager.close()

    def newest_complete(self) -> tuple[int | None, list[str]]:
        """Return the newest step whose files agree with its manifest, or None.

        Also returns one line for each newer step, saying why it is not used.
        """
        self._manager.reload()
        # Process 0 decides: another process might read a different state of the disk.
        step, problems = hosts.broadcast_from_first(self._find_newest_complete)
        if step is not None:
            hosts.check_all_see(self._folder / str(step) / manifest.NAME)
        return step, problems

    def check_complete(self, step: int) -> None:
        """Raise `UserError` unless the checkpoint of this step is complete and undamaged."""
        self._manager.reload()

        def find_problem() -> str | None:
            if step not in self._steps():
                saved = ", ".join(map(str, sorted(self._steps())))
                return f"it is not among those saved ({saved or 'none'})"
            return manifest.problem(self._folder / str(step), step, self._run)

        problem = hosts.broadcast_from_first(find_problem)
        check(
            problem is None,
            f"checkpoint {step} of {os.fspath(self._folder)!r} cannot be used: {problem}; give "
            "another sample.checkpoint, or none for the newest",
        )
        hosts.check_all_see(self._folder / str(step) / manifest.NAME)

    def _find_newest_complete(self) -> tuple[int | None, list[str]]:
        problems: list[str] = []
        folders = self._saved()
        for step, folder in sorted(folders, reverse=True):
            problem = manifest.problem(folder, step, self._run)
            if problem is None:
                self._run = self._run or manifest.read(folder).run
                return step, problems
            if folder.exists():  # else a training run has deleted it, after a newer one
                problems.append(f"checkpoint {folder} is not used: {problem}")
        # While this looked, a training run may have completed a newer one and deleted these.
        return (None, problems) if self._saved() == folders else self._find_newest_complete()

    def _saved(self) -> list[tuple[int, epath.Path]]:
        """Return (step, folder) of everything that Orbax has saved or begun to save."""
        committed = [(step, self._folder / str(step)) for step in self._steps()]
        return committed + self._folders_with_suffix(_UNFINISHED)

    def has_trained(self) -> bool:
        """Return True if the run has had a complete checkpoint, even if all are lost now."""

        def look() -> bool:
            steps = self._steps()
            manifests = [self._folder / str(step) / manifest.NAME for step in steps]
            # A run of an earlier version has no record. Only its newest step may be unfinished.
            return self._record.exists() or len(steps) > 1 or any(m.exists() for m in manifests)

        return hosts.broadcast_from_first(look)

    def digest(self, step: int, item: str) -> str:
        """Return a name for the content of one item of a complete step, 16 hexadecimal digits."""
        return hosts.broadcast_from_first(lambda: manifest.digest(self._folder / str(step), item))

    def save(self, step: int, items: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Start to save trees of arrays and a note.

        Both are copied before it returns, so the caller may donate the arrays. Waits for the save
        before this one, and raises UserError if that failed. If this one fails (disk full, no
        permission), the next call, `wait` or leaving the context raises UserError.
        """
        self.wait()
        folder = self._folder / str(step)
        if hosts.broadcast_from_first(lambda: self._move_aside(folder)):
            self._manager.reload()
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        # A copy, because it is written in the background while the caller's rows grow.
        args["note"] = ocp.args.JsonSave(copy.deepcopy(dict(note)))
        try:
            # Forced, as Orbax skips a step below its newest one, which may be damaged.
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except OSError as error:
            self._failure = step, error  # for wait(), like an error in the background
            return
        self._finishing = threading.Thread(target=self._finish, args=(step,))
        self._finishing.start()

    def _move_aside(self, folder: epath.Path) -> bool:
        """Rename the folder of a step that is saved again; return False if it does not exist.

        Such a folder is damaged or unfinished. It is deleted once the step or a newer one is
        complete.
        """
        if not folder.exists():
            return False
        names = (f"{folder.name}.{number}{_DAMAGED}" for number in itertools.count(1))
        targets = (self._folder / name for name in names)
        folder.rename(next(target for target in targets if not target.exists()))
        return True

    def protect(self, step: int | None) -> None:
        """Keep this step, however old; the one that was protected before is no longer."""
        self._protected = step

    def wait(self) -> None:
        """Wait until everything saved so far is complete in all processes.

        Raises UserError if the last save failed in any of them.
        """
        self._join()
        try:
            hosts.run_on_all(self._raise_failure)
        except UserError:
            # After a failed save the manager raises that error at every call: open a new one.
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()
            raise

    def _join(self) -> None:
        if self._finishing:
            self._finishing.join()
            self._finishing = None

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        step, error = self._failure
        self._failure = None
        reason = " ".join(str(error).split())
        if len(reason) > 200:
            reason = f"... {reason[-180:]}"  # the cause is at the end
        raise UserError(
            f"checkpoint {step} could not be saved in {self._folder} "
            f"({type(error).__name__}: {reason}); free some space or repair the folder: "
            "the checkpoints before it are untouched"
        ) from error

    def stored(self, step: int) -> set[str]:
        """Return the names of the items that a step holds."""
        return set(self._manager.item_metadata(step).keys()) & set(self._items)

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """Restore the named items of a step, sharded as the abstract trees in `targets`.

        Raises UserError if the shapes are those of another model.
        """
        stored = self._manager.item_metadata(step)
        for name, target in targets.items():
            _check_same_shapes(f"checkpoint {step}: {name}", stored[name], target)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in targets}

    def note(self, step: int) -> dict[str, Any]:
        """Return the note of a step."""
        args = ocp.args.Composite(note=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["note"]

    def _finish(self, step: int) -> None:
        """Write the manifest once Orbax has committed the step, then delete older steps.

        Runs in the background.
        """
        try:
            # Orbax commits once the shards of all processes are stored.
            self._manager.wait_until_finished()
            if not hosts.is_first():
                return
            self._run = self._run or uuid.uuid4().hex[:12]
            manifest.write(self._folder / str(step), step, self._run)
            if not self._record.exists():
                storage.write_text(self._record, json.dumps({"run": self._run}) + "\n")
            self._delete_old(step)
        except BaseException as error:  # lost if raised in this thread; wait() raises it
            self._failure = step, error

    def _delete_old(self, newest: int) -> None:
        """Delete the steps that `newest`, now complete, supersedes.

        Later steps are damaged, or else `newest` would not have been saved, and are left alone.
        """
        steps = sorted(step for step in self._steps() if step <= newest)
        finished = [step for step in steps if (self._folder / str(step) / manifest.NAME).exists()]
        oldest_kept = finished[-self._keep_last :][0] if self._keep_last else 0
        # All steps, not only those with a manifest: a kill during a deletion leaves some without.
        for step in steps:
            is_kept = step == self._protected or (self._keep_every and step % self._keep_every == 0)
            if step < oldest_kept and not is_kept:
                # Not by Orbax: its deletion waits for all processes, and only process 0 is here.
                (self._folder / str(step)).rmtree()
        for suffix in (_UNFINISHED, _DAMAGED):
            for step, folder in self._folders_with_suffix(suffix):
                if step <= newest:
                    folder.rmtree()

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._folder.iterdir() if _is_step(path.name)]

    def _folders_with_suffix(self, suffix: str) -> list[tuple[int, epath.Path]]:
        """Return (step, folder) for every folder named by a step and this suffix."""
        folders = [(path.name.partition(".")[0], path) for path in self._folder.glob(f"*{suffix}")]
        return [(int(name), path) for name, path in folders if _is_step(name)]


def _is_step(name: str) -> bool:
    """Return True for the name of a step's folder: not for "007", and not for "²", also a digit."""
    return name.isascii() and name.isdigit() and str(int(name)) == name


def _read_run(record: epath.Path) -> str | None:
    """Return the id in run.json, or None if there is none."""
    try:
        return str(json.loads(record.read_text())["run"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _check_same_shapes(item: str, stored: Any, target: Any) -> None:
    stored_shapes = _shapes(stored)
    target_shapes = _shapes(target)
    for name in sorted(stored_shapes.keys() | target_shapes.keys()):
        stored_shape = stored_shapes.get(name)
        target_shape = target_shapes.get(name)
        if stored_shape != target_shape:
            raise UserError(
                f"{item} belongs to another model: {name} has shape {stored_shape} in the "
                f"checkpoint and {target_shape} in this config; use the config it was trained "
                "with, or another --workdir"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
