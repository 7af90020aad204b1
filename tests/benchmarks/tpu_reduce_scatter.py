"""What the TPU compiler makes of a weight's gradient that each device needs a part of: bytes that a device sends.

    python tests/benchmarks/tpu_reduce_scatter.py [--topology v5e:4x4 ...]

The weight [2304, 9216] of one layer lies split over all devices and is gathered for use. Its gradient is asked for
split again: by a sharding constraint, and, in shard_map, by all_gather's transpose, an explicit psum_scatter.
Reducing and scattering [2304, 9216] in bfloat16 takes each device 42 MB; an all-reduce takes 85. Needs libtpu, no TPU.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight import job as preflight


def gradient(mesh, explicit: bool, rows: int):
    """The jitted gradient with respect to the weight, `rows` rows of input a device."""
    whole = NamedSharding(mesh, P())

    def product(w, x):
        return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True))

    def loss(w, x):
        if explicit:
            y = jax.shard_map(
                product, mesh=mesh, in_specs=(P("fsdp"), P("fsdp")), out_specs=P("fsdp")
            )(w, x)
        else:
            y = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole))
        return y.astype(jnp.float32).sum()

    own = NamedSharding(mesh, P("fsdp"))
    w = jax.ShapeDtypeStruct((2304, 9216), jnp.bfloat16, sharding=own)
    x = jax.ShapeDtypeStruct((rows * mesh.size, 2304), jnp.bfloat16, sharding=own)
    return jax.jit(jax.grad(loss), out_shardings=own).lower(w, x).compile()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", nargs="+", default=["v5e:4x4", "v5e:16x16", "v5p:4x4x4"])
    preflight.leave_devices_alone()
    for topology in parser.parse_args().topology:
        _, devices = preflight.open_topology(topology)
        mesh = jax.make_mesh(
            (len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices
        )
        for name, explicit in (("constraint", False), ("psum_scatter", True)):
            table = hlo.by_kind(
                hlo.Program(gradient(mesh, explicit, rows=1024).as_text()).collectives
            )
            sent = {
                kind: f"{(moved['in_loop'] + moved['outside']) / 1e6:.0f} MB"
                for kind, moved in table.items()
            }
            print(f"{topology:10} {name:13} {sent}", flush=True)


if __name__ == "__main__":
    main()
