"""What jobs take from a trained run's workdir, and where in it they put what they make."""

import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from sit_jax import hosts, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check
from sit_jax.jobs.setup import Setup


def newest_complete(checkpoints: Checkpoints) -> int | None:
    """The newest step that can be trusted, after a warning for each newer one that cannot."""
    step, problems = checkpoints.newest_complete()
    for problem in problems if hosts.is_first() else ():
        print(f"warning: {problem}", file=sys.stderr)
    return step


def restore_weights(setup: Setup, workdir: epath.Path, weights: str) -> tuple[int, Any]:
    """The newest checkpoint's step, and its parameters: those of the EMA ("ema") or the trained ones ("raw").

    `UserError` if there is none.
    """
    which = {"ema": "ema", "raw": "params"}[weights]
    folder = workdir / "checkpoints"
    there = hosts.broadcast_from_first(folder.exists)
    check(there, f"--workdir {str(workdir)!r} has no checkpoints; train first, with --mode train")
    target = getattr(setup.abstract_state, which)
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        step = newest_complete(checkpoints)
        check(
            step is not None,
            f"{str(folder)!r} holds no whole checkpoint; train first, with --mode train",
        )
        return step, weights_of(checkpoints, step, {which: target})[which]


def weights_of(checkpoints: Checkpoints, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The items `params` and `ema`, or one of them. Converted weights are an EMA alone, which stands for both.

    `UserError` for a checkpoint without an EMA where it is asked for: the trained weights are not taken for it.
    """
    there = checkpoints.stored(step)
    stored = {name: target for name, target in targets.items() if name in there}
    if "params" in targets and "params" not in there:
        stored["ema"] = targets["params"]
    check(
        "ema" in there or "ema" not in {*targets, *stored},
        f"checkpoint {step} holds no EMA, only {', '.join(sorted(there)) or 'nothing'}; set sample.weights=raw, or "
        "likelihood.weights=raw",
    )
    restored = checkpoints.restore(step, stored)
    return {name: restored[name] if name in restored else restored["ema"] for name in targets}


def results_folder(parent: epath.Path, name: str, settings: Mapping[str, Any]) -> epath.Path:
    """parent/NAME-HASH with a settings.json, made if need be: other settings never share a folder."""
    text = json.dumps(settings, indent=2)
    folder = make_workdir(parent / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}")
    if hosts.is_first():
        storage.write_text(folder / "settings.json", text + "\n")
    return folder


def make_workdir(folder: epath.Path) -> epath.Path:
    """The folder, made if need be. `UserError` if it cannot be written, or is not the same on all hosts."""
    hosts.broadcast_from_first(lambda: storage.make_writable_folder(folder) and None)
    hosts.check_shared(folder)
    return folder


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows that are there; a line that a kill cut is taken out of the file: what it was of is done again."""
    if not path.exists():
        return []
    text = path.read_bytes()
    lines_and_rows = list(storage.json_rows(text))
    whole = b"".join(line + b"\n" for line, _ in lines_and_rows)
    if whole != text:
        storage.write_bytes(path, whole)
    return [row for _, row in lines_and_rows]
