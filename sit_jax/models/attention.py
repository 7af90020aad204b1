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


KERNELS: dict[str, Callable] = {"einsum": einsum, "splash": splash, "cudnn": cudnn}


def _is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    # jax's private name; tests/models/test_remat.py fails if it changes.
    return primitive.name == "dot_product_attention_fwd_wrapper"


_named = jax.checkpoint_policies.save_only_these_names("attention")
# For each kernel a policy of jax that saves what its backward pass needs of the forward pass, so
# that the kernel does not run again. cuDNN's also needs the softmax's statistics, which come with
# its output, and that would be saved twice if its name were. einsum's softmax is cheap to repeat.
KEPT: dict[str, Callable] = {"einsum": _named, "splash": _named, "cudnn": _is_cudnn_forward}


def choose(platform: str, dtype: str, tokens: int) -> str:
    """Return the name of the kernel that is cheapest according to the compilers.

    tests/benchmarks/tpu_attention.py compiles and compares them. At 256 tokens the TPU's compiler
    keeps the logits on the chip by itself, without the padding of a head to 128 channels that
    splash needs.
    """
    if dtype != "bfloat16":
        return "einsum"
    if platform == "tpu" and tokens >= 1024 and tokens % 128 == 0:
        return "splash"
    return "cudnn" if platform in ("gpu", "cuda") else "einsum"
