"""One mesh with axes (data, fsdp, tensor), and one table that says how every parameter lies on it.

Batches are split over data and fsdp together; parameters, EMA and both Adam moments by `RULES`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
            size == -1 or size >= 1,
            f"mesh.{axis} is {size}; expected 1 or more, or -1 for the devices that are left",
        )
    check(
        list(sizes.values()).count(-1) <= 1,
        f"mesh {sizes} has more than one -1; leave at most one axis to be filled",
    )


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over `devices`, or all that jax has; -1 fills an axis with the devices that are left.

    `UserError` if the sizes do not fit.
    """
    check_axes(data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), [data, fsdp, tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [count // fixed if size == -1 else size for size in sizes]
    check(
        math.prod(sizes) == count,
        f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not use {count} devices; "
        f"their product must be {count}, with each of them one of {', '.join(map(str, divisors(count)))}",
    )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def divisors(n: int) -> list[int]:
    return [size for size in range(1, n + 1) if n % size == 0]


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
    return PartitionSpec(
        *(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(rule, shape, strict=False))
    )


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array of a tree of (abstract) arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_name(path), leaf.shape, mesh)), tree
    )


def model_hooks(mesh: Mesh, dtype: Any, grad_dtype: Any) -> dict[str, Callable]:
    """SiT's hooks: one layer's parameters made whole over fsdp, activations split over the batch, the condition whole.

    gather casts to `dtype` before it gathers, which moves half the bytes in bfloat16; what it gives has the type that
    gradients are to be added up in, `grad_dtype`, without another bit in it. replicate and broadcast give the
    layers the condition of the whole batch, and split makes the gradient [b, 6d] of what adaLN makes of it whole, from
    which each device makes its own part of the matrix's gradient; otherwise [d, 6d] would be summed over all devices.
    """

    def gather(variables):
        def leaf(path, value):
            stacked = spec("blocks/" + _name(path).removeprefix("params/"), (1, *value.shape), mesh)
            return _gather(mesh, PartitionSpec(*stacked[1:]), dtype, grad_dtype, value)

        return jax.tree_util.tree_map_with_path(leaf, variables)

    def shard(x):
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    def replicate(x):
        return jax.lax.with_sharding_constraint(x, replicated(mesh))

    return {
        "gather": gather,
        "shard": shard,
        "replicate": replicate,
        "broadcast": _conjugate(replicate, shard),
        "split": _conjugate(shard, replicate),
    }


def _conjugate(forward: Callable, backward: Callable) -> Callable:
    """The identity, with one constraint on what goes in and another on the gradient that comes back."""

    @jax.custom_vjp
    def constrained(x):
        return forward(x)

    constrained.defvjp(lambda x: (forward(x), None), lambda _, gradient: (backward(gradient),))
    return constrained


def on_each_device(mesh: Mesh, attend: Callable) -> Callable:
    """`attend` on the part of the batch and of the heads that a device has: the partitioner cannot split a kernel."""
    part = PartitionSpec(("data", "fsdp"), "tensor")
    return jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part, check_vma=False)


def gather_ends(mesh: Mesh, params: Any) -> Any:
    """The parameters with those outside the layers made whole over fsdp, in their own type: they are few.

    Left split, each product with them would move activations, or split the features that the first layer gets.
    """

    def leaf(path, value):
        name, own = _name(path), value.dtype
        return (
            value
            if "blocks/" in name
            else _gather(mesh, spec(name, value.shape, mesh), own, own, value)
        )

    return jax.tree_util.tree_map_with_path(leaf, params)


def _gather(
    mesh: Mesh, own: PartitionSpec, dtype: Any, grad_dtype: Any, value: jax.Array
) -> jax.Array:
    whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in own))

    @jax.custom_vjp
    def gathered(value):
        return jax.lax.with_sharding_constraint(
            value.astype(dtype), NamedSharding(mesh, whole)
        ).astype(grad_dtype)

    # The transpose of a plain constraint would constrain the gradient to `whole` too, and so force a full all-reduce.
    def backward(_, gradient):
        return (
            jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, own)).astype(
                jnp.float32
            ),
        )

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
    n = size // batch_shards(
        mesh
    )  # rows of a device: neighbours in the batch, and so among the process's own

    def put(rows):
        parts = jax.device_put([rows[start : start + n] for start in starts], devices)
        return jax.make_array_from_single_device_arrays((size, *rows.shape[1:]), sharding, parts)

    return jax.tree.map(put, batch)


def shard_global_batch(mesh: Mesh, batch: Any) -> Any:
    """A whole batch (numpy), equal in every process -> the global batch on the mesh."""
    size = len(jax.tree.leaves(batch)[0])
    own = own_rows(mesh, size)
    return put_batch(mesh, jax.tree.map(lambda rows: rows[own], batch), size)


def per_device(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Turns `apply(params, x_b) -> y_b`, each row by itself, into the same done by every device for its own rows."""
    return lambda apply: jax.shard_map(
        apply, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH
    )


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """A tree of NumPy arrays, equal in every process, whole on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)
