"""Convert a workdir into a checkpoint that the PyTorch reference loads.

python -m convert.to_torch runs/xl xl.pt
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from safetensors.numpy import save_file

from convert import cli, recipe, record
from convert.names import POSITION, entries, params_to_torch
from convert.torch_writer import TorchWriter
from sit_jax import config as config_lib
from sit_jax import sharding, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check, require
from sit_jax.jobs.setup import Setup
from sit_jax.jobs.workdir import newest_step, restore_items
from sit_jax.settings import Config

_DESCRIPTION = """\
Convert a workdir's newest complete checkpoint into a file that the PyTorch reference loads. A
training checkpoint and a .safetensors file also record the config and the step for
convert.from_torch; a bare state dict in a .pt file has no place for them. PyTorch is not needed."""
# AdamW's settings that the reference leaves at their defaults. load_state_dict replaces the entire
# group, so every key is needed.
_GROUP_DEFAULTS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_ADAM = "ScaleByAdamState"  # optax's state of AdamW: count, mu and nu


def main(argv: Sequence[str]) -> None:
    """Parse the command line and convert."""
    parser = cli.parser("to_torch", _DESCRIPTION)
    parser.add_argument("workdir", help="the folder of the run, with config.json and checkpoints")
    parser.add_argument(
        "out",
        help="the file to write; NAME.pt is a training checkpoint {model, ema, opt, args}, or a "
        "bare state dict if the workdir has no AdamW moments; NAME.safetensors is one set of "
        "weights, the EMA unless --weights is given",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="write only these weights, as a bare state dict: the EMA (ema) or the trained "
        "parameters (raw)",
    )
    flags = parser.parse_args(argv)
    convert(flags.workdir, flags.out, weights=flags.weights, overwrite=flags.overwrite)


def convert(workdir: str, out: str, *, weights: str | None = None, overwrite: bool = False) -> None:
    """Write `out` from the newest complete checkpoint of a workdir.

    A checkpoint without moments, such as one of converted weights, becomes a bare state dict.

    Raises UserError if the reference could not load the result, and then leaves nothing behind.
    """
    suffix = os.path.splitext(out)[1].lower()
    check(
        suffix in (".pt", ".safetensors"),
        f"{out!r} ends in {suffix!r}; expected .pt or .safetensors",
    )
    setup = Setup(_read_config(workdir), sharding.make_mesh(-1, 1, 1))
    folder = epath.Path(workdir) / "checkpoints"
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        step = require(
            newest_step(checkpoints),
            f"{str(folder)!r} holds no complete checkpoint; train first",
        )
        export = _Export(workdir, setup, checkpoints, step)
        if weights is None and (suffix == ".safetensors" or not export.has_moments):
            weights = "ema"
        if weights is None:
            export.check_adamw()
        size = export.size_in_bytes(copies=1 if weights else 4)
        with cli.output(out, size, overwrite) as new:
            if suffix == ".safetensors":
                export.write_safetensors(new, weights or "ema")
            else:
                export.write_torch(new, weights)
    written = "parameters, EMA, AdamW's moments and settings"
    if weights:
        written = f"the {weights} weights"
    print(f"{written} of step {step} -> {out}")


def _read_config(workdir: str) -> Config:
    """Return the config of a workdir.

    Raises UserError if it is not a workdir, or its network has no counterpart in PyTorch.
    """
    path = epath.Path(workdir)
    check(
        (path / "config.json").exists() and (path / "checkpoints").exists(),
        f"{workdir!r} is not a workdir; expected config.json and checkpoints",
    )
    config = config_lib.load(str(path / "config.json"))
    check(
        not config.model.qk_norm,
        f"{workdir!r} has model.qk_norm, for which the PyTorch SiT has no tensors; "
        "only a run with model.qk_norm=false can be converted",
    )
    return config


@dataclasses.dataclass(frozen=True)
class _Export:
    """One checkpoint to write. It is read one item at a time, to limit memory to one item."""

    workdir: str
    setup: Setup
    checkpoints: Checkpoints
    step: int

    @property
    def has_moments(self) -> bool:
        return "opt_state" in self.checkpoints.stored(self.step)

    def size_in_bytes(self, copies: int) -> int:
        """Return the size of `copies` copies of the parameters, in float32."""
        leaves = jax.tree.leaves(self.setup.abstract_state.params)
        return copies * 4 * sum(leaf.size for leaf in leaves)

    def check_adamw(self) -> None:
        """Raise UserError unless the optimizer state is AdamW's, the only one the format holds."""
        state = self.setup.abstract_state
        names = list(_names_of_array_states(state.opt_state))
        is_adamw = names == [_ADAM]
        if is_adamw:
            # A masked AdamW has moments of only some parameters.
            moments = jax.tree.leaves(optax.tree.get(state.opt_state, _ADAM).mu)
            is_adamw = len(moments) == len(jax.tree.leaves(state.params))
        check(
            is_adamw,
            f"the optimizer state of {self.workdir!r} is {' and '.join(names) or 'empty'}; "
            f"expected AdamW's {_ADAM} of every parameter; write only the weights with "
            "--weights ema or raw",
        )

    def write_safetensors(self, path: epath.Path, weights: str) -> None:
        """Write one set of weights, with the record in the metadata."""
        tensors = {name: np.ascontiguousarray(array) for name, array in self._weights(weights)}
        written = record.make(self.step, self.setup.config)
        save_file(tensors, path, {"format": "pt", record.KEY: json.dumps(written)})

    def write_torch(self, path: epath.Path, weights: str | None) -> None:
        """Write one set of weights, or with None {model, ema, opt, args}."""
        with open(path, "wb") as file, TorchWriter(file) as writer:
            if weights:
                writer.finish(self._state_dict(writer, weights))
            else:
                writer.finish(self._training_checkpoint(writer))

    def _weights(self, weights: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) of the EMA ("ema") or the trained parameters ("raw")."""
        item = {"ema": "ema", "raw": "params"}[weights]
        target = getattr(self.setup.abstract_state, item)
        tree = restore_items(self.checkpoints, self.step, {item: target})[item]
        return params_to_torch(tree, self.setup.size)

    def _state_dict(self, writer: TorchWriter, weights: str) -> dict[str, Any]:
        return {name: writer.tensor(array) for name, array in self._weights(weights)}

    def _training_checkpoint(self, writer: TorchWriter) -> dict[str, Any]:
        """Write all tensors; return {model, ema, opt, args} as the reference's train.py does."""
        image_size = self.setup.input_shape[0] * recipe.pixels_per_cell(self.setup.input_shape[2])
        args = recipe.to_args(self.setup.config, self.setup.size, image_size)
        opt, count = self._optimizer_state(writer)
        return {
            "model": self._state_dict(writer, "raw"),
            "ema": self._state_dict(writer, "ema"),
            "opt": opt,
            # A dict and not the reference's Namespace, which torch.load refuses by default.
            "args": args | {record.KEY: record.make(self.step, self.setup.config, count)},
        }

    def _optimizer_state(self, writer: TorchWriter) -> tuple[dict[str, Any], int]:
        """Write the moments; return AdamW's state dict, numbered in order, and its count."""
        target = self.setup.abstract_state.opt_state
        opt_state = self.checkpoints.restore(self.step, {"opt_state": target})["opt_state"]
        adam = optax.tree.get(opt_state, _ADAM)
        averages = params_to_torch(adam.mu, self.setup.size)
        squares = params_to_torch(adam.nu, self.setup.size)
        moments = enumerate(zip(averages, squares, strict=True))
        state = {
            number: {
                "step": writer.tensor(np.asarray(adam.count, np.float32)),
                "exp_avg": writer.tensor(average),
                "exp_avg_sq": writer.tensor(square),
            }
            for number, ((name, average), (_, square)) in moments
            if name != POSITION  # not trained, so AdamW has no state for it
        }
        count = len(list(entries(self.setup.size.depth)))
        optimizer = self.setup.config.optimizer
        updates = int(adam.count)
        images = self.checkpoints.note(self.step).get("data", {}).get("images")
        setup = dataclasses.replace(self.setup, images=images)
        rate = float(setup.schedule(updates))
        is_base = math.isclose(rate, optimizer.learning_rate, rel_tol=1e-5)
        if setup.knows_steps and not is_base:
            print(
                f"note: AdamW's lr is optimizer.learning_rate, {optimizer.learning_rate:g}, as "
                f"PyTorch has no schedule; here {optimizer.schedule!r}, with "
                f"{optimizer.warmup_steps} steps of warm-up, is at {rate:g}"
            )
        group = {
            "lr": optimizer.learning_rate,
            "betas": (optimizer.b1, optimizer.b2),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
            **_GROUP_DEFAULTS,
            "params": list(range(count)),
        }
        return {"state": state, "param_groups": [group]}, updates


def _names_of_array_states(node: Any) -> Iterator[str]:
    """Yield the class names of the optax states, at any depth, whose own fields hold arrays.

    Scalars, such as a step count, and wrappers of other states do not count.
    """

    def is_inner_state(child: Any) -> bool:
        return hasattr(child, "_fields") and child is not node

    children = jax.tree.leaves(node, is_leaf=is_inner_state)
    if hasattr(node, "_fields") and any(
        child.ndim for child in children if not is_inner_state(child)
    ):
        yield type(node).__name__
    for child in filter(is_inner_state, children):
        yield from _names_of_array_states(child)


if __name__ == "__main__":
    sys.exit(cli.run(main))
