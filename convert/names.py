"""The table that maps the PyTorch SiT's state dict to our parameter tree: names and layouts.

Shape suffixes: i, o input and output features; h, w rows and columns of a patch; f = (h, w, i);
n heads; 3 query, key, value; t tokens; d width.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.models.sizes import Size


class Layout(NamedTuple):
    """Two functions (array, size) -> array, each the inverse of the other."""

    to_ours: Callable[[np.ndarray, Size], np.ndarray]
    to_torch: Callable[[np.ndarray, Size], np.ndarray]


_SAME = Layout(lambda x, size: x, lambda x, size: x)
_LINEAR = Layout(lambda w_oi, size: w_oi.T, lambda w_io, size: w_io.T)
_PATCHES = Layout(  # [o, i, h, w] <-> [(h, w, i), o]
    lambda w_oihw, size: w_oihw.transpose(2, 3, 1, 0).reshape(-1, size.width),
    lambda w_fo, size: w_fo.reshape(size.patch, size.patch, -1, size.width).transpose(3, 2, 0, 1),
)
_QKV = Layout(  # [(3, heads, head width), i] <-> [i, 3, heads, head width]
    lambda w_oi, size: w_oi.T.reshape(size.width, 3, size.heads, -1),
    lambda w_i3nh, size: w_i3nh.reshape(size.width, -1).T,
)
_QKV_BIAS = Layout(  # [(3, heads, head width)] <-> [3, heads, head width]
    lambda b_o, size: b_o.reshape(3, size.heads, -1), lambda b_3nh, size: b_3nh.reshape(-1)
)
_POSITION = Layout(lambda x_1td, size: x_1td[0], lambda x_td, size: x_td[None])


def _layer(torch_name: str, our_path: str) -> dict[str, tuple[str, Layout]]:
    """Return the two entries of a linear layer."""
    return {
        f"{torch_name}.weight": (f"{our_path}/kernel", _LINEAR),
        f"{torch_name}.bias": (f"{our_path}/bias", _SAME),
    }


LABEL_TABLE = "y_embedder.embedding_table.weight"
POSITION = "pos_embed"
# torch name -> (our path, layout), in the order of torch's parameters(). "blocks.N." stands for
# every block; our tree stacks the blocks on a leading axis.
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


# Parts of names that torch.compile, FSDP and activation checkpointing insert, at any depth.
_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_AVERAGED = "n_averaged"  # a count that torch's AveragedModel adds beside its module
_LANDMARK = "x_embedder.proj.weight"  # shows what precedes the names of a SiT


def unwrapped(source: str, names: Iterable[str]) -> dict[str, str]:
    """Return {name: plain name} of a SiT's tensors, without what wrappers add to the names.

    These are the inserted parts above and a common prefix, such as DistributedDataParallel's
    `module.` and a trainer's `model.` or `net.`, in any combination.

    Raises UserError if `source` holds several networks, or tensors besides a wrapped network.
    """
    plain = {name: name for name in names}
    for part in _INSERTED:
        plain = {name: short.replace(part, "") for name, short in plain.items()}
    ends = [short for short in plain.values() if f".{short}".endswith(f".{_LANDMARK}")]
    prefixes = sorted(short.removesuffix(_LANDMARK) for short in ends)
    if len(prefixes) > 1:
        raise UserError(
            f"{source} holds several networks: {', '.join(map(repr, prefixes[:4]))}; save the "
            "state dict of one"
        )
    prefix = prefixes[0] if prefixes else ""
    if prefix or any(short != name for name, short in plain.items()):
        plain = {name: short for name, short in plain.items() if short != _AVERAGED}
    others = [name for name, short in plain.items() if not short.startswith(prefix)]
    if others or len(set(plain.values())) < len(plain):
        more = ", ".join(others[:4]) or "names twice"
        raise UserError(
            f"{source} holds a network under {prefix!r}, and besides it {more}; save the state "
            "dict of the network"
        )
    return {name: short.removeprefix(prefix) for name, short in plain.items()}


class Entry(NamedTuple):
    """One tensor of a state dict."""

    torch_name: str
    path: str  # in our tree
    layer: int | None  # its index on the leading axis of a stacked leaf
    layout: Layout


def entries(depth: int) -> Iterator[Entry]:
    """Yield every tensor in torch's order, in which the blocks follow one another."""
    for in_blocks, group in itertools.groupby(TABLE.items(), lambda item: ".N." in item[0]):
        rows = list(group)
        layers: Iterable[int | None] = range(depth) if in_blocks else [None]
        for layer in layers:
            for name, (path, layout) in rows:
                torch_name = name if layer is None else name.replace("N", str(layer), 1)
                yield Entry(torch_name, path, layer, layout)


def params_from_torch(state_dict: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Return the float32 parameter tree of a state dict: name -> anything np.asarray accepts."""
    tree: dict[str, Any] = {}
    for torch_name, path, layer, layout in entries(size.depth):
        value = layout.to_ours(np.asarray(state_dict[torch_name]), size)
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if layer is None:
            node[leaf] = np.ascontiguousarray(value, np.float32)
        else:
            node.setdefault(leaf, np.empty((size.depth, *value.shape), np.float32))[layer] = value
    return tree


def params_to_torch(tree: Mapping[str, Any], size: Size) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) of every tensor of the state dict, in torch's order."""
    for torch_name, path, layer, layout in entries(size.depth):
        value: Any = tree
        for part in path.split("/"):
            value = value[part]
        if layer is not None:
            value = value[layer]
        yield torch_name, layout.to_torch(np.asarray(value), size)


def torch_shapes(params: Any, size: Size) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the state dict that a tree of (abstract) parameters becomes."""
    # Broadcast zeros have any shape, but take the memory of a single number.
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    return {name: value.shape for name, value in params_to_torch(zeros, size)}
