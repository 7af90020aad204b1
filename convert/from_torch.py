"""A PyTorch SiT checkpoint -> a workdir that samples and trains on.

python -m convert.from_torch SiT-XL-2-256x256.pt runs/xl
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from convert import checkpoint_file, cli, recipe
from convert.checkpoint_file import Architecture, CheckpointFile, Moments
from convert.names import LABEL_TABLE, POSITION, check_tensors, params_from_torch, torch_shapes
from convert.torch_file import in_memory
from sit_jax import config as config_lib
from sit_jax import sharding, storage, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError, check
from sit_jax.jobs.setup import Setup
from sit_jax.models.embeddings import position_embedding
from sit_jax.models.sizes import Size, size_by_name, tokens
from sit_jax.settings import Config


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(
        "from_torch", "Makes a workdir of a PyTorch SiT checkpoint (.pt, .safetensors)."
    )
    parser.add_argument(
        "checkpoint",
        help="{model, ema, opt, args} of the reference's train.py, or a bare state dict",
    )
    parser.add_argument("workdir", help="the folder to be made")
    parser.add_argument(
        "--num_heads", type=int, help="of a network that is none of the twelve sizes"
    )
    parser.add_argument(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="another resolution: pos_embed is recomputed",
    )
    parser.add_argument(
        "--num_classes", type=int, help="other classes: the label table is drawn anew"
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="of a training checkpoint, these weights alone"
    )
    parser.epilog = (
        "Every setting of sit_jax/settings.py is a flag, too: --config.transport.path=GVP"
    )
    flags, rest = parser.parse_known_args(argv)
    overrides = []
    for flag in rest:
        key, _, text = flag.removeprefix("--config.").partition("=")
        check(
            flag.startswith("--config.") and text,
            f"unknown argument {flag!r}; settings are --config.KEY=VALUE",
        )
        overrides.append((key, text))
    convert(**vars(flags), overrides=overrides)


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
    """Writes `workdir`. `UserError` for what cannot be used; then nothing is left behind.

    A training checkpoint continues where it was: parameters, EMA, moments and step. Weights alone, and a checkpoint
    whose image size or classes are changed, start a new training at step 0.
    """
    file = checkpoint_file.read(checkpoint, weights)
    found = checkpoint_file.architecture(checkpoint, file.ema)
    model = file.record["config"]["model"] if file.record else {}
    heads = num_heads or (_size(model).heads if model else None)
    name, size = found.size(heads)
    size_by_name(name, **vars(size))  # heads that do not divide the width
    wanted = _changed(found, image_size, num_classes)
    continues = file.opt and wanted == found
    moments = (
        checkpoint_file.moments(checkpoint, file.opt, file.ema, size.depth) if continues else None
    )
    values = config_lib.default()
    if file.record:
        values.update(file.record["config"])
    else:
        values.update_from_flattened_dict(
            recipe.from_args(file.args, moments.settings if moments else {})
        )
    values.update_from_flattened_dict(recipe.network_settings(name, size, wanted))
    copies = 4 if moments else 2 if file.model else 1
    needed = copies * sum(4 * int(np.prod(tensor.shape)) for tensor in file.ema.values())
    with cli.output(workdir, needed, overwrite) as new:
        config = _write_config(storage.make_writable_folder(new), values, overrides)
        setup = Setup(config, sharding.make_mesh(-1, 1, 1))
        file = _adapt(file, found, wanted, setup)
        _check_shapes(checkpoint, file, moments, setup)
        _describe(file, found, wanted, setup)
        print(f"writing {needed / 1e6:,.0f} MB ...", flush=True)
        step = file.record["step"] if moments and file.record else moments.count if moments else 0
        note = {
            "converted_from": os.path.basename(checkpoint),
            "config": config_lib.flatten(config),
        }
        _save(new / "checkpoints", step, _items(file, moments, setup), note)
    what = (
        "parameters, EMA and AdamW's moments"
        if moments
        else "parameters and EMA"
        if file.model
        else "weights alone"
    )
    print(f"{what} at step {step} -> {workdir}")
    print(f"sample:   python -m sit_jax.main --mode sample --workdir {workdir}")
    print(f"train on: python -m sit_jax.main --workdir {workdir} --config.data.path=PATH")


def _size(model: dict[str, Any]) -> Size:
    return size_by_name(
        model["name"], **{part: model[part] for part in ("depth", "width", "heads", "patch")}
    )


def _changed(found: Architecture, image_size: int | None, num_classes: int | None) -> Architecture:
    """The architecture with another image size in pixels, and other classes, where they are given."""
    side = found.side
    if image_size is not None:
        cell = recipe.pixels_per_cell(found.channels)
        side, rest = divmod(image_size, cell)
        check(
            side > 0 and not rest,
            f"--image_size is {image_size}; expected a multiple of {cell} pixels",
        )
        tokens(side, found.patch)
    classes = found.classes if num_classes is None else num_classes
    check(classes > 0, f"--num_classes is {classes}; expected more than 0")
    return dataclasses.replace(found, side=side, classes=classes)


def _write_config(workdir: epath.Path, values: Any, overrides: Sequence[tuple[str, str]]) -> Config:
    path = workdir / "config.json"
    storage.write_text(path, values.to_json())
    config = config_lib.load(str(path), overrides)
    storage.write_text(path, config_lib.to_json(config))
    return config


def _adapt(
    file: CheckpointFile, found: Architecture, wanted: Architecture, setup: Setup
) -> CheckpointFile:
    """The file with the tensors that another image size or class count asks for."""
    new = {}
    if wanted.side != found.side:
        new[POSITION] = position_embedding(found.width, wanted.side // found.patch)[None]
    if wanted.classes != found.classes:
        new[LABEL_TABLE] = np.asarray(
            jax.jit(lambda: setup.init_params()["y_embedder"]["embedding"])()
        )
    new = {name: in_memory(array) for name, array in new.items()}
    return dataclasses.replace(file, ema=file.ema | new, model=file.model and file.model | new)


def _check_shapes(
    checkpoint: str, file: CheckpointFile, moments: Moments | None, setup: Setup
) -> None:
    """`UserError` that names what is missing, unexpected or mis-shaped in any part of the file."""
    expected = torch_shapes(setup.abstract_state.params, setup.size)
    states = {"ema": file.ema, "model": file.model} if file.model else {"the state dict": file.ema}
    if moments:
        states |= {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
    for what, state in states.items():
        check_tensors(
            f"{what} of {checkpoint}",
            {name: tensor.shape for name, tensor in state.items()},
            expected,
        )


def _items(file: CheckpointFile, moments: Moments | None, setup: Setup) -> dict[str, Any]:
    """What the checkpoint holds, as JAX arrays, which Orbax copies once; numpy's it would copy twice."""

    def tree(state_dict):
        return jax.device_put(params_from_torch(state_dict, setup.size))

    items = {"ema": tree(file.ema)}
    if file.model:
        items["params"] = tree(file.model)
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
            time.sleep(
                1
            )  # one of Orbax's writers has failed; the others make folders until they notice
            raise


def _describe(
    file: CheckpointFile, found: Architecture, wanted: Architecture, setup: Setup
) -> None:
    """Prints what was found, and whatever of it does not stay as it was."""
    size, (height, width, channels) = setup.size, setup.input_shape
    count = sum(int(np.prod(tensor.shape)) for tensor in file.ema.values())
    print(
        f"depth {size.depth}, width {size.width}, {size.heads} heads, patch {size.patch}: {count / 1e6:.1f} M "
        f"parameters; sees {height}x{width}x{channels}, {wanted.classes} classes, learn_sigma {wanted.learn_sigma}"
    )
    if setup.config.model.name != (said := file.args.get("model", setup.config.model.name)):
        print(f"note: args say {said}, the tensors another network; the tensors count")
    others = {str(tensor.dtype) for tensor in file.ema.values()} - {"float32"}
    if others:
        print(f"note: {' and '.join(sorted(others))} weights become float32")
    if wanted.side != found.side:
        print(
            f"note: pos_embed is recomputed for {wanted.side} instead of {found.side} cells a side; the rest is kept"
        )
    if wanted.classes != found.classes:
        print(
            f"note: the label table is drawn anew for {wanted.classes} instead of {found.classes} classes; "
            "everything else is kept"
        )
    if file.opt and wanted != found:
        print("note: that is a new training: it starts at step 0, with new moments")


if __name__ == "__main__":
    sys.exit(cli.run(main))
