"""Convert a PyTorch SiT checkpoint into a workdir to sample from or to continue training in.

python -m convert.from_torch SiT-XL-2-256x256.pt runs/xl
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import optax
from etils import epath

from convert import checkpoint_file, cli, labels, objective, recipe, record
from convert.checkpoint_file import AdamWMoments, CheckpointFile, SiTArchitecture, StateDict
from convert.names import LABEL_TABLE, POSITION, params_from_torch, torch_shapes
from convert.torch_file import in_memory
from sit_jax import config as config_lib
from sit_jax import sharding, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError, check, check_tensors
from sit_jax.jobs.setup import Setup
from sit_jax.laws import in_group
from sit_jax.models.embeddings import position_embedding
from sit_jax.models.sizes import SIZES, size_by_name, tokens
from sit_jax.settings import Config, get

_DESCRIPTION = """\
Convert a PyTorch SiT checkpoint into a workdir to sample from or to continue training in. A
training checkpoint continues at its own step with its EMA and AdamW moments. A bare state dict, and
a checkpoint converted with --weights or to another image size or number of classes, starts a new
run at step 0. PyTorch is not needed, and no code in the file is run."""
_EPILOG = """\
Every setting in sit_jax/settings.py is also a flag, such as --config.transport.path=GVP. A setting
given neither by the file nor by a flag has the value of the reference's train.py."""


def main(argv: Sequence[str]) -> None:
    """Parse the command line and convert."""
    parser = cli.parser("from_torch", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "checkpoint",
        help="a .pt or .safetensors file: a training checkpoint {model, ema, opt, args} of the "
        "reference's train.py, or a bare state dict",
    )
    parser.add_argument("workdir", help="the folder to create")
    parser.add_argument(
        "--num_heads",
        type=int,
        metavar="N",
        help="the number of attention heads, which the tensors do not show; needed only if the "
        "network is not one of the twelve published sizes and the file was not written by "
        "convert.to_torch",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="change the image size: the position embedding is recomputed, and a new run "
        "starts at step 0",
    )
    parser.add_argument(
        "--num_classes",
        type=int,
        metavar="N",
        help="change the number of classes: the label table is initialised again, all other "
        "weights are kept, and a new run starts at step 0; the number of rows of the table: "
        "keep it, each row is a class and none the null label, as a file may not record",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="take only these weights of a training checkpoint: the EMA (ema) or the trained "
        "parameters (raw); a new run starts at step 0",
    )
    flags, settings_flags = parser.parse_known_args(argv)
    overrides = []
    for flag in settings_flags:
        key, _, text = flag.removeprefix("--config.").partition("=")
        check(
            flag.startswith("--config.") and text,
            f"unknown argument {flag!r}; settings are --config.KEY=VALUE",
        )
        overrides.append((key, text))
    convert(
        flags.checkpoint,
        flags.workdir,
        num_heads=flags.num_heads,
        image_size=flags.image_size,
        num_classes=flags.num_classes,
        weights=flags.weights,
        overrides=overrides,
        overwrite=flags.overwrite,
    )


def convert(
    checkpoint: str,
    workdir: str,
    *,
    num_heads: int | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    weights: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    overwrite: bool = False,
) -> None:
    """Write `workdir` from a checkpoint; the command line's flags explain the arguments.

    A training checkpoint continues with its parameters, EMA, moments and step. A single set of
    weights, and a checkpoint whose image size or classes change, start a new run at step 0.

    Raises UserError if the checkpoint cannot be used, and then leaves nothing behind.
    """
    cli.check_input(checkpoint)
    source = objective.in_our_time(checkpoint, checkpoint_file.read(checkpoint, weights))
    architecture = checkpoint_file.infer_architecture(checkpoint, source.ema)
    source, has_null_row = labels.settle_null_row(checkpoint, source, num_classes)
    if not has_null_row:
        architecture = dataclasses.replace(architecture, classes=architecture.classes + 1)
    recorded_size = source.record.size if source.record else None
    recorded_heads = recorded_size.heads if recorded_size else None
    name, size = architecture.size(num_heads or recorded_heads)
    size_by_name(name, **vars(size))  # refuses heads that do not divide the width
    new_architecture = _resized(architecture, image_size, num_classes)
    moments = None
    if source.opt and new_architecture == architecture:
        moments = checkpoint_file.read_moments(checkpoint, source.opt, source.ema, size.depth)
        moments = moments if has_null_row else labels.moments_with_null_row(moments)
    settings, step, notes = _recorded(source, moments)
    network = {} if size == recorded_size else recipe.size_settings(name, size)
    network |= _input_settings(source, new_architecture)
    if source.record and new_architecture == architecture:
        notes += record.differences(source.record, network)
    settings.update_from_flattened_dict(network)
    source = dataclasses.replace(source, notes=(*source.notes, *notes))

    needed = _bytes(source, moments)
    with cli.output(workdir, needed, overwrite) as new:
        storage.make_writable_folder(new)
        config = config_lib.from_values(settings.to_dict(), overrides)
        setup = Setup(config, sharding.make_mesh(-1, 1, 1))
        adapted = _adapt(source, architecture, new_architecture, setup)
        _check_shapes(checkpoint, adapted, moments, setup)
        notes = _overruled(source, settings, config, overrides)
        adapted = dataclasses.replace(adapted, notes=(*adapted.notes, *notes))
        _describe(adapted, architecture, new_architecture, setup)
        print(f"writing {needed / 1e6:,.0f} MB ...", flush=True)
        note = {
            "converted_from": os.path.basename(checkpoint),
            "config": config_lib.flatten(config),
        }
        _save(new / "checkpoints", step, _checkpoint_items(adapted, moments, setup), note)
        storage.write_text(new / "config.json", config_lib.to_json(config))
    _report(source, moments, step, workdir)


def _report(source: CheckpointFile, moments: AdamWMoments | None, step: int, workdir: str) -> None:
    """Print what was written, and what to do with it."""
    converted = "one set of weights"
    if source.model:
        converted = "parameters and EMA"
    if moments:
        converted = "parameters, EMA and AdamW's moments"
    print(f"{converted} at step {step} -> {workdir}")
    print(f"sample:   python -m sit_jax.main --mode sample --workdir {workdir}")
    print(f"train on: python -m sit_jax.main --workdir {workdir} --config.data.path=PATH")


def _resized(
    architecture: SiTArchitecture, image_size: int | None, num_classes: int | None
) -> SiTArchitecture:
    """Return the architecture with the given image size in pixels and number of classes."""
    if image_size is not None:
        cell = recipe.pixels_per_cell(architecture.channels)
        side, remainder = divmod(image_size, cell)
        check(
            side > 0 and not remainder,
            f"--image_size is {image_size}; expected a multiple of {cell} pixels",
        )
        tokens(side, architecture.patch)  # refuses a size that the patches do not tile
        architecture = dataclasses.replace(architecture, side=side)
    if num_classes is not None:
        architecture = dataclasses.replace(architecture, classes=num_classes)
    check(
        architecture.classes > 0, f"--num_classes is {architecture.classes}; expected more than 0"
    )
    return architecture


def _input_settings(source: CheckpointFile, architecture: SiTArchitecture) -> dict[str, Any]:
    """Return the settings of the network's input and output."""
    settings = {
        "model.learn_sigma": architecture.learn_sigma,
        "data.classes": architecture.classes,
        **recipe.input_settings(architecture.side, architecture.channels),
    }
    recorded = source.record.settings.latents.codec if source.record else "pixels"
    if "pixels" not in (settings["latents.codec"], recorded):
        del settings["latents.codec"]  # several codecs may give the same latents
    return settings


def _recorded(
    source: CheckpointFile, moments: AdamWMoments | None
) -> tuple[ml_collections.ConfigDict, int, list[str]]:
    """Return the settings and the step that the file records, and notes.

    Settings that it does not record are those of the reference's recipe.
    """
    group = moments.settings if moments else None
    count = moments.count if moments else 0
    if source.record:
        settings, notes = record.settings(source.record, source.args, group, count)
        step, trained_on = record.first_step(source.record, count) if moments else (0, [])
        return settings, step, trained_on + notes
    settings = config_lib.default()
    settings.update_from_flattened_dict(recipe.from_args(source.args, group or {}))
    settings.update_from_flattened_dict(source.settings)
    if not settings.train.label_dropout:
        settings.sample.cfg_scale = 1.0  # the null label is untrained
    return settings, count, []


def _overruled(
    source: CheckpointFile,
    settings: ml_collections.ConfigDict,
    config: Config,
    overrides: Sequence[tuple[str, str]],
) -> list[str]:
    """Return a note on each flag that contradicts the file on what its weights compute.

    `settings` are those of the file, before the flags.
    """
    recorded = {ours for theirs, ours in recipe.ARGUMENTS.items() if theirs in source.args}
    recorded.add("model.qk_norm")  # the PyTorch SiT has none
    return [
        f"--config.{key} is {get(config, key)}, but the file's weights were trained with "
        f"{get(settings, key)}: the flag wins, so samples are wrong if the file is right"
        for key in dict(overrides)
        if in_group(key, config_lib.NETWORK)
        and (source.record or key in recorded)
        and get(config, key) != get(settings, key)
    ]


def _bytes(source: CheckpointFile, moments: AdamWMoments | None) -> int:
    """Return the size of the arrays to write, in float32."""
    if moments:
        copies = 4  # parameters, EMA and two moments
    elif source.model:
        copies = 2
    else:
        copies = 1
    return copies * 4 * _count(source.ema)


def _count(state_dict: StateDict) -> int:
    """Return the number of parameters."""
    return sum(math.prod(tensor.shape) for tensor in state_dict.values())


def _adapt(
    source: CheckpointFile, old: SiTArchitecture, new: SiTArchitecture, setup: Setup
) -> CheckpointFile:
    """Replace the tensors that depend on the image size or the classes, if these change."""
    arrays = {}
    if new.side != old.side:
        arrays[POSITION] = position_embedding(new.width, new.side // new.patch)[None]
    if new.classes != old.classes:
        # Under jit only the label table is computed, not the rest of a fresh network.
        table = jax.jit(lambda: setup.init_params()["y_embedder"]["embedding"])()
        arrays[LABEL_TABLE] = np.asarray(table)
    replaced = {name: in_memory(array) for name, array in arrays.items()}
    model = source.model | replaced if source.model else None
    return dataclasses.replace(source, ema=source.ema | replaced, model=model)


def _check_shapes(
    checkpoint: str, source: CheckpointFile, moments: AdamWMoments | None, setup: Setup
) -> None:
    """Compare the tensors of every part of the file with those of the network.

    Raises UserError that names the missing, unexpected and mis-shaped ones.
    """
    expected = torch_shapes(setup.abstract_state.params, setup.size)
    parts = {"the state dict": source.ema}
    if source.model:
        parts = {"ema": source.ema, "model": source.model}
    if moments:
        parts |= {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
    for part, state_dict in parts.items():
        shapes = {name: tensor.shape for name, tensor in state_dict.items()}
        check_tensors(f"{part} of {checkpoint}", shapes, expected)
        checkpoint_file.check_types(f"{part} of {checkpoint}", state_dict)


def _checkpoint_items(
    source: CheckpointFile, moments: AdamWMoments | None, setup: Setup
) -> dict[str, Any]:
    """Return the checkpoint's items. They are JAX arrays: Orbax would copy NumPy arrays twice."""

    def tree(state_dict: StateDict) -> Any:
        return jax.device_put(params_from_torch(state_dict, setup.size))

    items = {"ema": tree(source.ema)}
    if source.model:
        items["params"] = tree(source.model)
    if moments:
        items["opt_state"] = optax.tree.set(
            setup.abstract_state.opt_state,
            count=jax.device_put(np.int32(moments.count)),
            mu=tree(moments.exp_avg),
            nu=tree(moments.exp_avg_sq),
        )
    return items


def _save(folder: epath.Path, step: int, items: dict[str, Any], note: dict[str, Any]) -> None:
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        checkpoints.save(step, items, note)
        try:
            checkpoints.wait()
        except UserError:
            # After one of Orbax's writers has failed, the others still create folders for a moment.
            time.sleep(1)
            raise


def _describe(
    source: CheckpointFile, old: SiTArchitecture, new: SiTArchitecture, setup: Setup
) -> None:
    """Print the network, and a note on each change that the conversion makes."""
    size = setup.size
    height, width, channels = setup.input_shape
    print(
        f"depth {size.depth}, width {size.width}, {size.heads} heads, patch {size.patch}: "
        f"{_count(source.ema) / 1e6:.1f} M parameters; input {height}x{width}x{channels}, "
        f"{new.classes} classes, learn_sigma {new.learn_sigma}"
    )
    name = source.args.get("model")
    if name and SIZES.get(name) != size:
        print(f"note: args name {name}, but the tensors are of another network; the tensors decide")
    other_types = {str(tensor.dtype) for tensor in source.ema.values()} - {"float32"}
    if other_types:
        print(f"note: {' and '.join(sorted(other_types))} weights become float32")
    if new.side != old.side:
        print(
            f"note: pos_embed is recomputed for {new.side} instead of {old.side} cells per side; "
            "all other weights are kept"
        )
    if new.classes != old.classes:
        print(
            f"note: the label table is initialised again for {new.classes} instead of "
            f"{old.classes} classes; all other weights are kept"
        )
    if source.opt and new != old:
        print("note: this is a new run: it starts at step 0, with new moments")
    for note in source.notes:
        print(f"note: {note}")
    if not source.record and not {"path_type", "prediction"} <= source.args.keys():
        print(f"note: {_assumption(setup)}")
    if not source.record and not setup.config.train.label_dropout:
        print("note: no label was dropped in training, so sample.cfg_scale is 1: no guidance")


def _assumption(setup: Setup) -> str:
    """Return a line on the objective and the input of weights whose file does not record them."""
    transport, latents = setup.config.transport, setup.config.latents
    values = "pixels in [-1, 1]"
    if latents.codec != "pixels":
        values = f"latents of Stable Diffusion's autoencoder times {latents.scale}"
    return (
        f"the file does not record what the network computes; assumed: {transport.prediction} on "
        f"path {transport.path}, t from noise at 0 to data at 1, {values}"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
