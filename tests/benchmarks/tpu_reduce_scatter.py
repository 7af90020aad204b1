"""Measure the bytes that a TPU sends to reduce-scatter a weight's gradient, as compiled.

    python tests/benchmarks/tpu_reduce_scatter.py [--topology v5e:4x4 ...]

Takes about a minute on 2 cores. Needs libtpu (bash launch/test.sh --tpu) but no TPU. The weight
[2304, 9216] of one layer is sharded over all devices and gathered for use. Its gradient must be
sharded again: by a sharding constraint, or in shard_map by the transpose of all_gather, which is an
explicit psum_scatter. A reduce-scatter of [2304, 9216] in bfloat16 sends 42 MB per device; an
all-reduce sends 85.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight.topology import leave_devices_alone, open_topology


def gradient(mesh, explicit: bool, rows: int):
    """Compile the gradient with respect to the weight, with `rows` rows of input per device."""
    replicated = NamedSharding(mesh, P())

    def product(w, x):
        return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True))

    def loss(w, x):
        if explicit:
            y = jax.shard_map(
                product, mesh=mesh, in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp")
            )(w, x)
        else:
            y = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, replicated))
        return y.astype(jnp.float32).sum()

    sharded = NamedSharding(mesh, P("fsdp"))
    w = jax.ShapeDtypeStruct((2304, 9216), jnp.bfloat16, sharding=sharded)
    x = jax.ShapeDtypeStruct((rows * mesh.size, 2304), jnp.bfloat16, sharding=sharded)
    return jax.jit(jax.grad(loss), out_shardings=sharded).lower(w, x).compile()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["v5e:4x4", "v5e:16x16", "v5p:4x4x4"]
    parser.add_argument(
        "--topology", nargs="+", default=default, help=f"default: {' '.join(default)}"
    )
    topologies = parser.parse_args().topology
    leave_devices_alone()
    for topology in topologies:
        _, devices = open_topology(topology)
        mesh = jax.make_mesh(
            (len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices
        )
        for name, explicit in (("constraint", False), ("psum_scatter", True)):
            program = hlo.Program(gradient(mesh, explicit, rows=1024).as_text())
            table = hlo.by_kind(program.collectives)
            sent = {
                kind: f"{(moved['in_loop'] + moved['outside']) / 1e6:.0f} MB"
                for kind, moved in table.items()
            }
            print(f"{topology:10} {name:13} {sent}", flush=True)


if __name__ == "__main__":
    main()
