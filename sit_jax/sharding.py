"""The device mesh with axes (data, fsdp, tensor), and the table that shards every parameter on it.

Batches are split over data and fsdp together; parameters, the EMA and both Adam moments by `RULES`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sit_jax.errors import check

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# The first match wins. A pattern is searched for anywhere in a leaf's path, so that "params/...",
# "ema/..." and ".../mu/..." all follow the same line. The leading axis of blocks/* counts the
# layers. tensor splits the heads and the MLP's hidden features (Megatron, arXiv 1909.08053).
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
    """Raise UserError unless every size is positive, or -1 for at most one of them."""
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    for axis, size in sizes.items():
        check(
            size == -1 or size >= 1,
            f"mesh.{axis} is {size}; expected 1 or more, or -1 for all remaining devices",
        )
    check(
        list(sizes.values()).count(-1) <= 1,
        f"mesh {sizes} has more than one -1; leave at most one axis to be filled",
    )


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return the mesh over `devices`, by default all that jax has.

    A size of -1 gives that axis all remaining devices. Raises UserError if the sizes do not
    multiply to the number of devices.
    """
    check_axes(data, fsdp, tensor)
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = (data, fsdp, tensor)
    fixed = math.prod(size for size in sizes if size != -1)
    filled = tuple(count // fixed if size == -1 else size for size in sizes)
    check(
        math.prod(filled) == count,
        f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not use {count} devices; "
        f"their product must be {count}, so each of them is one of "
        f"{', '.join(map(str, divisors(count)))}; --config.mesh.data=-1 --config.mesh.fsdp=1 "
        "--config.mesh.tensor=1 fits any number",
    )
    return jax.make_mesh(filled, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def divisors(n: int) -> list[int]:
    """Return the divisors of `n` in ascending order."""
    return [size for size in range(1, n + 1) if n % size == 0]


def batch_shards(mesh: Mesh) -> int:
    """Return the number of devices over which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a complete copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of a leaf by `RULES`.

    A dimension that the size of its axis does not divide stays unsplit.
    """
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    if not shape:  # counters
        return PartitionSpec()
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(rule, shape, strict=False)
        )
    )


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the NamedSharding of every leaf of a tree of (abstract) arrays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_name(path), leaf.shape, mesh)), tree
    )


class ModelHooks(NamedTuple):
    """The functions with which SiT places arrays on the mesh; `model_hooks` explains each."""

    gather: Callable
    shard: Callable
    replicate: Callable
    broadcast: Callable
    split: Callable


def model_hooks(mesh: Mesh, dtype: Any, grad_dtype: Any) -> ModelHooks:
    """Return SiT's hooks, which place one layer's parameters and the activations on the mesh.

    Shapes: b the global batch, d the width. `gather` takes the parameters of one layer; `shard`
    takes activations [b, ...]; `replicate` and `broadcast` take the condition [b, d]; `split` takes
    adaLN's output [b, 6d].
    """
    # gather: a kernel [d, ...] that is split over fsdp becomes complete just before its layer runs.
    # It is cast to `dtype` before, which halves the bytes sent if that is bfloat16, and afterwards
    # to `grad_dtype`, which adds no precision: a gradient has the dtype of its value, so that is
    # the dtype in which devices add up gradients.
    #
    # adaLN computes [b, d] @ [d, 6d] -> [b, 6d]. With both factors of the kernel's gradient split
    # over the batch, each device would get a partial sum [d, 6d], to be added up over all devices.
    # Instead every device holds the entire condition [b, d] (replicate, broadcast) and the entire
    # gradient of the output [b, 6d] (split, backwards). From these each device computes its own
    # slice of the kernel's gradient, and nothing that large is reduced. Forwards, split leaves
    # [b, 6d] split over the batch; backwards, broadcast does that to the condition's gradient.

    def gather(variables: Any) -> Any:
        def gather_leaf(path: tuple, value: jax.Array) -> jax.Array:
            # RULES are for stacked layers: add their axis to look the leaf up, then drop it.
            name = "blocks/" + _name(path).removeprefix("params/")
            stacked = spec(name, (1, *value.shape), mesh)
            return _gather(mesh, PartitionSpec(*stacked[1:]), dtype, grad_dtype, value)

        return jax.tree_util.tree_map_with_path(gather_leaf, variables)

    def shard(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))

    def replicate(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, replicated(mesh))

    return ModelHooks(
        gather,
        shard,
        replicate,
        broadcast=_conjugate(replicate, shard),
        split=_conjugate(shard, replicate),
    )


def local_hooks(dtype: Any, grad_dtype: Any) -> ModelHooks:
    """Return SiT's hooks inside `solve_per_device`: `gather` only casts, and nothing is placed."""

    def gather(variables: Any) -> Any:
        return jax.tree.map(lambda value: value.astype(dtype).astype(grad_dtype), variables)

    return ModelHooks(gather, *[lambda x: x] * 4)


def _conjugate(forward: Callable, backward: Callable) -> Callable:
    """Return the identity, with one constraint on its input and another on its gradient."""
    # For x [b, ...] the value of `constrained` is x, placed on the mesh by `forward`; its gradient
    # [b, ...] passes through unchanged, placed by `backward`. with_sharding_constraint by itself
    # puts the same constraint on both, hence the custom_vjp. Its forward rule returns (value,
    # residuals): none are needed, as the derivative is the identity. Its backward rule returns a
    # tuple with one gradient per argument.

    @jax.custom_vjp
    def constrained(x: jax.Array) -> jax.Array:
        return forward(x)

    constrained.defvjp(lambda x: (forward(x), None), lambda _, gradient: (backward(gradient),))
    return constrained


def on_each_device(mesh: Mesh, attend: Callable) -> Callable:
    """Return `attend` mapped over the devices, each with its own part of the batch and heads.

    The partitioner cannot split a hand-written kernel by itself.
    """
    part = PartitionSpec(("data", "fsdp"), "tensor")
    return jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part, check_vma=False)


def gather_ends(mesh: Mesh, params: Any) -> Any:
    """Gather the parameters outside the layers over fsdp, in their own dtype.

    They are few. If they stayed split, each product with them would move activations instead, or
    would split the features that the first layer gets.
    """

    def gather_leaf(path: tuple, value: jax.Array) -> jax.Array:
        name = _name(path)
        if "blocks/" in name:
            return value
        return _gather(mesh, spec(name, value.shape, mesh), value.dtype, value.dtype, value)

    return jax.tree_util.tree_map_with_path(gather_leaf, params)


def _gather(
    mesh: Mesh, partition: PartitionSpec, dtype: Any, grad_dtype: Any, value: jax.Array
) -> jax.Array:
    # Forwards, `value` (float32, split by `partition`) becomes complete over fsdp: an all-gather of
    # `dtype`. Backwards, its gradient should only be reduced and scattered, so that each device
    # keeps the slice it owns. The transpose of a plain constraint would make the gradient complete
    # over fsdp too, and so force an all-reduce of it. The custom_vjp constrains the gradient to
    # `partition` instead, and returns it in float32, the dtype of the parameter.
    complete = PartitionSpec(*(None if axis == "fsdp" else axis for axis in partition))

    @jax.custom_vjp
    def gathered(value: jax.Array) -> jax.Array:
        cast = value.astype(dtype)
        cast = jax.lax.with_sharding_constraint(cast, NamedSharding(mesh, complete))
        return cast.astype(grad_dtype)

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        gradient = jax.lax.with_sharding_constraint(gradient, NamedSharding(mesh, partition))
        return (gradient.astype(jnp.float32),)

    gathered.defvjp(lambda value: (gathered(value), None), backward)
    return gathered(value)


def _rows_of_devices(mesh: Mesh, size: int) -> dict[jax.Device, range]:
    """Return the rows of a batch of `size` that each of this process's devices holds."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return {device: range(size)[index[0]] for device, index in indices.items() if index}


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """Return the rows of a batch of `size` that this process's devices hold, in ascending order.

    They are not always contiguous: on a torus the devices of a host may be apart in the mesh.
    """
    return sorted({row for rows in _rows_of_devices(mesh, size).values() for row in rows})


def put_batch(mesh: Mesh, batch: Any, size: int) -> Any:
    """Return the global batch of `size` rows, given this process's `own_rows` of it (numpy).

    Does not wait for the copy to the devices.
    """
    # A leaf of `batch` has shape [len(own), ...]: the rows of this process's devices, in ascending
    # order. A device holds `count` contiguous rows of the global batch, which are therefore
    # contiguous in the leaf as well, from `start` on. Devices along the tensor axis hold the same
    # rows. One device_put of all slices starts every copy without waiting; the slices, once on
    # their devices, are declared to be the shards of a global array [size, ...].
    rows_of_devices = _rows_of_devices(mesh, size)
    own = own_rows(mesh, size)
    devices = list(rows_of_devices)
    starts = [own.index(rows.start) for rows in rows_of_devices.values()]
    count = size // batch_shards(mesh)
    sharding = batch_sharding(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        parts = jax.device_put([rows[start : start + count] for start in starts], devices)
        return jax.make_array_from_single_device_arrays((size, *rows.shape[1:]), sharding, parts)

    return jax.tree.map(put, batch)


def shard_global_batch(mesh: Mesh, batch: Any) -> Any:
    """Return the global batch, given a complete one (numpy) that is equal in every process."""
    size = len(jax.tree.leaves(batch)[0])
    own = own_rows(mesh, size)
    return put_batch(mesh, jax.tree.map(lambda rows: rows[own], batch), size)


def per_device(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Return a decorator for `apply(params, x_b) -> y_b`, which treats each row independently.

    The decorated function applies it on every device to the device's own rows, with replicated
    `params`.
    """
    return lambda apply: jax.shard_map(
        apply, mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=BATCH
    )


def is_data_parallel(mesh: Mesh) -> bool:
    """Return True if every device holds all parameters, and only the batch is split."""
    return mesh.shape["data"] == mesh.size


def solve_per_device(mesh: Mesh, solve: Callable) -> Callable:
    """Return `solve(weights, batch) -> (a tree of rows, n)`, run on every device separately.

    Each device takes all weights and its own rows of the batch, and the n that is returned is the
    largest. No device waits for another one, and all run the program that a single device would:
    the rows do not depend on the number of devices, not even by rounding.
    """

    def solve_rows(weights: Any, batch: Any) -> tuple[Any, jax.Array]:
        rows, n = solve(weights, batch)
        return rows, n[None]

    # check_vma: the loops of the solvers mix what is equal on all devices with what is not.
    mapped = jax.shard_map(
        solve_rows,
        mesh=mesh,
        in_specs=(PartitionSpec(), BATCH),
        out_specs=(BATCH, BATCH),
        check_vma=False,
    )

    def solve_all(weights: Any, batch: Any) -> tuple[Any, jax.Array]:
        rows, n_of_devices = mapped(weights, batch)
        return rows, jnp.max(n_of_devices)

    return solve_all


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Put a tree of NumPy arrays, equal in every process, on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), tree)
