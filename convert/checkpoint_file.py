"""What a PyTorch SiT checkpoint holds, and which network it is of, whatever form it came in."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from convert.names import LABEL_TABLE, POSITION, entries
from convert.torch_file import Tensor, in_memory, read_torch_file
from sit_jax.errors import UserError, check
from sit_jax.models.sizes import SIZES, Size

RECORD = "sit_jax"  # where convert.to_torch leaves the config and the step, in args or the metadata of safetensors
PARTS = ("model", "ema", "opt", "args")
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
}

StateDict = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Moments:
    """AdamW's state: the steps it has taken, its averages as state dicts, and the settings of its one group."""

    count: int
    exp_avg: StateDict
    exp_avg_sq: StateDict
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """A training checkpoint, or with ema alone a set of weights."""

    ema: StateDict
    model: StateDict | None
    opt: Any  # as AdamW.state_dict() gave it; `moments` reads it
    args: dict[str, Any]

    @property
    def record(self) -> dict[str, Any] | None:
        """What convert.to_torch recorded: {"step": int, "config": dict}."""
        record = self.args.get(RECORD)
        return (
            record if isinstance(record, Mapping) and {"step", "config"} <= record.keys() else None
        )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the tensors say of the network; the number of heads leaves no trace in them."""

    depth: int
    width: int
    patch: int
    side: int  # of the square input
    channels: int
    classes: int
    learn_sigma: bool

    def size(self, heads: int | None) -> tuple[str, Size]:
        """(nearest known name, size). `UserError` if the heads are neither known nor given."""
        known = {
            name: size
            for name, size in SIZES.items()
            if (size.depth, size.width, size.patch) == (self.depth, self.width, self.patch)
        }
        name = next(iter(known), "SiT-S/2")
        check(
            known or heads,
            f"the tensors do not show the number of heads, and depth {self.depth}, width {self.width}, patch "
            f"{self.patch} are of no known size; give --num_heads",
        )
        return name, Size(self.depth, self.width, heads or known[name].heads, self.patch)


def read(path: str, weights: str | None = None) -> CheckpointFile:
    """A `.pt` or `.safetensors` file. `weights` (ema, raw) takes these of a training checkpoint, and them alone.

    `UserError` if it holds no state dict or half of a training checkpoint.
    """
    content, args = (
        _read_safetensors(path) if path.endswith(".safetensors") else (read_torch_file(path), {})
    )
    check(
        isinstance(content, Mapping) and content,
        f"{path} holds {type(content).__name__}, no state dict",
    )
    parts = {
        part: content[part] for part in PARTS if not isinstance(content.get(part), Tensor | None)
    }
    if not parts:
        check(not weights, f"{path} holds one set of weights; leave --weights out")
        return CheckpointFile(_state_dict(path, content), None, None, args)
    args = parts.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    wanted = PARTS[:3] if weights is None else [{"ema": "ema", "raw": "model"}[weights]]
    if missing := [part for part in wanted if part not in parts]:
        there = "--weights " + " or ".join(
            w for w, part in (("ema", "ema"), ("raw", "model")) if part in parts
        )
        raise UserError(
            f"{path} is half of a training checkpoint: {', '.join(missing)} of model, ema, opt and args missing; "
            "bring the whole file"
            + (f", or take its weights alone with {there}" if there != "--weights " else "")
        )
    states = {
        part: _state_dict(f"{part} of {path}", parts[part]) for part in wanted if part != "opt"
    }
    if weights:
        return CheckpointFile(*states.values(), None, None, args)
    return CheckpointFile(states["ema"], states["model"], parts["opt"], args)


def architecture(path: str, tensors: StateDict) -> Architecture:
    """`UserError` if these are the tensors of something else."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    ranks = {
        POSITION: 3,
        "x_embedder.proj.weight": 4,
        LABEL_TABLE: 2,
        "final_layer.linear.weight": 2,
    }
    lacking = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    some = ", ".join(list(shapes)[:2])
    check(
        not lacking,
        f"{path} is no SiT: it has no {' and no '.join(lacking)}, but {len(shapes)} tensors as {some}",
    )
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    tokens, (labels, _), (out, _) = (
        shapes[name] for name in (POSITION, LABEL_TABLE, "final_layer.linear.weight")
    )
    grid = math.isqrt(tokens[1])
    check(
        grid**2 == tokens[1],
        f"{path}: {POSITION} has shape {list(tokens)}, whose {tokens[1]} tokens are no square",
    )
    features = patch**2 * channels
    check(
        out in (features, 2 * features),
        f"{path}: final_layer.linear.weight has shape {list(shapes['final_layer.linear.weight'])}, expected "
        f"[{features}, {width}], or [{2 * features}, {width}] with learn_sigma",
    )
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return Architecture(
        len(blocks), width, patch, grid * patch, channels, labels - 1, out == 2 * features
    )


def _read_safetensors(path: str) -> tuple[StateDict, dict[str, Any]]:
    try:
        file = safetensors.safe_open(path, "numpy")
        tensors = {name: _lazy(file, name) for name in file.keys()}
        args = json.loads((file.metadata() or {}).get(RECORD, "null"))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no readable safetensors file ({reason}); bring a whole one"
        ) from error
    return tensors, {RECORD: args} if args else {}


def _lazy(file: Any, name: str) -> Tensor:
    part = file.get_slice(name)
    return Tensor(
        tuple(part.get_shape()), np.dtype(_DTYPES[part.get_dtype()]), lambda: file.get_tensor(name)
    )


def _state_dict(what: str, entry: Any) -> StateDict:
    """The tensors of an entry by name, without DistributedDataParallel's prefix, each checked when it is read."""
    check(
        isinstance(entry, Mapping) and entry, f"{what} is no state dict; expected tensors by name"
    )
    others = [str(name) for name, value in entry.items() if not isinstance(value, Tensor)]
    check(
        not others,
        f"{what} is no state dict: {', '.join(others[:4])} is no tensor; expected tensors by name",
    )
    wrapped = all(str(name).startswith("module.") for name in entry)
    names = {
        str(name).removeprefix("module.") if wrapped else str(name): tensor
        for name, tensor in entry.items()
    }
    return {name: _checked(what, name, tensor) for name, tensor in names.items()}


def _checked(what: str, name: str, tensor: Tensor) -> Tensor:
    def read() -> np.ndarray:
        floating = tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16
        check(
            floating,
            f"{what}: {name} holds {tensor.dtype} numbers; expected float32, float16 or bfloat16",
        )
        values = tensor.read().astype(np.float32, copy=False)
        if not np.isfinite(
            [values.min(initial=0), values.max(initial=0)]
        ).all():  # no temporary while all is well
            bad = np.count_nonzero(~np.isfinite(values))
            raise UserError(
                f"{what}: {name} holds {bad} NaN or infinite values of {values.size}; bring an earlier file"
            )
        return values

    return Tensor(tensor.shape, tensor.dtype, read)


def moments(path: str, opt: Any, model: StateDict, depth: int) -> Moments:
    """AdamW's state, whose parameters are numbered in the model's order; pos_embed, never trained, has none: zeros.

    `UserError` if it is not whole.
    """
    names = [name for name, *_ in entries(depth)]
    try:
        (settings,), state = opt["param_groups"], opt["state"]
        numbered = dict(zip(names, settings["params"], strict=True))
        trained = {name: state[number] for name, number in numbered.items() if name != POSITION}
        (count,) = {int(np.asarray(entry["step"])) for entry in trained.values()}
        still = {POSITION: in_memory(np.zeros(model[POSITION].shape, np.float32))}
        averages = [
            still
            | {
                name: _checked(f"opt of {path}", f"{key} of {name}", entry[key])
                for name, entry in trained.items()
            }
            for key in ("exp_avg", "exp_avg_sq")
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"opt of {path} is not AdamW's whole state of this model ({type(error).__name__}: {error}); expected one "
            f"group of {len(names)} parameters with step, exp_avg and exp_avg_sq for all but {POSITION}, or take the "
            "weights alone with --weights ema or raw"
        ) from error
    unsupported = [name for name in ("amsgrad", "maximize") if settings.get(name)]
    check(
        not unsupported,
        f"opt of {path} uses {unsupported}, which is not plain AdamW; take --weights ema alone",
    )
    return Moments(
        count, *averages, {key: value for key, value in settings.items() if key != "params"}
    )
