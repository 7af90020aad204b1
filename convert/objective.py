"""The objective that a file's args name: SiT's is kept, REPA's is converted, others are refused.

The tensors of such files look alike, so only the args can tell.

REPA (Yu et al., arXiv 2410.06940) trains the same network, but from data at its time 0 to noise at
its time 1. With our time t its network is called at 1 - t, and its velocity has the opposite sign:
v(x, t) = -v_repa(x, 1 - t). Both changes are linear in the first and the last layer of the network,
so they go into the weights, exactly.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.checkpoint_file import CheckpointFile, StateDict
from convert.torch_file import Tensor
from sit_jax.errors import UserError, check
from sit_jax.models.embeddings import time_frequencies
from sit_jax.transport.losses import WEIGHTS
from sit_jax.transport.paths import PATHS
from sit_jax.transport.prediction import PREDICTIONS

# Start of a lower-case args.model -> what that network computes.
_OTHER_NETWORKS = {
    "dit": "a DiT predicts the noise at the steps 0 to 999 of a diffusion",
    "fastdit": "a DiT predicts the noise at the steps 0 to 999 of a diffusion",
    "mdt": "an MDT predicts the noise at the steps 0 to 999 of a diffusion",
    "u-vit": "a U-ViT predicts the noise at the steps 0 to 999 of a diffusion",
    "uvit": "a U-ViT predicts the noise at the steps 0 to 999 of a diffusion",
    "edm": "an EDM network is a preconditioned denoiser of another noise scale",
    "lightningdit": "a LightningDiT has other layers and another autoencoder's latents",
}
# Arguments of other recipes only -> what those train.
_OTHER_ARGUMENTS = {
    "noise_schedule": "a diffusion over discrete steps",
    "diffusion_steps": "a diffusion over discrete steps",
    "predict_xstart": "a diffusion over discrete steps",
    "precond": "an EDM denoiser",
}
# The values that args may have. The autoencoders are Stable Diffusion's, with the same latents.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "path_type": tuple(PATHS),
    "prediction": tuple(PREDICTIONS),
    "loss_weight": (None, *WEIGHTS),
    "vae": (None, "ema", "mse", "stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"),
}
_REPA_PATHS = {"linear": "Linear", "cosine": "GVP"}
_REPA_PREDICTION = "v"
_REPA_HEADS = "projectors."  # of its alignment with another network; no sample depends on them
# REPA's argument -> the reference's
_REPA_ARGUMENTS = {
    "model": "model",
    "num_classes": "num_classes",
    "batch_size": "global_batch_size",
    "seed": "global_seed",
    "cfg_prob": "class_dropout_prob",
}


def in_our_time(path: str, source: CheckpointFile) -> CheckpointFile:
    """Return a file's content as a SiT of the reference: REPA's with its time reversed.

    AdamW's moments cannot follow a change of the weights, so a file of REPA's loses them.

    Raises UserError if the args name another objective.
    """
    _check_network(path, source.args)
    has_heads = any(name.startswith(_REPA_HEADS) for name in source.ema)
    is_repa = source.args.get("path_type") in tuple(_REPA_PATHS)
    is_repa &= source.args.get("prediction") == _REPA_PREDICTION
    is_repa |= has_heads and not {"path_type", "prediction"} & source.args.keys()
    if not is_repa:
        _check_values(path, source.args)
        return _without_heads(source) if has_heads else source
    check(
        not source.args.get("qk_norm"),
        f"{path}: args.qk_norm is REPA's LayerNorm of queries and keys; model.qk_norm is an "
        "RMSNorm, so these weights cannot be converted",
    )
    source = _without_heads(source) if has_heads else source
    return dataclasses.replace(
        source,
        ema=reverse_time(source.ema),
        model=reverse_time(source.model) if source.model else None,
        opt=None,
        **_translated(source),
    )


def _translated(source: CheckpointFile) -> dict[str, Any]:
    """Return args, settings and notes of a file of REPA's."""
    given = source.args
    args = {ours: given[theirs] for theirs, ours in _REPA_ARGUMENTS.items() if theirs in given}
    repa_path = given.get("path_type", "linear")
    args |= {"path_type": _REPA_PATHS[repa_path], "prediction": "velocity"}
    settings = {}
    notes = [
        f"REPA's path {repa_path!r}, from data at t=0 to noise at t=1, becomes "
        f"{args['path_type']}, from noise to data: the weights now take 1 - t and give -v"
    ]
    if not given:
        notes.append(f"the file records no path; as it has {_REPA_HEADS}*, REPA's is assumed")
    if source.opt:
        notes.append("AdamW's moments do not fit the new weights: a new run, at step 0")
    times = given.get("weighting", "uniform")
    if (repa_path, times) == ("linear", "lognormal"):
        settings["transport.times"] = "logit-normal"
    elif times != "uniform":
        notes.append(
            f"REPA's training times {str(times)[:100]!r} on path {repa_path!r} have no setting "
            "here; uniform is recorded"
        )
    return {
        "args": args,
        "settings": source.settings | settings,
        "notes": (*source.notes, *notes),
    }


def reverse_time(weights: StateDict) -> StateDict:
    """Return the weights of the network (x, t) -> -network(x, 1 - t).

    The features of time are cos(f t) and sin(f t), for a vector f of frequencies. Those of 1 - t
    are cos(f) cos(f t) + sin(f) sin(f t) and sin(f) cos(f t) - cos(f) sin(f t).
    """
    frequencies = np.asarray(time_frequencies(), np.float64)
    cos, sin = np.cos(frequencies), np.sin(frequencies)

    def mixed(w_oi: np.ndarray) -> np.ndarray:
        of_cos, of_sin = np.split(w_oi.astype(np.float64), 2, axis=1)
        return np.concatenate([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], axis=1)

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "t_embedder.mlp.0.weight": mixed,
        "final_layer.linear.weight": np.negative,
        "final_layer.linear.bias": np.negative,
    }
    return weights | {
        name: _changed(weights[name], change)
        for name, change in changes.items()
        if name in weights  # a missing tensor is reported with all others
    }


def _changed(tensor: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Return a tensor whose values are changed, in float32, when they are read."""

    def read() -> np.ndarray:
        return change(tensor.read()).astype(np.float32)

    return dataclasses.replace(tensor, read=read)


def _without_heads(source: CheckpointFile) -> CheckpointFile:
    """Drop REPA's projectors."""

    def kept(weights: StateDict) -> StateDict:
        return {name: value for name, value in weights.items() if not name.startswith(_REPA_HEADS)}

    count = len(source.ema) - len(kept(source.ema))
    note = f"{count} tensors {_REPA_HEADS}* are dropped; REPA uses them in training only"
    return dataclasses.replace(
        source,
        ema=kept(source.ema),
        model=kept(source.model) if source.model else None,
        notes=(*source.notes, note),
    )


def _check_network(path: str, args: Mapping[str, Any]) -> None:
    """Raise UserError if the args are of another network or recipe than SiT's."""
    model = args.get("model")
    if model is not None and not str(model).lower().startswith("sit"):
        named = str(model).lower()
        reasons = (why for start, why in _OTHER_NETWORKS.items() if named.startswith(start))
        raise _refusal(path, "model", model, next(reasons, "it names another network"))
    for key, what in _OTHER_ARGUMENTS.items():
        if args.get(key) is not None:
            raise _refusal(path, key, args[key], f"it is of {what}")


def _check_values(path: str, args: Mapping[str, Any]) -> None:
    """Raise UserError for a value whose meaning is not known."""
    for key, values in _KNOWN.items():
        if key in args and args[key] not in values:
            known = ", ".join(map(str, values))
            repa = ""
            if key in ("path_type", "prediction"):
                repa = "; REPA's are path_type 'linear' or 'cosine' with prediction 'v'"
            raise _refusal(path, key, args[key], f"known: {known}{repa}")


def _refusal(path: str, key: str, value: Any, reason: str) -> UserError:
    return UserError(
        f"{path}: args.{key} is {str(value)[:100]!r}: {reason}; as a SiT of this project the "
        "weights would give wrong samples, so they are not converted"
    )
