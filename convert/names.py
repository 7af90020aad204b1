"""The two-way table between the PyTorch SiT's state dict and our parameter tree: name and layout of each tensor."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.models.sizes import Size


class Layout(NamedTuple):
    """Two functions (array, size) -> array, each the other's inverse."""

    to_ours: Callable[[np.ndarray, Size], np.ndarray]
    to_torch: Callable[[np.ndarray, Size], np.ndarray]


_SAME = Layout(lambda x, size: x, lambda x, size: x)
_LINEAR = Layout(lambda w_oi, size: w_oi.T, lambda w_io, size: w_io.T)
_PATCHES = Layout(  # OIHW <-> [(h, w, in), out]
    lambda w_oihw, size: w_oihw.transpose(2, 3, 1, 0).reshape(-1, size.width),
    lambda w_fo, size: w_fo.reshape(size.patch, size.patch, -1, size.width).transpose(3, 2, 0, 1),
)
_QKV = Layout(  # [(3, heads, head), in] <-> [in, 3, heads, head]
    lambda w_oi, size: w_oi.T.reshape(size.width, 3, size.heads, -1),
    lambda w_i3nh, size: w_i3nh.reshape(size.width, -1).T,
)
_QKV_BIAS = Layout(
    lambda b_o, size: b_o.reshape(3, size.heads, -1), lambda b_3nh, size: b_3nh.reshape(-1)
)
_POSITION = Layout(lambda x_1td, size: x_1td[0], lambda x_td, size: x_td[None])


def _layer(torch_name: str, ours: str) -> dict[str, tuple[str, Layout]]:
    return {
        f"{torch_name}.weight": (f"{ours}/kernel", _LINEAR),
        f"{torch_name}.bias": (f"{ours}/bias", _SAME),
    }


LABEL_TABLE, POSITION = "y_embedder.embedding_table.weight", "pos_embed"
# torch name -> (our path, layout), in the order of torch's parameters(). "blocks.N." stands for every block; ours are
# stacked on a leading axis.
TABLE: dict[str, tuple[str, Layout]] = {
    POSITION: ("pos_embed", _POSITION),
    "x_embedder.proj.weight": ("x_embedder/kernel", _PATCHES),
    "x_embedder.proj.bias": ("x_embedder/bias", _SAME),
    **_layer("t_embedder.mlp.0", "t_embedder/fc1"),
    **_layer("t_embedder.mlp.2", "t_embedder/fc2"),
    LABEL_TABLE: ("y_embedder/embedding", _SAME),
    "blocks.N.attn.qkv.weight": ("blocks/attn/qkv/kernel", _QKV),
    "blocks.N.attn.qkv.bias": ("blocks/attn/qkv/bias", _QKV_BIAS),
    **_layer("blocks.N.attn.proj", "blocks/attn/proj"),
    **_layer("blocks.N.mlp.fc1", "blocks/mlp/fc1"),
    **_layer("blocks.N.mlp.fc2", "blocks/mlp/fc2"),
    **_layer("blocks.N.adaLN_modulation.1", "blocks/adaLN_modulation"),
    **_layer("final_layer.linear", "final_layer/linear"),
    **_layer("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation"),
}


def entries(depth: int) -> Iterator[tuple[str, str, int | None, Layout]]:
    """(torch name, our path, layer or None, layout) of every tensor, in torch's order: blocks one after the other."""
    before, blocks, after = [], [], []
    for name, (path, layout) in TABLE.items():
        (blocks if ".N." in name else after if blocks else before).append((name, path, layout))
    yield from ((name, path, None, layout) for name, path, layout in before)
    for layer in range(depth):
        yield from (
            (name.replace("N", str(layer), 1), path, layer, layout) for name, path, layout in blocks
        )
    yield from ((name, path, None, layout) for name, path, layout in after)


def params_from_torch(state_dict: Mapping[str, Any], size: Size) -> dict:
    """The parameter tree, float32, of a state dict (name -> array, or what np.asarray makes one of)."""
    tree: dict = {}
    for name, path, layer, layout in entries(size.depth):
        value = layout.to_ours(np.asarray(state_dict[name]), size)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if layer is None:
            node[leaf] = np.ascontiguousarray(value, np.float32)
        else:
            node.setdefault(leaf, np.empty((size.depth, *value.shape), np.float32))[layer] = value
    return tree


def params_to_torch(tree: Mapping, size: Size) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the state dict, in its order."""
    for name, path, layer, layout in entries(size.depth):
        value: Any = tree
        for part in path.split("/"):
            value = value[part]
        yield name, layout.to_torch(np.asarray(value if layer is None else value[layer]), size)


def torch_shapes(params: Any, size: Size) -> dict[str, tuple[int, ...]]:
    """name -> shape of the state dict that a tree of (abstract) parameters corresponds to."""
    numbers = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    return {name: value.shape for name, value in params_to_torch(numbers, size)}


def check_tensors(
    what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """`UserError` that names the tensors of `what` which are missing, unexpected or of another shape."""
    problems = [
        f"{n} is missing, expected shape {list(s)}" for n, s in expected.items() if n not in found
    ]
    problems += [
        f"{n} of shape {list(s)} is unexpected" for n, s in found.items() if n not in expected
    ]
    problems += [
        f"{n} has shape {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in found and tuple(found[n]) != tuple(s)
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{what} does not fit: {'; '.join(problems[:4])}{more}")
