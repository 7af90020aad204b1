"""The name table between the PyTorch SiT's state dict and our parameter tree, and the layout change of each tensor."""

import re
from collections.abc import Callable, Mapping

import numpy as np

from sit_jax.errors import UserError


def _same(tensor: np.ndarray, heads: int) -> np.ndarray:
    return tensor


def _linear(tensor: np.ndarray, heads: int) -> np.ndarray:  # [out, in] -> [in, out]
    return tensor.T


def _patches(tensor: np.ndarray, heads: int) -> np.ndarray:  # OIHW -> [(h, w, in), out]
    return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])


def _qkv(tensor: np.ndarray, heads: int) -> np.ndarray:  # [(3, heads, head), in] -> [in, 3, heads, head]
    return tensor.T.reshape(tensor.shape[1], 3, heads, -1)


def _qkv_bias(tensor: np.ndarray, heads: int) -> np.ndarray:
    return tensor.reshape(3, heads, -1)


def _position(tensor: np.ndarray, heads: int) -> np.ndarray:  # [1, t, d] -> [t, d]
    return tensor[0]


def _layer(torch_name: str, ours: str) -> dict[str, tuple[str, Callable]]:
    return {f"{torch_name}.weight": (f"{ours}/kernel", _linear), f"{torch_name}.bias": (f"{ours}/bias", _same)}


# torch name -> (our path, torch layout -> ours). "blocks.N." stands for every block; ours are stacked on a leading
# axis.
TABLE: dict[str, tuple[str, Callable]] = {
    "pos_embed": ("pos_embed", _position),
    "x_embedder.proj.weight": ("x_embedder/kernel", _patches),
    "x_embedder.proj.bias": ("x_embedder/bias", _same),
    **_layer("t_embedder.mlp.0", "t_embedder/fc1"),
    **_layer("t_embedder.mlp.2", "t_embedder/fc2"),
    "y_embedder.embedding_table.weight": ("y_embedder/embedding", _same),
    "blocks.N.attn.qkv.weight": ("blocks/attn/qkv/kernel", _qkv),
    "blocks.N.attn.qkv.bias": ("blocks/attn/qkv/bias", _qkv_bias),
    **_layer("blocks.N.attn.proj", "blocks/attn/proj"),
    **_layer("blocks.N.mlp.fc1", "blocks/mlp/fc1"),
    **_layer("blocks.N.mlp.fc2", "blocks/mlp/fc2"),
    **_layer("blocks.N.adaLN_modulation.1", "blocks/adaLN_modulation"),
    **_layer("final_layer.linear", "final_layer/linear"),
    **_layer("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation"),
}


def params_from_torch(state_dict: Mapping[str, np.ndarray], heads: int) -> dict:
    """The parameter tree of a state dict (name -> array).

    `UserError` names the tensors that are missing or not ours.
    """
    depth = 1 + max((int(m[1]) for name in state_dict if (m := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    expected = [
        n
        for name in TABLE
        for n in ([name.replace(".N.", f".{i}.") for i in range(depth)] if ".N." in name else [name])
    ]
    missing, extra = sorted(set(expected) - set(state_dict)), sorted(set(state_dict) - set(expected))
    if missing or extra or not depth:
        raise UserError(f"not a SiT state dict: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}")
    tree: dict = {}
    for name, (path, layout) in TABLE.items():
        if ".N." in name:
            value = np.stack([layout(state_dict[name.replace(".N.", f".{i}.")], heads) for i in range(depth)])
        else:
            value = layout(state_dict[name], heads)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
