"""PyTorch SiT checkpoints of random numbers, made without torch."""

from typing import Any

import jax
import numpy as np

from convert.names import POSITION, torch_shapes
from convert.torch_writer import TorchWriter
from sit_jax.models.sit import SiT
from sit_jax.models.sizes import Size

TINY = Size(depth=2, width=16, heads=2, patch=2)
ARGS = {
    "model": "SiT-XL/2",
    "data_path": "photos",
    "global_seed": 7,
    "path_type": "GVP",
    "train_eps": 0.1,
}


def shapes(
    size: Size = TINY, side=8, channels=4, classes=10, learn_sigma=False
) -> dict[str, tuple[int, ...]]:
    """name -> shape of the state dict of such a network."""
    x, one = np.zeros((1, side, side, channels), np.float32), np.zeros((1,), np.float32)
    model = SiT(size, side, channels, classes, learn_sigma=learn_sigma)
    init = jax.eval_shape(
        lambda: model.init(jax.random.key(0), x, one, one.astype(np.int32))["params"]
    )
    return torch_shapes(init, size)


def state_dict(seed: int = 0, size: Size = TINY, **network) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        n: 0.1 * draw.standard_normal(s).astype(np.float32)
        for n, s in shapes(size, **network).items()
    }


def training(size: Size = TINY, count: int = 5, **network) -> dict[str, Any]:
    """{model, ema, opt, args} as the reference's train.py saves it, with AdamW `count` steps on."""
    model, ema, average, square = (state_dict(seed, size, **network) for seed in range(4))
    state = {
        number: {
            "step": np.array(count, np.float32),
            "exp_avg": average[name],
            "exp_avg_sq": square[name] ** 2,
        }
        for number, name in enumerate(model)
        if name != POSITION
    }
    group = {
        "lr": 2e-4,
        "betas": (0.8, 0.99),
        "eps": 1e-7,
        "weight_decay": 0.01,
        "params": list(range(len(model))),
    }
    return {
        "model": model,
        "ema": ema,
        "opt": {"state": state, "param_groups": [group]},
        "args": dict(ARGS),
    }


def save(path, content: Any) -> str:
    """Writes what torch.save would write, arrays being tensors."""
    with open(path, "wb") as file, TorchWriter(file) as writer:
        writer.finish(_written(writer, content))
    return str(path)


def _written(writer: TorchWriter, content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _written(writer, value) for key, value in content.items()}
    if isinstance(content, list):
        return [_written(writer, value) for value in content]
    return writer.tensor(content) if isinstance(content, np.ndarray) else content
