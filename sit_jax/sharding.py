"""One mesh with axes (data, fsdp, tensor), and one table that says how every parameter lies on it.

Batches are split over data and fsdp together; parameters, EMA and both Adam moments by `RULES`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sit_jax.errors import check

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# First match wins; matched anywhere in a leaf's path, so "params/..." , "ema/..." and ".../mu/..." all follow one
# line. The leading axis of blocks/* counts the layers. tensor splits heads and the mlp's hidden features (Megatron,
# 1909.08053).
RULES = (
    (r"blocks/attn/qkv/kernel", PartitionSpec(None, "fsdp", None, "tensor", None)),
    (r"blocks/attn/qkv/bias", PartitionSpec(None, None, "tensor", None)),
    (r"blocks/attn/proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/mlp/fc1/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"blocks/mlp/fc1/bias", PartitionSpec(None, "tensor")),
    (r"blocks/mlp/fc2/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"blocks/adaLN_modulation/kernel", PartitionSpec(None, "fsdp", None)),
    (r"(adaLN_modulation|final_layer/linear)/kernel", PartitionSpec("fsdp", None)),
    (r"(x_embedder|t_embedder/fc\d)/kernel|y_embedder/embedding", PartitionSpec(None, "fsdp")),
    (r"", PartitionSpec()),
)


def check_axes(data: int, fsdp: int, tensor: int) -> None:
    """`UserError` unless every size is positive, at most one of them -1."""
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    for axis, size in sizes.items():
        check(
            size == -1 or size >= 1, f"mesh.{axis} is {size}; expected 1 or more, or -1 for the devices that are left"
        )
    check(
        list(sizes.values()).count(-1) <= 1, f"mesh {sizes} has more than one -1; leave at most one axis to be filled"
    )


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """The mesh over all devices; -1 fills an axis with the devices that are left.

    `UserError` if the sizes do not fit.
    """
    check_axes(data, fsdp, tensor)
    devices, sizes = jax.device_count(), [data, fsdp, tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [devices // fixed if size == -1 else size for size in sizes]
    check(
        np.prod(sizes) == devices,
        f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not use {devices} devices; "
        f"their product must be {devices}",
    )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule for a leaf. An axis that does not divide its dimension leaves that dimension whole."""
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    if not shape:  # counters
        return PartitionSpec()
    return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(rule, shape, strict=False)))


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array of a tree of (abstract) arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_name(path), leaf.shape, mesh)), tree
    )


def model_hooks(mesh: Mesh, dtype: Any) -> tuple[Callable, Callable]:
    """`gather` and `shard` for SiT: one layer's parameters made whole over fsdp, and activations split over the batch.

    gather casts before it gathers, which moves half the bytes in bfloat16.
    """

    def gather(variables):
        def leaf(path, value):
            stacked = spec("blocks/" + _name(path).removeprefix("params/"), (1, *value.shape), mesh)
            own = PartitionSpec(*stacked[1:])
            whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in own))
            return _gather(NamedSharding(mesh, own), NamedSharding(mesh, whole), dtype, value)

        return jax.tree_util.tree_map_with_path(leaf, variables)

    def shard(x_btd):
        return jax.lax.with_sharding_constraint(x_btd, batch_sharding(mesh))

    return gather, shard


def _gather(own: NamedSharding, whole: NamedSharding, dtype: Any, value: jax.Array) -> jax.Array:
    @jax.custom_vjp
    def gathered(value):
        return jax.lax.with_sharding_constraint(value.astype(dtype), whole)

    # The transpose of a plain constraint would constrain the gradient to `whole` too, and so force a full all-reduce.
    def backward(_, gradient):
        return (jax.lax.with_sharding_constraint(gradient.astype(jnp.float32), own),)

    gathered.defvjp(lambda value: (gathered(value), None), backward)
    return gathered(value)


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """Which rows of a batch of `size` this process's devices hold, in order; not always neighbours, on a torus."""
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for (rows,) in held for row in range(size)[rows]})


def put_batch(mesh: Mesh, batch: Any, size: int) -> Any:
    """This process's `own_rows` of a batch of `size` (numpy) -> the global batch, without waiting for the copy."""
    own, sharding = own_rows(mesh, size), batch_sharding(mesh)
    devices, starts = [], []
    for device, (rows,) in sharding.addressable_devices_indices_map((size,)).items():
        devices.append(device)
        starts.append(own.index(rows.start or 0))
    n = size // batch_shards(mesh)  # rows of a device: neighbours in the batch, and so among the process's own

    def put(rows):
        parts = jax.device_put([rows[start : start + n] for start in starts], devices)
        return jax.make_array_from_single_device_arrays((size, *rows.shape[1:]), sharding, parts)

    return jax.tree.map(put, batch)


def spread(mesh: Mesh, batch: Any) -> Any:
    """A whole batch (numpy), equal in every process -> the global batch on the mesh."""
    size = len(jax.tree.leaves(batch)[0])
    own = own_rows(mesh, size)
    return put_batch(mesh, jax.tree.map(lambda rows: rows[own], batch), size)


def per_device(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Turns `apply(params, x_b) -> y_b`, each row by itself, into the same done by every device for its own rows."""
    return lambda apply: jax.shard_map(apply, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """A tree of NumPy arrays, equal in every process, whole on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)
