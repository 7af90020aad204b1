"""Attention on a TPU, by the compiler's figures: the model's own einsums against the two Pallas kernels of jax.

    python tests/benchmarks/tpu_attention.py [--topology v5e:1x1]

Forward and backward of one layer's attention as SiT-XL/2 meets it on a chip of v5e:4x4 at batch 256: 16 images, 16
heads of 72, in bfloat16, 256 or 1,024 tokens. Needs libtpu, no TPU. What stays on the chip is no HBM traffic.
"""

import argparse

import jax
import jax.numpy as jnp

from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight import job as preflight
from sit_jax.models import attention


def flash(q_bsth, k_bsth, v_bsth):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    return flash_attention(q_bsth, k_bsth, v_bsth, sm_scale=q_bsth.shape[-1] ** -0.5)


def measure(attend, tokens: int, device) -> str:
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct((16, 16, tokens, 72), jnp.bfloat16, sharding=sharding)

    def forward_and_back(q, k, v, cotangent):
        out, pull = jax.vjp(jax.checkpoint(attend), q, k, v)
        return out, pull(cotangent)

    compiled = jax.jit(forward_and_back).lower(shape, shape, shape, shape).compile()
    program = hlo.Program(compiled.as_text())
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return (
        f"{temporaries / 1e6:8.1f} MB temporaries  {program.hbm_bytes / 1e6:8.1f} MB HBM traffic  "
        f"{program.flops / 1e9:7.2f} GFLOP  {kernels} kernels"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:1x1")
    preflight.leave_devices_alone()
    _, devices = preflight.open_topology(parser.parse_args().topology)
    for tokens in (256, 1024):
        for name, attend in {
            "einsum": attention.einsum,
            "flash": flash,
            "splash": attention.splash,
        }.items():
            try:
                print(
                    f"{tokens:5d} tokens  {name:7}", measure(attend, tokens, devices[0]), flush=True
                )
            except Exception as error:
                print(
                    f"{tokens:5d} tokens  {name:7} {type(error).__name__}: {str(error).splitlines()[0][:150]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
