"""The step and settings that convert.to_torch records in a file, for convert.from_torch.

PyTorch hands the record on: after training there, the same record stands beside newer weights,
moments and arguments. So it counts only where the file itself does not say otherwise.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from convert import recipe
from sit_jax import config as config_lib
from sit_jax.errors import UserError, check
from sit_jax.models.sizes import Size, size_by_name
from sit_jax.optimizer import make_schedule
from sit_jax.settings import Config, get

KEY = "sit_jax"  # of the record, in `args` or in the metadata of safetensors
_MODEL = ("depth", "width", "heads", "patch")
_OBJECTIVE = {"path_type", "prediction", "loss_weight"}  # each decides whether the others count


@dataclasses.dataclass(frozen=True)
class Record:
    """A step and the settings of the run."""

    step: int
    settings: ml_collections.ConfigDict  # complete; their types and laws are not checked yet
    updates: int | None  # AdamW's count then; None: written before files recorded it

    @property
    def size(self) -> Size:
        """The network's dimensions."""
        model = self.settings.model
        return size_by_name(model.name, **{field: model[field] for field in _MODEL})


def make(step: int, config: Config, updates: int | None = None) -> dict[str, Any]:
    """Return the record of a run, as plain values."""
    return {"step": step, "config": dataclasses.asdict(config), "updates": updates}


def read(path: str, value: Any) -> Record | None:
    """Return the record that `make` returned; None for None.

    Raises UserError if it is damaged.
    """
    if value is None:
        return None
    try:
        step, updates = value["step"], value.get("updates")
        settings = config_lib.default()
        settings.update(value["config"])
        record = Record(step, settings, updates)
        # Everything that is used before config.from_values checks it.
        _ = record.size, _schedule(record)(0), list(_group(record)), recipe.arguments(settings)
        check(type(step) is int and type(updates) in (int, type(None)), "a step is not a number")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: the record of convert.to_torch in args.{KEY} is damaged ({reason}); remove "
            "it from args, or get the complete file"
        ) from error
    return record


def first_step(record: Record, count: int) -> tuple[int, list[str]]:
    """Return the step of a file whose AdamW counts `count` updates, and notes.

    The recorded step may be ahead of the count: a skipped update is a step too.
    """
    updates = record.updates
    if count == updates or (updates is None and count <= record.step):
        return record.step, []
    step = count if updates is None or count < updates else record.step + count - updates
    was = record.step if updates is None else updates
    note = f"AdamW counts {count} updates, where convert.to_torch recorded {was}"
    return step, [f"{note}: the file was trained on, and is at step {step}"]


def settings(
    record: Record, args: Mapping[str, Any], group: Mapping[str, Any] | None, count: int
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Return the settings of a file, and a note on each that is not as recorded.

    `group` holds AdamW's settings, None if only weights are converted; `count` is its count.
    """
    changed = _changed_arguments(record, args)
    if group:
        changed |= _changed_group(record, group, count)
    current = copy.deepcopy(record.settings)
    current.update_from_flattened_dict(changed)
    return current, differences(record, changed)


def differences(record: Record, current: Mapping[str, Any]) -> list[str]:
    """Return a note on each setting that is not as recorded. `current` maps dotted keys."""
    return [
        f"{key} is {str(value)[:100]} in the file, where convert.to_torch recorded "
        f"{str(get(record.settings, key))[:100]}: the file's is kept"
        for key, value in current.items()
        if value != get(record.settings, key)
    ]


def _changed_arguments(record: Record, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings of the arguments that are not as convert.to_torch wrote them."""
    written = recipe.arguments(record.settings)
    changed = {key for key in written.keys() & args.keys() if args[key] != written[key]}
    translated = recipe.from_args(dict(args), {})
    keys = [recipe.ARGUMENTS[key] for key in recipe.ARGUMENTS if key in changed]
    if changed & _OBJECTIVE:
        keys += ["transport.loss_weight", "transport.train_eps", "transport.sample_eps"]
    return {key: translated[key] for key in keys if key in translated}


def _group(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the settings, and their values, that AdamW's group holds too, except its rate."""
    optimizer = record.settings.optimizer
    for key in ("b1", "b2", "eps", "weight_decay"):
        yield f"optimizer.{key}", float(optimizer[key])


def _schedule(record: Record) -> Any:
    # Only files of versions that had no train.epochs need it; others record the updates.
    return make_schedule(record.settings.optimizer, record.settings.train.steps or 1)


def _changed_group(record: Record, group: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return our settings of the values in AdamW's group that are not as recorded.

    convert.to_torch writes the base rate, and earlier versions the rate of the schedule. Any other
    rate was set in PyTorch, which has no schedule: it is kept as a constant.
    """
    translated = recipe.optimizer_settings(group)
    changed = {
        key: translated[key]
        for key, recorded in _group(record)
        if not math.isclose(translated[key], recorded, rel_tol=1e-9)
    }
    rates = [record.settings.optimizer.learning_rate]
    if record.updates is None:
        rates += [float(_schedule(record)(step)) for step in (record.step, count)]
    rate = group["lr"]
    if not any(math.isclose(rate, known, rel_tol=1e-5, abs_tol=1e-12) for known in rates):
        changed["optimizer.learning_rate"] = rate
        changed["optimizer.schedule"] = "constant"
        changed["optimizer.warmup_steps"] = 0
    return changed
