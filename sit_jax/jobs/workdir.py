"""A run's workdir: its folder, its checkpoints and the weights in them."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, lock, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check, require
from sit_jax.jobs.setup import Setup
from sit_jax.laws import in_group
from sit_jax.settings import WEIGHTS, Config


def make_workdir(folder: epath.Path) -> epath.Path:
    """Create the folder if it does not exist.

    Raises `UserError` if it cannot be written, or if the hosts do not share it.
    """
    hosts.broadcast_from_first(lambda: storage.make_writable_folder(folder) and None)
    hosts.check_shared(folder)
    return folder


@contextlib.contextmanager
def open_for_writing(folder: epath.Path) -> Iterator[None]:
    """Hold the lock of a folder, created if it does not exist, and tidy up after killed writers.

    Raises `UserError` if another job writes there. After an error, folders that this created and
    that are still empty are removed.
    """
    paths = (folder / "checkpoints", folder, *folder.parents)
    created = [path for path in paths if not path.exists()]
    make_workdir(folder)
    is_held = False
    try:
        with contextlib.ExitStack() as stack:
            if hosts.is_first():
                hosts.run_on_all(lambda: stack.enter_context(lock.hold(folder)))
            else:
                hosts.run_on_all(lambda: None)
            is_held = True
            hosts.broadcast_from_first(lambda: storage.clean_up(folder))
            yield
    except BaseException:
        if is_held and hosts.is_first():
            storage.remove_empty(created)
        raise


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


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a checkpoint. Results are named after all but the parameters."""

    step: int
    params: Any
    digest: str  # of the stored weights: other weights of the same step have another one
    note: Mapping[str, Any]  # of the checkpoint


def restore_weights(
    setup: Setup, workdir: epath.Path, weights: str, step: int | None = None
) -> Weights:
    """Return the EMA (weights "ema") or the parameters ("raw") of a checkpoint; None: the newest.

    Raises `UserError` if there is no complete checkpoint of that step, or if it was trained with
    other settings of the network.
    """
    item = WEIGHTS[weights]
    folder = workdir / "checkpoints"
    check(
        hosts.broadcast_from_first(folder.exists),
        f"{str(workdir)!r} has no checkpoints; train first, with --mode train",
    )
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        if step is not None:
            checkpoints.check_complete(step)
            return _restore_weights(setup, workdir, checkpoints, step, item)
        while True:
            step = require(
                newest_step(checkpoints),
                f"{str(folder)!r} holds no complete checkpoint; train first, with --mode train",
            )
            try:
                return _restore_weights(setup, workdir, checkpoints, step, item)
            except Exception:
                # A run that is training deletes old checkpoints: then take the next newest.
                if hosts.is_multiprocess() or (folder / str(step)).exists():
                    raise


def _restore_weights(
    setup: Setup, workdir: epath.Path, checkpoints: Checkpoints, step: int, item: str
) -> Weights:
    note = checkpoints.note(step)
    check_trained_with(note, step, setup.config, workdir, only=config_lib.NETWORK)
    target = getattr(setup.abstract_state, item)
    params = restore_items(checkpoints, step, {item: target})[item]
    stored = item if item in checkpoints.stored(step) else "ema"
    return Weights(step, params, checkpoints.digest(step, stored), note)


def recorded_settings(note: Mapping[str, Any], workdir: epath.Path) -> dict[str, Any] | None:
    """Return the flat settings of the run so far, or None if nothing has recorded them.

    The note of a checkpoint decides, since config.json can be edited. A run without a checkpoint,
    and a fork that an earlier version made, have only config.json.
    """
    if "config" in note:
        return note["config"]
    path = workdir / "config.json"
    return config_lib.flatten(config_lib.read_recorded(path)) if path.exists() else None


def check_trained_with(
    note: Mapping[str, Any],
    step: int,
    config: Config,
    workdir: epath.Path,
    *,
    only: Sequence[str] | None = None,
) -> None:
    """Raise `UserError` that names every setting which differs from those of a checkpoint.

    It compares the settings of the group `only`, or all, except those that may change.
    """
    recorded = recorded_settings(note, workdir)
    if recorded is None:
        return
    differences = [
        f"{key} is {new!r} but was {old!r}"
        for key, (old, new) in config_lib.changes_since(recorded, config).items()
        if (only is None or in_group(key, only)) and not in_group(key, config_lib.CHANGEABLE)
    ]
    check(
        not differences,
        f"the run in {str(workdir)!r} is another one: {', '.join(differences)} in checkpoint "
        f"{step}; keep its values, use another --workdir, or --fork NEWDIR for a new run from "
        "these weights",
    )


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
