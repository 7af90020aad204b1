"""PyTorch SiT checkpoints of random numbers, written without torch."""

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
    """Return {name: shape} of the network's state dict."""
    x = np.zeros((1, side, side, channels), np.float32)
    one = np.zeros((1,), np.float32)
    model = SiT(size, side, channels, classes, learn_sigma=learn_sigma)
    init = jax.eval_shape(
        lambda: model.init(jax.random.key(0), x, one, one.astype(np.int32))["params"]
    )
    return torch_shapes(init, size)


def state_dict(seed: int = 0, size: Size = TINY, **network) -> dict[str, np.ndarray]:
    """Return {name: array} of random numbers."""
    generator = np.random.default_rng(seed)
    return {
        name: 0.1 * generator.standard_normal(shape).astype(np.float32)
        for name, shape in shapes(size, **network).items()
    }


def training(size: Size = TINY, count: int = 5, **network) -> dict[str, Any]:
    """Return {model, ema, opt, args} as the reference's train.py saves it after `count` steps."""
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
    """Write the file that torch.save would write, with each array as a tensor."""
    with open(path, "wb") as file, TorchWriter(file) as writer:
        writer.finish(_with_tensors(writer, content))
    return str(path)


def _with_tensors(writer: TorchWriter, content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_tensors(writer, value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_tensors(writer, value) for value in content]
    return writer.tensor(content) if isinstance(content, np.ndarray) else content
