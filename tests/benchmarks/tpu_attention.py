"""Compare einsum attention with the two Pallas kernels of jax by the TPU compiler's figures.

    python tests/benchmarks/tpu_attention.py [--topology v5e:1x1]

Takes about 20 s on 2 cores. Needs libtpu (bash launch/test.sh --tpu) but no TPU. Compiles forward
and backward pass of one attention layer of SiT-XL/2, as a chip of v5e:4x4 gets it at batch 256: 16
images, 16 heads of size 72, bfloat16, 256 or 1,024 tokens. Prints temporary memory, HBM traffic
(which excludes data that stays on the chip), FLOPs and the number of kernels.
"""

import argparse

import jax
import jax.numpy as jnp

from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight.topology import leave_devices_alone, open_topology
from sit_jax.models import attention


def flash(q_bsth, k_bsth, v_bsth):
    """Attend with jax's Pallas flash attention."""
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return flash_attention(q_bsth, k_bsth, v_bsth, sm_scale=q_bsth.shape[-1] ** -0.5)


def measure(attend, tokens: int, device) -> str:
    """Compile the forward and backward pass of `attend` and return the compiler's figures."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct((16, 16, tokens, 72), jnp.bfloat16, sharding=sharding)

    def forward_and_backward(q, k, v, cotangent):
        out, backward = jax.vjp(jax.checkpoint(attend), q, k, v)
        return out, backward(cotangent)

    compiled = jax.jit(forward_and_backward).lower(shape, shape, shape, shape).compile()
    program = hlo.Program(compiled.as_text())
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return (
        f"{temporaries / 1e6:8.1f} MB temporaries  {program.hbm_bytes / 1e6:8.1f} MB HBM traffic  "
        f"{program.flops / 1e9:7.2f} GFLOP  {kernels} kernels"
    )


KERNELS = {"einsum": attention.einsum, "flash": flash, "splash": attention.splash}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:1x1", help="default: %(default)s")
    topology = parser.parse_args().topology
    leave_devices_alone()
    _, devices = open_topology(topology)
    for tokens in (256, 1024):
        for name, attend in KERNELS.items():
            try:
                figures = measure(attend, tokens, devices[0])
            except Exception as error:  # a kernel that does not compile is a result, too
                figures = f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
            print(f"{tokens:5d} tokens  {name:7} {figures}", flush=True)


if __name__ == "__main__":
    main()
