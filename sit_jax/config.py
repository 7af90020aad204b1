"""Every setting there is, with its default, and the only reader of ConfigDict.

A config file starts from `default()`, changes values and returns it from `get_config()`. `load` turns it, with the
command line's overrides, into the frozen dataclasses below, and refuses a key that is not here, a wrong type and an
impossible value.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from etils import epath

from sit_jax import sharding
from sit_jax.data import sources
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.latents import CODECS
from sit_jax.models import sit, sizes
from sit_jax.optimizer import SCHEDULES
from sit_jax.sampling import ode, sde
from sit_jax.sampling.guidance import check_scale
from sit_jax.transport import diffusion, interval, losses, paths, prediction, times


@dataclasses.dataclass(frozen=True)
class Model:
    name: str = "SiT-S/2"  # one of the twelve published sizes; the next four replace its fields where given
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch: int | None = None
    qk_norm: bool = False  # RMSNorm of queries and keys: steadier in bfloat16; the published weights have none
    learn_sigma: bool = False  # twice the output channels, half of them unused: the published weights are so
    remat: str = "dots"  # what the backward pass keeps: none: all; dots: the matmuls' outputs; full: nothing


@dataclasses.dataclass(frozen=True)
class Transport:
    path: str = "Linear"  # Linear | GVP | VP
    prediction: str = "velocity"  # velocity | score | noise
    loss_weight: str = "none"  # none | velocity | likelihood (score and noise only)
    train_eps: float | None = None  # distance from singular times, inside (0, 0.5); None: the path's default
    sample_eps: float | None = None
    times: str = "uniform"  # uniform | logit-normal
    times_mean: float = 0.0  # of the logit
    times_std: float = 1.0


@dataclasses.dataclass(frozen=True)
class Data:
    source: str = "digits"  # digits | folder
    path: str | None = None  # folder: the folder of class folders
    split: str = "all"  # digits: train | test | all; folder: all
    image_size: int = 8
    channels: int = 1
    classes: int = 10
    flip: bool = False  # random horizontal flip
    skip_unreadable: bool = False  # pass over images that cannot be read (counted and reported) instead of stopping
    workers: int = 0  # reader processes; 0 reads in threads, which suits in-memory and small sources


@dataclasses.dataclass(frozen=True)
class Latents:
    codec: str = "pixels"  # what the network sees of an image


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 400_000
    batch: int = 256  # images per step, over all devices and accumulated microbatches
    accumulation: int = 1  # microbatches per step
    label_dropout: float = 0.1  # share of labels replaced by the null label
    skip_nonfinite: int = 0  # updates with a NaN or infinite loss or gradient to pass over before the run stops
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    schedule: str = "constant"  # constant | cosine, after the warm-up
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None  # global gradient norm


@dataclasses.dataclass(frozen=True)
class Sample:
    weights: str = "ema"  # ema | raw
    solver: str = "dopri5"  # ODE: euler midpoint heun ralston bosh3 tsit5 dopri5 dopri8
    #                         SDE: euler-maruyama reference-heun sra1 shark
    steps: int | None = None  # fixed steps; None: bosh3, tsit5, dopri5 and dopri8 choose theirs by atol and rtol
    time_shift: float = 1.0  # s of t' = s t / (1 + (s - 1) t) for an ODE's fixed steps; above 1: more steps near data
    atol: float = 1e-6
    rtol: float = 1e-3
    error_norm: str = "sample"  # sample: every sample has its own steps | batch: one error for all, as torchdiffeq
    diffusion_form: str = "SBDM"  # constant | SBDM | sigma | linear | decreasing | increasing-decreasing, for an SDE
    diffusion_norm: float = 1.0
    last_step: str = "mean"  # none | mean | tweedie | euler: noiseless, after an SDE's steps
    last_step_size: float = 0.04
    cfg_scale: float = 1.0  # classifier-free guidance; 1 is none
    cfg_channels: int | None = 3  # guide the first channels only, as published numbers do; None: all
    cfg_interval: tuple[float, ...] = (0.0, 1.0)  # guide at these times only
    count: int = 64
    batch: int = 64
    labels: tuple[int, ...] = ()  # repeated in turn to `count`; empty: balanced over the classes
    seed: int = 0
    columns: int = 10  # of the sheet
    scale: int = 1  # of the sheet: enlargement by whole pixels


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 50_000  # steps
    keep_last: int = 2
    keep_every: int | None = None  # also keep, for ever, those at multiples of this


@dataclasses.dataclass(frozen=True)
class Log:
    every: int = 100  # steps
    sheet_every: int = 10_000  # steps between EMA sample sheets; 0: none
    sheet_count: int = 64  # images on a sheet
    tensorboard: bool = True
    wandb_project: str | None = None  # log to Weights & Biases under this project


@dataclasses.dataclass(frozen=True)
class Precision:
    compute: str = (
        "float32"  # float32 | bfloat16: activations and matmuls; parameters, norms, softmax and loss stay float32
    )
    matmul: str | None = None  # default | high | highest; None: default when training, highest when sampling


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1  # devices along each axis; -1 takes what the others leave
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    model: Model = Model()
    transport: Transport = Transport()
    data: Data = Data()
    latents: Latents = Latents()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    sample: Sample = Sample()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()


# What may differ between a run's start and its continuation: none of these changes the function that is being learned.
CHANGEABLE = (
    "train.steps", "train.skip_nonfinite", "data.path", "data.workers", "data.skip_unreadable", "model.remat",
    "optimizer.learning_rate", "transport.sample_eps", "sample.", "checkpoint.", "log.", "mesh.",
)  # fmt: skip
# What a finished run's weights mean: other modes may change all the rest.
NETWORK = (
    "model.",
    "transport.path",
    "transport.prediction",
    "data.image_size",
    "data.channels",
    "data.classes",
    "latents.",
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
    return {key: _get(config, key) for key, _ in _fields(Config)}


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), where they differ."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def validate(config: Config) -> None:
    """`UserError` for a name that is in no table or a value that cannot be."""
    model, transport, data, train, sample = config.model, config.transport, config.data, config.train, config.sample
    for key in _POSITIVE:
        value = _get(config, key)
        check(value is None or value > 0, f"{key} is {value}; expected more than 0")
    for key in _NOT_NEGATIVE:
        check(_get(config, key) >= 0, f"{key} is {_get(config, key)}; expected 0 or more")
    size = sizes.size_by_name(model.name, depth=model.depth, width=model.width, heads=model.heads, patch=model.patch)
    _one_of("model.remat", model.remat, sit.REMAT_POLICIES)
    paths.path_by_name(transport.path)
    prediction.check_prediction(transport.prediction)
    losses.check_weight(transport.loss_weight, transport.prediction)
    interval.check_eps("transport.train_eps", transport.train_eps)
    interval.check_eps("transport.sample_eps", transport.sample_eps)
    _one_of("transport.times", transport.times, times.DISTRIBUTIONS)
    _one_of("data.source", data.source, sources.SOURCES)
    _one_of("latents.codec", config.latents.codec, CODECS)
    sizes.tokens(CODECS[config.latents.codec].shape((data.image_size, data.image_size, data.channels))[0], size.patch)
    _one_of("optimizer.schedule", config.optimizer.schedule, SCHEDULES)
    _one_of("sample.weights", sample.weights, ("ema", "raw"))
    _check_sampler(sample)
    _one_of("precision.compute", config.precision.compute, ("float32", "bfloat16"))
    if config.precision.matmul is not None:
        _one_of("precision.matmul", config.precision.matmul, ("default", "high", "highest"))
    for key in ("seed", "sample.seed"):
        check(_get(config, key) < 2**32, f"{key} is {_get(config, key)}; expected less than 2**32")
    for key in ("train.label_dropout", "train.ema_decay", "optimizer.b1", "optimizer.b2"):
        check(0 <= _get(config, key) <= 1, f"{key} is {_get(config, key)}; expected a number from 0 to 1")
    check(
        train.batch % train.accumulation == 0,
        f"train.batch {train.batch} is not divisible by train.accumulation {train.accumulation}; change either",
    )
    for label in sample.labels:
        check(
            0 <= label < data.classes, f"sample.labels holds {label}; expected 0 to {data.classes - 1} (data.classes)"
        )
    sharding.check_axes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def _check_sampler(sample: Sample) -> None:
    _one_of("sample.solver", sample.solver, [*ode.SOLVERS, *sde.SOLVERS])
    if sample.solver in sde.SOLVERS:
        check(sample.steps is not None, f"sample.solver {sample.solver!r} needs sample.steps, such as 250")
    else:
        ode.check_solver(sample.solver, sample.steps)
    _one_of("sample.error_norm", sample.error_norm, ode.ERROR_NORMS)
    _one_of("sample.diffusion_form", sample.diffusion_form, diffusion.FORMS)
    _one_of("sample.last_step", sample.last_step, sde.LAST_STEPS)
    size = sample.last_step_size
    check(0 < size < 1, f"sample.last_step_size is {size}; expected a number inside (0, 1), or sample.last_step=none")
    check_scale(sample.cfg_scale)
    low_high = sample.cfg_interval
    check(
        len(low_high) == 2 and 0 <= low_high[0] < low_high[1] <= 1,
        f"sample.cfg_interval is {low_high}; expected two times with 0 <= first < last <= 1",
    )


_POSITIVE = """
    data.image_size data.channels data.classes train.steps train.batch train.accumulation optimizer.learning_rate
    optimizer.eps optimizer.clip_norm transport.times_std sample.steps sample.time_shift sample.atol sample.rtol
    sample.diffusion_norm sample.cfg_channels sample.count sample.batch sample.columns sample.scale checkpoint.every
    checkpoint.keep_last checkpoint.keep_every log.every log.sheet_count
""".split()
_NOT_NEGATIVE = """
    seed data.workers train.skip_nonfinite optimizer.warmup_steps optimizer.weight_decay sample.seed log.sheet_every
""".split()


def _one_of(key: str, value: str, known) -> None:
    if value not in known:
        raise unknown_name(key, value, known)


def _split_argument(spec: str) -> tuple[str, str | None]:
    path, found, argument = spec.partition(".py:")
    return (path + ".py", argument) if found else (spec, None)


def _run_file(path: str, argument: str | None) -> dict:
    check(os.path.isfile(path), f"--config {path!r} does not exist; expected a file such as configs/digits.py")
    try:
        module_spec = importlib.util.spec_from_file_location("sit_jax_config_file", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return (module.get_config() if argument is None else module.get_config(argument)).to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever is wrong in the file, the reader wants the file's name and the reason
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be used as a config: {type(error).__name__}: {reason}") from error


def _read_json(path: str) -> dict:
    try:
        values = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a recorded config ({error}); give --config") from error
    check(isinstance(values, dict), f"{path} cannot be read as a recorded config (it holds no settings); give --config")
    return _over(dataclasses.asdict(Config()), values)


def _over(defaults: dict, values: dict) -> dict:
    """values, with the settings that are newer than the file at their defaults."""
    both = defaults | values
    return {
        k: _over(defaults[k], v) if isinstance(v, dict) and isinstance(defaults.get(k), dict) else v
        for k, v in both.items()
    }


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _set(values: dict, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        values = values[part]
    values[leaf] = value


def _parse(key: str, text: str) -> Any:
    """The value that a command line's text stands for; text stays text where the setting is a string."""
    known = dict(_fields(Config))
    if key not in known:
        raise unknown_name("config key", key, known)
    if known[key] is str or (known[key] == str | None and text.lower() != "none"):
        return text
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
            raise unknown_name("config key", prefix + name, [key for key, _ in _fields(cls, prefix)])
    for name in names:
        check(name in values, f"config key {prefix + name} is missing; start from sit_jax.config.default()")
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
        element, several = typing.get_args(kind)[0], value if isinstance(value, (tuple, list)) else (value,)
        example = "whole numbers such as 3,1,4" if element is int else "numbers such as 0.1,0.9"
        check(all(type(v) in (int, element) for v in several), f"{key} is {value!r}; expected a list of {example}")
        return tuple(map(element, several))
    if kind is float and type(value) is int:
        return float(value)
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}.get(
        kind, f"the {key} settings"
    )
    check(type(value) is kind, f"{key} is {value!r}; expected {wanted}")
    return value
