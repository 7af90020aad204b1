"""Softmax attention over all tokens: (q, k, v) [b, heads, tokens, head width] -> like q.

Shape suffixes as in `sit`: s heads, t queries, u keys, h head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.precision import precision


def einsum(q_bsth: jax.Array, k_bsth: jax.Array, v_bsth: jax.Array) -> jax.Array:
    """Compute attention with two einsums and a float32 softmax.

    Heads come before tokens, the layout of batched products, and the scale is applied to q, which
    is smaller than the logits. On one CPU core this is 1.7x as fast as
    jax.nn.dot_product_attention in the forward pass, and 1.15x in forward and backward together.
    """
    product = functools.partial(jnp.einsum, precision=precision(q_bsth.dtype))
    scale = q_bsth.shape[-1] ** -0.5
    logits_bstu = product(
        "bsth,bsuh->bstu", q_bsth * scale, k_bsth, preferred_element_type=jnp.float32
    )
    return product("bstu,bsuh->bsth", jax.nn.softmax(logits_bstu).astype(v_bsth.dtype), v_bsth)


@jax.custom_jvp
def late_softmax(q_bsth: jax.Array, k_bsth: jax.Array, v_bsth: jax.Array) -> jax.Array:
    """Compute attention in the form that XLA runs on all cores of a CPU, for float32.

    XLA hands batched products to YNNPACK. That spreads one over the cores if a row's sum or maximum
    is computed with it, and runs a product of its own on one core only. So the softmax is
    normalised after the product with v (softmax(x) v = exp(x - max) v / sum), and the rule below
    brings such sums into the backward pass. On two cores the forward pass takes 0.6 of the time of
    `einsum`, on one core 0.9; the results agree to rounding.
    """
    e_bstu, inverse_bst1 = _unnormalised(q_bsth, k_bsth)
    return jnp.einsum("bstu,bsuh->bsth", e_bstu, v_bsth) * inverse_bst1


@late_softmax.defjvp
def _late_softmax_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # With P = e / sum, the weights, and dS, the change of the logits:
    # d(P v) = (P * (dS - sum_u(P dS))) v + P dv.
    # Rows of q, rather than of the larger dS, are multiplied by 1/sum.
    q_bsth, k_bsth, v_bsth = primals
    dq_bsth, dk_bsth, dv_bsth = tangents
    e_bstu, inverse_bst1 = _unnormalised(q_bsth, k_bsth)
    out_bsth = jnp.einsum("bstu,bsuh->bsth", e_bstu, v_bsth) * inverse_bst1
    rows_bst1 = inverse_bst1 * q_bsth.shape[-1] ** -0.5
    dlogits_bstu = jnp.einsum("bsth,bsuh->bstu", dq_bsth * rows_bst1, k_bsth)
    dlogits_bstu += jnp.einsum("bsth,bsuh->bstu", q_bsth * rows_bst1, dk_bsth)
    de_bstu = e_bstu * dlogits_bstu
    de_bstu -= e_bstu * (inverse_bst1 * de_bstu.sum(-1, keepdims=True))
    dout_bsth = jnp.einsum("bstu,bsuh->bsth", e_bstu, dv_bsth) * inverse_bst1
    return out_bsth, dout_bsth + jnp.einsum("bstu,bsuh->bsth", de_bstu, v_bsth)


def _unnormalised(q_bsth: jax.Array, k_bsth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return e = exp(logits - their largest) [b, s, t, u] and 1 / sum_u(e) [b, s, t, 1]."""
    # The scale comes after the product here, so that it is part of the same pass as exp.
    logits_bstu = jnp.einsum("bsth,bsuh->bstu", q_bsth, k_bsth) * q_bsth.shape[-1] ** -0.5
    largest_bst1 = jax.lax.stop_gradient(logits_bstu.max(-1, keepdims=True))
    e_bstu = jnp.exp(logits_bstu - largest_bst1)
    return e_bstu, 1 / e_bstu.sum(-1, keepdims=True)


def splash(
    q_bsth: jax.Array, k_bsth: jax.Array, v_bsth: jax.Array, interpret: bool = False
) -> jax.Array:
    """Compute attention with jax's Pallas kernel for TPUs, whose logits never reach main memory.

    It has no forward-mode derivative. `interpret` emulates the kernel on any device, slowly.
    """
    # Imported here because Pallas takes long to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    _, heads, tokens, width = q_bsth.shape
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((tokens, tokens))] * heads
    )
    block = next(size for size in (512, 256, 128) if tokens % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    attend = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=interpret
    )
    with jax.default_matmul_precision("default"):  # the kernel refuses any other
        return jax.vmap(attend)(q_bsth * width**-0.5, k_bsth, v_bsth).astype(v_bsth.dtype)


def cudnn(q_bsth: jax.Array, k_bsth: jax.Array, v_bsth: jax.Array) -> jax.Array:
    """Compute attention with cuDNN's fused kernel for NVIDIA GPUs, which takes 16-bit types only.

    It has no forward-mode derivative.
    """
    q_btsh, k_btsh, v_btsh = (x.transpose(0, 2, 1, 3) for x in (q_bsth, k_bsth, v_bsth))
    out_btsh = jax.nn.dot_product_attention(q_btsh, k_btsh, v_btsh, implementation="cudnn")
    return out_btsh.transpose(0, 2, 1, 3)


KERNELS: dict[str, Callable] = {
    "einsum": einsum,
    "late_softmax": late_softmax,
    "splash": splash,
    "cudnn": cudnn,
}
# Those that XLA itself can split over devices, since they consist of its own operations.
SPLITTABLE = ("einsum", "late_softmax")


def _is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    # jax's private name; tests/models/test_remat.py fails if it changes.
    return primitive.name == "dot_product_attention_fwd_wrapper"


_named = jax.checkpoint_policies.save_only_these_names("attention")
# For each kernel a policy of jax that saves what its backward pass needs of the forward pass, so
# that the kernel does not run again. cuDNN's also needs the softmax's statistics, which come with
# its output; the output's name is not kept as well, since that would save it twice. The softmax of
# einsums is cheap to repeat.
KEPT: dict[str, Callable] = {
    "einsum": _named,
    "late_softmax": _named,
    "splash": _named,
    "cudnn": _is_cudnn_forward,
}


def choose(platform: str, dtype: str, tokens: int, head_width: int) -> str:
    """Return the name of the fastest kernel: measured on a CPU and an H200, compiled for TPUs.

    tests/benchmarks/tpu_attention.py compiles and compares them. At 256 tokens the TPU's compiler
    keeps the logits on the chip by itself, without the padding of a head to 128 channels that
    splash needs. cuDNN takes heads of a multiple of 8 channels, up to 128 on all GPUs.
    """
    if dtype != "bfloat16":
        return "late_softmax" if platform == "cpu" else "einsum"
    if platform == "tpu" and tokens >= 1024 and tokens % 128 == 0:
        return "splash"
    fits_cudnn = platform == "gpu" and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if fits_cudnn else "einsum"
