"""Reads a config file and the command line into checked settings.

A config file starts from `default()`, changes values and returns it from `get_config()`. `load`
turns it, with the command line's overrides, into the frozen dataclasses of `sit_jax.settings`. It
refuses an unknown key, a wrong type and an invalid value. No other module reads a ConfigDict.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError, brief, check, unknown_name
from sit_jax.laws import declared, user_path
from sit_jax.settings import Config, get
from sit_jax.validation import validate

# A group of settings lists keys, and sections with a full stop at the end; see `laws.in_group`.
# Settings that may change when a run is continued: none of them changes the function being learned.
CHANGEABLE = (
    "train.steps",
    "train.epochs",
    "train.skip_nonfinite",
    "train.accumulation",
    "train.ema_decay",
    "data.path",
    "data.workers",
    "data.read_ahead",
    "data.skip_unreadable",
    "data.max_pixels",
    "data.subset_seed",
    "latents.path",
    "latents.batch",
    "latents.matmul",
    "model.remat",
    "model.unroll",
    "model.attention",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "transport.sample_eps",
    "sample.",
    "likelihood.",
    "sweep.",
    "evaluate.",
    "excess.",
    "checkpoint.",
    "encode.",
    "log.",
    "precision.",
    "mesh.",
)
# Settings that the meaning of the network's input and output depends on.
SPACE = (
    "transport.path",
    "transport.prediction",
    "data.image_size",
    "data.channels",
    "data.classes",
    "latents.codec",
    "latents.scale",
)
# Settings that trained weights depend on. Modes other than train may change all others. Without
# label dropout the weights have no null label, whatever a flag says afterwards.
NETWORK = ("model.", "train.label_dropout", *SPACE)


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
    path, variant = _split_variant(spec)
    path = storage.expand("--config", path)
    values = _read_json(path) if path.endswith(".json") else _run_file(path, variant)
    return from_values(values, overrides)


def read_recorded(path: epath.PathLike) -> Config:
    """Return the config that a run recorded, only its types checked.

    A run of an earlier version may hold what `load` refuses today. Raises `UserError` for a file
    that cannot be read.
    """
    return _build(Config, _read_json(os.fspath(path)), "")


def from_values(values: dict[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Return the config of nested values, such as `default().to_dict()`, checked as `load` does."""
    values = {  # copied as deep as settings lie, so that the caller's stay as they are
        name: dict(value) if isinstance(value, dict) else value for name, value in values.items()
    }
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


def changes_since(recorded: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Return `changes` from the flat settings that a checkpoint has recorded as JSON.

    Settings that it lacks, because they are newer, had their defaults.
    """
    before = flatten(Config()) | {key: _from_json(value) for key, value in recorded.items()}
    after = flatten(config)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _split_variant(spec: str) -> tuple[str, str | None]:
    path, separator, variant = spec.partition(".py:")
    return (path + ".py", variant) if separator else (spec, None)


def _run_file(path: str, variant: str | None) -> dict[str, Any]:
    check(
        os.path.isfile(path),
        f"--config {path!r} does not exist; expected a file such as configs/digits.py",
    )
    check(
        variant != "", f"--config '{path}:' has an empty variant; leave out the colon, or name one"
    )
    place = path if variant is None else f"{path} with the variant {variant!r}"
    try:
        module_spec = importlib.util.spec_from_file_location("sit_jax_config_file", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        takes_variant = bool(inspect.signature(module.get_config).parameters)
        check(variant is None or takes_variant, f"{path} has no variants; give --config {path}")
        config = module.get_config() if variant is None else module.get_config(variant)
        return config.to_dict()
    except UserError:
        raise
    # A config file runs any code. It may raise any error, and it may call sys.exit(0): a script
    # would then take a job that never ran for a success. Ctrl-C still ends the program.
    except (Exception, SystemExit, GeneratorExit) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{place} cannot be used as a config: {type(error).__name__}: {reason}"
        ) from error


def _read_json(path: str) -> dict[str, Any]:
    """Return the values of a recorded config, and defaults for settings that it lacks."""
    remedy = (
        "repair it, or, if it is the config.json of a workdir, move it away and give the --config "
        "with which the run was started"
    )
    storage.check_reachable("--config", path)
    check(
        epath.Path(path).exists(), f"--config {path!r} does not exist; expected a recorded config"
    )
    try:
        values = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{path} cannot be read as a recorded config ({reason}); {remedy}"
        ) from error
    check(
        isinstance(values, dict),
        f"{path} cannot be read as a recorded config (it holds no settings); {remedy}",
    )
    values = _with_defaults(dataclasses.asdict(Config()), values)
    try:
        _build(Config, values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    return values


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
        return tuple(text.removesuffix(",").split(","))
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text  # not a value of Python; _build reports that its type is wrong


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Return the dataclass `cls` made from a dict that must have exactly its keys."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            keys = [entry.key for entry in declared(cls, prefix)]
            raise unknown_name("config key", prefix + name, keys)
    arguments = {}
    for name, field in fields.items():
        key = prefix + name
        kind: Any = field.type
        check(name in values, f"config key {key} is missing; start from sit_jax.config.default()")
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        if is_section and isinstance(values[name], dict):
            arguments[name] = _build(kind, values[name], f"{key}.")
        else:
            arguments[name] = _typed(key, kind, values[name])
            if field.metadata.get("law") is user_path and arguments[name] is not None:
                arguments[name] = storage.expand(key, arguments[name])
    return cls(**arguments)


_ELEMENTS = {
    int: "whole numbers such as 3,1,4",
    float: "finite numbers such as 0.1,0.9",
    str: "names such as a,b",
}
_EXPECTED = {int: "a whole number", float: "a finite number", str: "text", bool: "True or False"}


def _typed(key: str, kind: Any, value: Any) -> Any:
    """Return the value as `kind`. Raises `UserError` if it is of another type."""
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else _typed(key, typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        elements = value if isinstance(value, tuple | list) else (value,)
        check(
            all(_is(element, v) for v in elements),
            f"{key} is {brief(value)}; expected a list of {_ELEMENTS[element]}",
        )
        return tuple(map(element, elements))
    expected = _EXPECTED.get(kind, f"the {key} settings")
    check(_is(kind, value), f"{key} is {brief(value)}; expected {expected}")
    return float(value) if kind is float else value


def _is(kind: type, value: Any) -> bool:
    """Return True for a value of this type; a whole number is a number too, True is not.

    Infinity and NaN are not numbers here, nor is a whole number beyond the largest float.
    """
    if kind is not float or type(value) not in (int, float):
        return type(value) is kind
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
