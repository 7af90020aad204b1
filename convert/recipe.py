"""The config of a PyTorch SiT run: its arguments and optimizer settings as our settings, and back."""

from typing import Any

from convert.checkpoint_file import Architecture
from sit_jax.models.sizes import SIZES, Size
from sit_jax.settings import Config, get

# What the reference's training script does where a file does not say; train.steps is its 1400 epochs of ImageNet.
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
# The reference's argument <-> our setting.
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
}
_CODEC, _CELL, _LATENT_CHANNELS = (
    "sd-vae",
    8,
    4,
)  # the SD-VAE: 8 x 8 pixels a latent cell of 4 channels


def pixels_per_cell(channels: int) -> int:
    """Image pixels along one side of a cell of the network's input: what sees 4 channels sees latents."""
    return _CELL if channels == _LATENT_CHANNELS else 1


def input_settings(side: int, channels: int) -> dict[str, Any]:
    """The settings by which the network sees [side, side, channels]."""
    if channels == _LATENT_CHANNELS:
        return {"latents.codec": _CODEC, "data.image_size": side * _CELL, "data.channels": 3}
    return {"latents.codec": "pixels", "data.image_size": side, "data.channels": channels}


def network_settings(name: str, size: Size, found: Architecture) -> dict[str, Any]:
    """The settings of the network: a known name where all of it is, its parts otherwise."""
    known = vars(SIZES[name])
    parts = {
        f"model.{part}": None if value == known[part] else value
        for part, value in vars(size).items()
    }
    return {
        "model.name": name,
        **parts,
        "model.learn_sigma": found.learn_sigma,
        "data.classes": found.classes,
        **input_settings(found.side, found.channels),
    }


def from_args(args: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """Our settings of a run with these arguments and AdamW settings, as the reference understands them."""
    found = {ours: args[theirs] for theirs, ours in ARGUMENTS.items() if theirs in args}
    settings = REFERENCE | found
    path, prediction = (
        settings.get("transport.path", "Linear"),
        settings.get("transport.prediction", "velocity"),
    )
    if (
        prediction == "velocity"
    ):  # its loss weight does nothing there, and for these paths its eps neither
        settings["transport.loss_weight"] = "none"
        if path != "VP":
            settings |= {"transport.train_eps": None, "transport.sample_eps": None}
    settings["transport.loss_weight"] = settings.get("transport.loss_weight") or "none"
    if optimizer:
        settings["optimizer.b1"], settings["optimizer.b2"] = optimizer["betas"]
        settings["optimizer.learning_rate"] = optimizer["lr"]
        settings |= {f"optimizer.{key}": optimizer[key] for key in ("eps", "weight_decay")}
    return settings


def to_args(config: Config, size: Size, image_size: int) -> dict[str, Any]:
    """The reference's arguments of a run with this config; no model where the reference has no name for the size."""
    args = {theirs: get(config, ours) for theirs, ours in ARGUMENTS.items()}
    args["loss_weight"] = None if args["loss_weight"] == "none" else args["loss_weight"]
    names = [name for name, known in SIZES.items() if known == size]
    args |= {"image_size": image_size, "num_classes": config.data.classes}
    return args | ({"model": names[0]} if names else {})
