"""Read a PyTorch SiT checkpoint, in any of its formats, and infer the network from its tensors."""

import argparse
import dataclasses
import json
import math
import pickle
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from convert import plain_pickle
from convert import record as record_lib
from convert.names import LABEL_TABLE, POSITION, entries, unwrapped
from convert.record import Record
from convert.torch_file import Tensor, in_memory, read_torch_file
from sit_jax.errors import UserError, check
from sit_jax.models.sizes import SIZES, Size

PARTS = ("model", "ema", "opt", "args")  # of a training checkpoint
_REQUIRED_PARTS = ("model", "ema", "opt")
_PART_OF_WEIGHTS = {"ema": "ema", "raw": "model"}  # --weights -> part

CHANNELS = (1, 3, 4)  # of pixels, and of Stable Diffusion's latents
_PATCHES = "x_embedder.proj.weight"
_OUTPUT = "final_layer.linear.weight"
_RANKS = {
    POSITION: 3,
    _PATCHES: 4,
    LABEL_TABLE: 2,
    _OUTPUT: 2,
}  # of the tensors that reveal the network
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": np.bool_,
}  # name in safetensors -> dtype
_FLOATS = [np.dtype(_DTYPES[name]) for name in ("F32", "F16", "BF16", "F64")]
_MAX_HEADER = plain_pickle.MAX_BYTES  # of safetensors: names, shapes and the record

StateDict = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class AdamWMoments:
    """AdamW's state: the step count, both moments as state dicts, and the group's settings.

    The settings are lr, betas, eps and weight_decay.
    """

    count: int
    exp_avg: StateDict
    exp_avg_sq: StateDict
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """The content of a checkpoint. A file with one set of weights has only `ema`."""

    ema: StateDict
    model: StateDict | None
    opt: Any  # as AdamW.state_dict() returned it; `read_moments` reads it
    args: dict[str, Any]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # ours, which args lack
    notes: tuple[str, ...] = ()  # a line for the user on each change and choice
    record: Record | None = None  # what convert.to_torch stored


@dataclasses.dataclass(frozen=True)
class SiTArchitecture:
    """A network's dimensions, except the number of heads: no tensor's shape depends on it."""

    depth: int
    width: int
    patch: int
    side: int  # of the square input: pixels, or latent cells
    channels: int
    classes: int
    learn_sigma: bool

    def size(self, heads: int | None) -> tuple[str, Size]:
        """Return (name, size): the published name that fits, else "SiT-S/2" as a base to override.

        Without `heads`, the number of heads is that of the published size. Raises UserError if the
        network has no published size and `heads` is None.
        """
        for name, published in SIZES.items():
            if (published.depth, published.width, published.patch) == (
                self.depth,
                self.width,
                self.patch,
            ):
                return name, dataclasses.replace(published, heads=heads or published.heads)
        if not heads:
            raise UserError(
                f"depth {self.depth}, width {self.width}, patch {self.patch} is not a published "
                "size, and the tensors do not show the number of heads; give --num_heads"
            )
        return "SiT-S/2", Size(self.depth, self.width, heads, self.patch)


def read(path: str, weights: str | None = None) -> CheckpointFile:
    """Return the content of a `.pt` or `.safetensors` file; tensors are read when they are used.

    `weights` ("ema" or "raw") takes only these weights of a training checkpoint.

    Raises UserError if the file holds no state dict, or an incomplete training checkpoint.
    """
    content: Any
    args: Any = {}
    if _is_safetensors(path):
        content, args = _read_safetensors(path)
    else:
        content = read_torch_file(path)
    check(
        isinstance(content, Mapping) and content,
        f"{path} holds {type(content).__name__}, not a state dict; expected tensors by name, or "
        "{model, ema, opt, args} as the reference's train.py saves them",
    )
    parts: dict[str, Any] = {
        part: content[part] for part in PARTS if not isinstance(content.get(part), Tensor | None)
    }
    args, notes = _as_dict(parts.get("args", args))
    model, opt = None, None
    if not weights and (key := _only_state_dict(path, content, parts)):
        ema = _state_dict(f"{key} of {path}", content[key])
        notes += (f"the file's one state dict, {key!r}, is converted",)
    elif not parts:
        check(not weights, f"{path} holds only one set of weights; leave --weights out")
        ema = _state_dict(path, content)
    elif weights:
        part = _PART_OF_WEIGHTS[weights]
        _check_complete(path, parts, (part,))
        ema = _state_dict(f"{part} of {path}", parts[part])
    else:
        _check_complete(path, parts, _REQUIRED_PARTS)
        model = _state_dict(f"model of {path}", parts["model"])
        ema = _state_dict(f"ema of {path}", parts["ema"])
        opt = parts["opt"]
    record = record_lib.read(path, args.get(record_lib.KEY))
    return CheckpointFile(ema, model, opt, args, notes=notes, record=record)


def _is_safetensors(path: str) -> bool:
    """Return whether a file is of safetensors by its suffix, or by its start: a size, then JSON."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.lower().endswith(".safetensors") or start[8:] == b"{"


def _only_state_dict(path: str, content: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
    """Return the key of the state dict that a file wraps, as {"state_dict": ..., "epoch": 3} does.

    Returns None for a bare state dict and for a training checkpoint, complete or not.

    Raises UserError if there are several.
    """
    keys = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    ]
    is_bare = not keys or any(isinstance(value, Tensor) for value in content.values())
    of_training = [part for part in _PART_OF_WEIGHTS.values() if part in parts]
    if is_bare or (of_training and (len(parts) > 1 or keys != of_training)):
        return None
    check(
        len(keys) == 1,
        f"{path} holds several state dicts: {', '.join(map(str, keys[:4]))}; save one of them",
    )
    return keys[0]


def _as_dict(args: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return args by name, and a note if they have none."""
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, Mapping):
        return dict(args), ()
    return {}, (f"args is a {type(args).__name__}, not a Namespace or a dict: it is not used",)


def _check_complete(path: str, parts: Mapping[str, Any], required: tuple[str, ...]) -> None:
    missing = [part for part in required if part not in parts]
    if not missing:
        return
    usable = [weights for weights, part in _PART_OF_WEIGHTS.items() if part in parts]
    remedy = f", or take only its weights with --weights {' or '.join(usable)}" if usable else ""
    raise UserError(
        f"{path} is an incomplete training checkpoint: it has no {' and no '.join(missing)}, "
        f"expected model, ema, opt and args; get the complete file{remedy}"
    )


def infer_architecture(path: str, tensors: StateDict) -> SiTArchitecture:
    """Return the architecture that the tensors' shapes reveal.

    Raises UserError if they belong to another kind of network.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    missing = [name for name, rank in _RANKS.items() if len(shapes.get(name, ())) != rank]
    check(
        not missing,
        f"{path} is not a SiT: it has no {' and no '.join(missing)}, but {len(shapes)} tensors "
        f"such as {', '.join(list(shapes)[:2])}",
    )
    width, channels, patch, _ = shapes[_PATCHES]
    tokens = shapes[POSITION][1]
    grid = math.isqrt(tokens)
    check(
        grid**2 == tokens,
        f"{path}: {POSITION} has shape {list(shapes[POSITION])}; expected a square number of "
        f"tokens, not {tokens}",
    )
    check(
        channels in CHANNELS,
        f"{path}: {_PATCHES} takes {channels} channels; expected 1 or 3, pixels, or 4, latents of "
        "Stable Diffusion's autoencoder: there is no codec for other latents yet",
    )
    features = patch**2 * channels
    out_features = shapes[_OUTPUT][0]
    check(
        out_features in (features, 2 * features),
        f"{path}: {_OUTPUT} has shape {list(shapes[_OUTPUT])}, expected [{features}, {width}], "
        f"or [{2 * features}, {width}] with learn_sigma",
    )
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return SiTArchitecture(
        depth=len(blocks),
        width=width,
        patch=patch,
        side=grid * patch,
        channels=channels,
        classes=shapes[LABEL_TABLE][0] - 1,  # the last row is the null label's
        learn_sigma=out_features == 2 * features,
    )


def _read_safetensors(path: str) -> tuple[StateDict, dict[str, Any]]:
    """Return the tensors, and {KEY: record} if convert.to_torch wrote the file, else {}."""
    try:
        with open(path, "rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > _MAX_HEADER:
            raise ValueError(f"its header claims {header} bytes")
        file = safetensors.safe_open(path, "numpy")
        names = file.keys()
        tensors = {}
        for name in names:
            plain_pickle.check_key(name)
            tensors[name] = _lazy_tensor(file, name)
        record = json.loads((file.metadata() or {}).get(record_lib.KEY, "null"))
    except (
        OSError,
        ValueError,
        RecursionError,
        pickle.UnpicklingError,
        safetensors.SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is not a readable safetensors file ({reason}); get the complete file"
        ) from error
    return tensors, {record_lib.KEY: record} if record else {}


def _lazy_tensor(file: Any, name: str) -> Tensor:
    header = file.get_slice(name)
    kind = header.get_dtype()
    if kind not in _DTYPES:
        raise ValueError(f"{name} is of type {kind}")
    return Tensor(
        shape=tuple(header.get_shape()),
        dtype=np.dtype(_DTYPES[kind]),
        read=lambda: file.get_tensor(name),
    )


def _state_dict(source: str, entry: Any) -> StateDict:
    """Return an entry's tensors by their plain names, without the prefixes of wrappers.

    Each tensor's values are checked when they are read. `source` names the entry in messages.

    Raises UserError if the entry is not a state dict.
    """
    check(
        isinstance(entry, Mapping) and entry,
        f"{source} is not a state dict; expected tensors by name",
    )
    others = [str(name) for name, value in entry.items() if not isinstance(value, Tensor)]
    check(
        not others,
        f"{source} is not a state dict: {', '.join(others[:4])} is not a tensor; "
        "expected tensors by name",
    )
    tensors = {str(name): tensor for name, tensor in entry.items()}
    return {
        plain: _checked(source, plain, tensors[name])
        for name, plain in unwrapped(source, tensors).items()
    }


def check_types(source: str, tensors: StateDict) -> None:
    """Raise UserError unless all tensors are of float32, or of another type of this precision."""
    for name, tensor in tensors.items():
        check(
            tensor.dtype in _FLOATS,
            f"{source}: {name} holds {tensor.dtype} numbers; expected float32, float16, bfloat16 "
            "or float64; quantised weights are not converted, take the ones they were made from",
        )


def _checked(source: str, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor as float32, whose `read` raises UserError for NaN or infinity."""

    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # of float64, whose infinity is refused below
            values = tensor.read().astype(np.float32, copy=False)
        # The extremes show any NaN or infinity, without a temporary array in the usual case.
        extremes = [values.min(initial=0), values.max(initial=0)]
        if not np.isfinite(extremes).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise UserError(
                f"{source}: {name} holds {bad} NaN or infinite values of {values.size}; "
                "use an earlier checkpoint"
            )
        return values

    return Tensor(tensor.shape, tensor.dtype, read)


def read_moments(path: str, opt: Any, model: StateDict, depth: int) -> AdamWMoments:
    """Return AdamW's state from `opt`, whose parameters are numbered in the model's order.

    pos_embed is not trained, so AdamW has no state for it; its moments are zeros here.

    Raises UserError if `opt` is incomplete, or the state of a variant of AdamW.
    """
    names = [name for name, *_ in entries(depth)]
    try:
        (settings,) = opt["param_groups"]
        number_of = dict(zip(names, settings["params"], strict=True))
        trained = {
            name: opt["state"][number] for name, number in number_of.items() if name != POSITION
        }
        (count,) = {int(np.asarray(entry["step"])) for entry in trained.values()}
        group: dict[str, Any] = {
            key: float(np.asarray(settings[key])) for key in ("lr", "eps", "weight_decay")
        }
        b1, b2 = settings["betas"]
        group |= {"betas": (float(b1), float(b2))}
        zeros = in_memory(np.zeros(model[POSITION].shape, np.float32))
        moments: dict[str, StateDict] = {}
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = {POSITION: zeros} | {
                name: _checked(f"opt of {path}", f"{key} of {name}", entry[key])
                for name, entry in trained.items()
            }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"opt of {path} is not the complete AdamW state of this model "
            f"({type(error).__name__}: {error}); expected one group of {len(names)} parameters "
            f"with step, exp_avg and exp_avg_sq for all but {POSITION}; "
            "or take only the weights with --weights ema or raw"
        ) from error
    unsupported = [name for name in ("amsgrad", "maximize") if settings.get(name)]
    check(
        not unsupported,
        f"opt of {path} uses {' and '.join(unsupported)}; expected plain AdamW; "
        "take only the weights with --weights ema or raw",
    )
    return AdamWMoments(
        count=count,
        exp_avg=moments["exp_avg"],
        exp_avg_sq=moments["exp_avg_sq"],
        settings=group,
    )
