"""Reads a config file and the command line into checked settings.

A config file starts from `default()`, changes values and returns it from `get_config()`. `load`
turns it, with the command line's overrides, into the frozen dataclasses of `sit_jax.settings`. It
refuses an unknown key, a wrong type and an invalid value. No other module reads a ConfigDict.
"""

import ast
import copy
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
from sit_jax.laws import declared
from sit_jax.settings import Config, get
from sit_jax.validation import validate

# Settings that may change when a run is continued: none of them changes the function being learned.
CHANGEABLE = (
    "train.steps",
    "train.skip_nonfinite",
    "data.path",
    "data.workers",
    "data.skip_unreadable",
    "data.max_pixels",
    "data.subset_seed",
    "latents.path",
    "latents.batch",
    "model.remat",
    "model.attention",
    "optimizer.learning_rate",
    "transport.sample_eps",
    "sample.",
    "likelihood.",
    "sweep.",
    "checkpoint.",
    "log.",
    "mesh.",
)
# Settings that trained weights depend on. Modes other than train may change all others.
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
    """Return all settings at their defaults.

    `load` checks names and types, where the message can say what was expected.
    """
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def load(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Return the config of `file.py`, `file.py:argument` or a recorded `config.json`.

    `overrides` are (dotted key, text) pairs of the command line. Raises `UserError` for a file
    that cannot be used, an unknown key, a wrong type or an invalid value.
    """
    is_recorded = spec.endswith(".json")
    values = _read_json(spec) if is_recorded else _run_file(*_split_argument(spec))
    return from_values(values, overrides)


def from_values(values: dict[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Return the config of nested values, such as `default().to_dict()`, checked as `load` does."""
    values = copy.deepcopy(values)
    for key, text in overrides:
        _set(values, key, _parse(key, text))
    config = _build(Config, values, "")
    validate(config)
    return config


def to_json(config: Config) -> str:
    """Return the config as text that `load` can read."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """Return {"train.steps": 400000, ...}."""
    return {entry.key: get(config, entry.key) for entry in declared(Config)}


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (old value, new value)} where the two configs differ."""
    before = flatten(old)
    after = flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _split_argument(spec: str) -> tuple[str, str | None]:
    path, separator, argument = spec.partition(".py:")
    return (path + ".py", argument) if separator else (spec, None)


def _run_file(path: str, argument: str | None) -> dict[str, Any]:
    check(
        os.path.isfile(path),
        f"--config {path!r} does not exist; expected a file such as configs/digits.py",
    )
    try:
        module_spec = importlib.util.spec_from_file_location("sit_jax_config_file", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        config = module.get_config() if argument is None else module.get_config(argument)
        return config.to_dict()
    except UserError:
        raise
    except Exception as error:  # a config file runs any code, so it may raise any error
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be used as a config: {type(error).__name__}: {reason}"
        ) from error


def _read_json(path: str) -> dict[str, Any]:
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
    return _with_defaults(dataclasses.asdict(Config()), values)


def _with_defaults(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an old file, with settings that it lacks at their defaults."""
    merged = defaults | values
    for name, value in merged.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict):
            merged[name] = _with_defaults(defaults[name], value)
    return merged


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        values = values[part]
    values[leaf] = value


def _parse(key: str, text: str) -> Any:
    """Return the value that a flag's text stands for. A string setting takes the text as is."""
    types_by_key = {entry.key: entry.type for entry in declared(Config)}
    if key not in types_by_key:
        raise unknown_name("config key", key, types_by_key)
    kind = types_by_key[key]
    if kind is str or (kind == str | None and text.lower() != "none"):
        return text
    if kind == tuple[str, ...] and not text.startswith("("):
        return tuple(filter(None, text.split(",")))
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # _build reports that its type is wrong


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Return the dataclass `cls` made from a dict that must have exactly its keys."""
    types_by_name: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(cls)}
    for name in values:
        if name not in types_by_name:
            keys = [entry.key for entry in declared(cls, prefix)]
            raise unknown_name("config key", prefix + name, keys)
    arguments = {}
    for name, kind in types_by_name.items():
        key = prefix + name
        check(name in values, f"config key {key} is missing; start from sit_jax.config.default()")
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if is_section and isinstance(values[name], dict):
            arguments[name] = _build(kind, values[name], f"{key}.")
        else:
            arguments[name] = _typed(key, kind, values[name])
    return cls(**arguments)


_ELEMENTS = {
    int: "whole numbers such as 3,1,4",
    float: "numbers such as 0.1,0.9",
    str: "names such as a,b",
}
_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _typed(key: str, kind: Any, value: Any) -> Any:
    """Return the value as `kind`. Raises `UserError` if it is of another type."""
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _typed(key, typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        return _typed_tuple(key, typing.get_args(kind)[0], value)
    if kind is float and type(value) is int:
        return float(value)
    expected = _EXPECTED.get(kind, f"the {key} settings")
    check(type(value) is kind, f"{key} is {value!r}; expected {expected}")
    return value


def _typed_tuple(key: str, element: type, value: Any) -> tuple[Any, ...]:
    elements = value if isinstance(value, tuple | list) else (value,)
    allowed = (int, float) if element is float else (element,)
    check(
        all(type(v) in allowed for v in elements),
        f"{key} is {value!r}; expected a list of {_ELEMENTS[element]}",
    )
    return tuple(map(element, elements))
