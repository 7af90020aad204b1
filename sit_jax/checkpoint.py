"""Checkpoints of a run, by Orbax: written in the background, restored onto whatever mesh is there.

A step's folder holds named items (params, ema, opt_state), so weights restore alone, and the resolved config as JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sit_jax.errors import UserError


class Checkpoints:
    """The checkpoints in a folder. Use as a context manager: leaving waits until the last save is whole."""

    def __init__(
        self, folder: epath.PathLike, items: Sequence[str], keep_last: int | None = None, keep_every: int | None = None
    ):
        """`items` are the names that steps hold.

        With `keep_last`, older steps go, but for multiples of `keep_every`.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every)
        handlers = {name: ocp.StandardCheckpointHandler() for name in items} | {"config": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any], config_json: str) -> None:
        """Starts saving trees of arrays; they are copied before it returns, so the caller may donate them."""
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(config=ocp.args.JsonSave(json.loads(config_json)), **args))

    def wait(self) -> None:
        """Returns when everything saved so far is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The named items of a step, laid out as the abstract trees say.

        `UserError` if the arrays are another model's.
        """
        stored = self._manager.item_metadata(step)
        for name, target in targets.items():
            _check_same_arrays(f"checkpoint {step}: {name}", stored[name], target)
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: restored[name] for name in targets}


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
