"""A run's workdir: its folder, its checkpoints and the weights in them."""

import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from sit_jax import hosts, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check, require
from sit_jax.jobs.setup import Setup
from sit_jax.settings import WEIGHTS, Config


def make_workdir(folder: epath.Path) -> epath.Path:
    """Create the folder if it does not exist.

    Raises `UserError` if it cannot be written, or if the hosts do not share it.
    """
    hosts.broadcast_from_first(lambda: storage.make_writable_folder(folder) and None)
    hosts.check_shared(folder)
    return folder


def open_checkpoints(config: Config, workdir: epath.Path) -> Checkpoints:
    """Return the checkpoints of a workdir, kept as the config says."""
    return Checkpoints(
        workdir / "checkpoints",
        train_state.CHECKPOINT_ITEMS,
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
    )


def newest_step(checkpoints: Checkpoints) -> int | None:
    """Return the step of the newest complete checkpoint, or None. Warn about newer damaged ones."""
    step, problems = checkpoints.newest_complete()
    for problem in problems if hosts.is_first() else ():
        print(f"warning: {problem}", file=sys.stderr)
    return step


def restore_weights(setup: Setup, workdir: epath.Path, weights: str) -> tuple[int, Any]:
    """Return the newest checkpoint's step and its weights: the EMA ("ema") or parameters ("raw").

    Raises `UserError` if there is no complete checkpoint.
    """
    item = WEIGHTS[weights]
    folder = workdir / "checkpoints"
    check(
        hosts.broadcast_from_first(folder.exists),
        f"{str(workdir)!r} has no checkpoints; train first, with --mode train",
    )
    target = getattr(setup.abstract_state, item)
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        step = require(
            newest_step(checkpoints),
            f"{str(folder)!r} holds no complete checkpoint; train first, with --mode train",
        )
        return step, restore_items(checkpoints, step, {item: target})[item]


def restore_items(
    checkpoints: Checkpoints, step: int, targets: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore the items `params` and `ema`, or one of them, onto abstract targets.

    Converted weights are stored as an EMA only, which then also serves as the parameters. The
    reverse is refused: raises `UserError` if the EMA is requested and the checkpoint has none.
    """
    stored = checkpoints.stored(step)
    to_restore = {name: target for name, target in targets.items() if name in stored}
    if "params" in targets and "params" not in stored:
        to_restore["ema"] = targets["params"]
    check(
        "ema" in stored or "ema" not in {*targets, *to_restore},
        f"checkpoint {step} holds no EMA, only {', '.join(sorted(stored)) or 'nothing'}; set "
        "sample.weights=raw, likelihood.weights=raw, or in Python load(workdir, 'raw')",
    )
    restored = checkpoints.restore(step, to_restore)
    return {name: restored.get(name, restored.get("ema")) for name in targets}
