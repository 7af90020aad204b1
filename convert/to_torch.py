"""A workdir -> a checkpoint that the PyTorch reference loads.

python -m convert.to_torch runs/xl xl.pt
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from safetensors.numpy import save_file

from convert import cli, recipe
from convert.checkpoint_file import RECORD
from convert.names import POSITION, params_to_torch
from convert.torch_writer import TorchWriter
from sit_jax import config as config_lib
from sit_jax import sharding, train_state
from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import check
from sit_jax.jobs.setup import Setup
from sit_jax.jobs.workdir import newest_complete, weights_of

# AdamW's settings that the reference leaves alone. Every key is written: load_state_dict takes the group as it is.
_GROUP = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def main(argv: Sequence[str]) -> None:
    parser = cli.parser(
        "to_torch", "Writes a workdir's newest checkpoint for the PyTorch reference."
    )
    parser.add_argument("workdir")
    parser.add_argument(
        "out",
        help=".pt: {model, ema, opt, args}; .safetensors: the EMA alone, or what --weights says",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="these weights alone, as a bare state dict"
    )
    convert(**vars(parser.parse_args(argv)))


def convert(workdir: str, out: str, *, weights: str | None = None, overwrite: bool = False) -> None:
    """Writes `out`, which is there whole or not at all. `UserError` for what cannot be written.

    A workdir of converted weights without moments becomes a bare state dict, as it was.
    """
    suffix = os.path.splitext(out)[1]
    check(
        suffix in (".pt", ".safetensors"),
        f"{out!r} ends in {suffix!r}; expected .pt or .safetensors",
    )
    recorded, folder = epath.Path(workdir) / "config.json", epath.Path(workdir) / "checkpoints"
    check(
        recorded.exists() and folder.exists(),
        f"{workdir!r} is no workdir; expected config.json and checkpoints",
    )
    config = config_lib.load(str(recorded))
    check(
        not config.model.qk_norm,
        f"{workdir!r} has model.qk_norm, which the PyTorch SiT has no tensors for",
    )
    with Checkpoints(folder, train_state.CHECKPOINT_ITEMS) as checkpoints:
        step = newest_complete(checkpoints)
        check(step is not None, f"{str(folder)!r} holds no whole checkpoint; train first")
        export = _Export(Setup(config, sharding.make_mesh(-1, 1, 1)), checkpoints, step)
        alone = weights or ("ema" if suffix == ".safetensors" or not export.has_moments else None)
        with cli.output(out, export.bytes(copies=1 if alone else 4), overwrite) as new:
            if suffix == ".safetensors":
                tensors = {
                    name: np.ascontiguousarray(tensor) for name, tensor in export.weights(alone)
                }
                save_file(tensors, new, {"format": "pt", RECORD: json.dumps(export.record)})
            else:
                with open(new, "wb") as file, TorchWriter(file) as writer:
                    bare = (
                        {name: writer.tensor(tensor) for name, tensor in export.weights(alone)}
                        if alone
                        else None
                    )
                    writer.finish(bare or export.training(writer))
    what = f"the {alone} weights" if alone else "parameters, EMA, AdamW's moments and settings"
    print(f"{what} of step {step} -> {out}")


@dataclasses.dataclass(frozen=True)
class _Export:
    """One checkpoint, read an item at a time, so that no more than one of them is in memory."""

    setup: Setup
    checkpoints: Checkpoints
    step: int

    @property
    def has_moments(self) -> bool:
        return "opt_state" in self.checkpoints.stored(self.step)

    @property
    def record(self) -> dict[str, Any]:
        """What the reference's format has no place for, for the way back."""
        return {"step": self.step, "config": dataclasses.asdict(self.setup.config)}

    def bytes(self, copies: int) -> int:
        return copies * sum(
            4 * leaf.size for leaf in jax.tree.leaves(self.setup.abstract_state.params)
        )

    def weights(self, which: str) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) of the EMA or the raw weights."""
        item = {"ema": "ema", "raw": "params"}[which]
        target = getattr(self.setup.abstract_state, item)
        return params_to_torch(
            weights_of(self.checkpoints, self.step, {item: target})[item], self.setup.size
        )

    def training(self, writer: TorchWriter) -> dict[str, Any]:
        """{model, ema, opt, args}, as the reference's train.py saves it."""
        model, ema = (
            {n: writer.tensor(t) for n, t in self.weights(which)} for which in ("raw", "ema")
        )
        config, size = self.setup.config, self.setup.size
        target = self.setup.abstract_state.opt_state
        state = self.checkpoints.restore(self.step, {"opt_state": target})["opt_state"]
        adam = optax.tree.get(state, "ScaleByAdamState")
        moments = zip(params_to_torch(adam.mu, size), params_to_torch(adam.nu, size), strict=True)
        entries = {
            number: {
                "step": writer.tensor(np.asarray(adam.count, np.float32)),
                "exp_avg": writer.tensor(average),
                "exp_avg_sq": writer.tensor(square),
            }
            for number, ((name, average), (_, square)) in enumerate(moments)
            if name != POSITION  # never trained: AdamW has no state of it
        }
        o = config.optimizer
        group = {
            "lr": float(self.setup.schedule(int(adam.count))),
            "betas": (o.b1, o.b2),
            "eps": o.eps,
        }
        group |= {"weight_decay": o.weight_decay, **_GROUP, "params": list(range(len(model)))}
        image_size = self.setup.input_shape[0] * recipe.pixels_per_cell(self.setup.input_shape[2])
        # A dict, not the reference's Namespace, which torch.load refuses by default.
        args = recipe.to_args(config, size, image_size) | {RECORD: self.record}
        return {
            "model": model,
            "ema": ema,
            "opt": {"state": entries, "param_groups": [group]},
            "args": args,
        }


if __name__ == "__main__":
    sys.exit(cli.run(main))
