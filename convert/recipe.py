"""Translate a PyTorch SiT run's arguments and optimizer settings to our settings, and back."""

from collections.abc import Mapping
from typing import Any

from sit_jax.models.sizes import SIZES, Size
from sit_jax.settings import Config, get

# The reference training script's own values, for everything that a file does not record.
# train.steps is its 1400 epochs of ImageNet.
REFERENCE = {
    "data.source": "folder",
    "data.split": "all",
    "data.flip": True,
    "data.workers": 4,
    "train.steps": 7_000_000,
    "train.batch": 256,
    "train.label_dropout": 0.1,
    "train.ema_decay": 0.9999,
    "checkpoint.every": 50_000,
    "log.sheet_every": 10_000,
    "sample.cfg_scale": 4.0,
}
# The reference's argument -> our setting.
ARGUMENTS = {
    "path_type": "transport.path",
    "prediction": "transport.prediction",
    "loss_weight": "transport.loss_weight",
    "train_eps": "transport.train_eps",
    "sample_eps": "transport.sample_eps",
    "global_batch_size": "train.batch",
    "global_seed": "seed",
    "data_path": "data.path",
    "num_workers": "data.workers",
    "log_every": "log.every",
    "ckpt_every": "checkpoint.every",
    "sample_every": "log.sheet_every",
    "cfg_scale": "sample.cfg_scale",
    "class_dropout_prob": "train.label_dropout",
}
# Stable Diffusion's autoencoder makes one latent cell of 4 channels from 8 x 8 pixels.
_CODEC = "sd-vae"
_CELL = 8
_LATENT_CHANNELS = 4


def pixels_per_cell(channels: int) -> int:
    """Return the image pixels along one side of an input cell: an input of 4 channels is latent."""
    return _CELL if channels == _LATENT_CHANNELS else 1


def input_settings(side: int, channels: int) -> dict[str, Any]:
    """Return the settings that give the network an input of [side, side, channels]."""
    if channels == _LATENT_CHANNELS:
        return {"latents.codec": _CODEC, "data.image_size": side * _CELL, "data.channels": 3}
    return {"latents.codec": "pixels", "data.image_size": side, "data.channels": channels}


def size_settings(name: str, size: Size) -> dict[str, Any]:
    """Return the size's settings: a published name, and the fields of `size` that differ."""
    published = vars(SIZES[name])
    overrides = {
        f"model.{field}": None if value == published[field] else value
        for field, value in vars(size).items()
    }
    return {"model.name": name, **overrides}


def from_args(args: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return our settings of a run with these arguments and AdamW settings (empty: not recorded).

    Arguments that the reference ignores become their defaults.
    """
    recorded = {ours: args[theirs] for theirs, ours in ARGUMENTS.items() if theirs in args}
    settings = REFERENCE | recorded
    path = settings.get("transport.path", "Linear")
    prediction = settings.get("transport.prediction", "velocity")
    if prediction == "velocity":
        # The reference then ignores the loss weight and, except for VP, both eps.
        settings["transport.loss_weight"] = "none"
        if path != "VP":
            settings |= {"transport.train_eps": None, "transport.sample_eps": None}
    settings["transport.loss_weight"] = settings.get("transport.loss_weight") or "none"
    return settings | (optimizer_settings(optimizer) if optimizer else {})


def optimizer_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return our settings of the group of an AdamW."""
    b1, b2 = group["betas"]
    return {
        "optimizer.learning_rate": group["lr"],
        "optimizer.b1": b1,
        "optimizer.b2": b2,
        "optimizer.eps": group["eps"],
        "optimizer.weight_decay": group["weight_decay"],
    }


def arguments(config: Any) -> dict[str, Any]:
    """Return the reference's arguments of settings that have one each."""
    args = {theirs: get(config, ours) for theirs, ours in ARGUMENTS.items()}
    if args["loss_weight"] == "none":
        args["loss_weight"] = None
    return args


def to_args(config: Config, size: Size, image_size: int) -> dict[str, Any]:
    """Return the reference's arguments of a run with this config.

    They lack `model` if the reference has no name for the size.
    """
    args = arguments(config) | {"image_size": image_size, "num_classes": config.data.classes}
    names = [name for name, published in SIZES.items() if published == size]
    if names:
        args["model"] = names[0]
    return args
