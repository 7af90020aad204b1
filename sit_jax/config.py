"""From a config file and the command line to checked settings; the only reader of ConfigDict.

A config file starts from `default()`, changes values and returns it from `get_config()`. `load` turns it, with the
command line's overrides, into the frozen dataclasses of `sit_jax.settings`, and refuses a key that is not there, a
wrong type and an impossible value.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import types
import typing
from collections.abc import Sequence
from typing import Any

import ml_collections
from etils import epath

from sit_jax.errors import UserError, check, unknown_name
from sit_jax.settings import Config, fields, get, validate

# What may differ between a run's start and its continuation: none of these changes the function that is being learned.
CHANGEABLE = (
    "train.steps", "train.skip_nonfinite", "data.path", "data.workers", "data.skip_unreadable", "latents.path",
    "latents.batch", "model.remat", "model.attention", "optimizer.learning_rate", "transport.sample_eps", "sample.",
    "likelihood.", "sweep.", "checkpoint.", "log.", "mesh.",
)  # fmt: skip
# What a finished run's weights mean: other modes may change all the rest.
NETWORK = (
    "model.",
    "transport.path",
    "transport.prediction",
    "data.image_size",
    "data.channels",
    "data.classes",
    "latents.codec",
    "latents.scale",
)


def default() -> ml_collections.ConfigDict:
    """All settings at their defaults.

    Types and names are checked by `load`, where the message can say what was expected.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The config of `file.py`, `file.py:argument` or a recorded `config.json`, with (dotted key, text) overrides.

    `UserError` for a file that cannot be used, an unknown key, a wrong type or an impossible value.
    """
    values = _read_json(spec) if spec.endswith(".json") else _run_file(*_split_argument(spec))
    for key, text in overrides:
        _set(values, key, _parse(key, text))
    config = _build(Config, values, "")
    validate(config)
    return config


def to_json(config: Config) -> str:
    """The config as text that `load` reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """{"train.steps": 400000, ...}."""
    return {key: get(config, key) for key, _ in fields(Config)}


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), where they differ."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _split_argument(spec: str) -> tuple[str, str | None]:
    path, found, argument = spec.partition(".py:")
    return (path + ".py", argument) if found else (spec, None)


def _run_file(path: str, argument: str | None) -> dict:
    check(
        os.path.isfile(path),
        f"--config {path!r} does not exist; expected a file such as configs/digits.py",
    )
    try:
        module_spec = importlib.util.spec_from_file_location("sit_jax_config_file", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return (module.get_config() if argument is None else module.get_config(argument)).to_dict()
    except UserError:
        raise
    except (
        Exception
    ) as error:  # whatever is wrong in the file, the reader wants the file's name and the reason
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be used as a config: {type(error).__name__}: {reason}"
        ) from error


def _read_json(path: str) -> dict:
    try:
        values = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a recorded config ({error}); give --config"
        ) from error
    check(
        isinstance(values, dict),
        f"{path} cannot be read as a recorded config (it holds no settings); give --config",
    )
    return _over(dataclasses.asdict(Config()), values)


def _over(defaults: dict, values: dict) -> dict:
    """values, with the settings that are newer than the file at their defaults."""
    both = defaults | values
    return {
        k: _over(defaults[k], v) if isinstance(v, dict) and isinstance(defaults.get(k), dict) else v
        for k, v in both.items()
    }


def _set(values: dict, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        values = values[part]
    values[leaf] = value


def _parse(key: str, text: str) -> Any:
    """The value that a command line's text stands for; text stays text where the setting is a string."""
    known = dict(fields(Config))
    if key not in known:
        raise unknown_name("config key", key, known)
    if known[key] is str or (known[key] == str | None and text.lower() != "none"):
        return text
    if known[key] == tuple[str, ...] and not text.startswith("("):
        return tuple(filter(None, text.split(",")))
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type, which _build reports


def _build(cls: type, values: dict, prefix: str) -> Any:
    """The dataclass `cls` from a dict that must have just its keys."""
    names = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in names:
            raise unknown_name("config key", prefix + name, [key for key, _ in fields(cls, prefix)])
    for name in names:
        check(
            name in values,
            f"config key {prefix + name} is missing; start from sit_jax.config.default()",
        )
    return cls(
        **{
            name: _build(kind, values[name], f"{prefix}{name}.")
            if dataclasses.is_dataclass(kind) and isinstance(values[name], dict)
            else _typed(prefix + name, kind, values[name])
            for name, kind in names.items()
        }
    )


def _typed(key: str, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _typed(key, typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        element, several = (
            typing.get_args(kind)[0],
            value if isinstance(value, (tuple, list)) else (value,),
        )
        example = {
            int: "whole numbers such as 3,1,4",
            float: "numbers such as 0.1,0.9",
            str: "names such as a,b",
        }
        right = (int, float) if element is float else (element,)
        check(
            all(type(v) in right for v in several),
            f"{key} is {value!r}; expected a list of {example[element]}",
        )
        return tuple(map(element, several))
    if kind is float and type(value) is int:
        return float(value)
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}.get(
        kind, f"the {key} settings"
    )
    check(type(value) is kind, f"{key} is {value!r}; expected {wanted}")
    return value
