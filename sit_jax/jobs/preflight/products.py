"""The FLOPs of matrix products, convolutions and attention kernels, from a compiled program.

A product is an instruction of XLA (`dot`, `convolution`), which the compiler computes by itself, or
a call of a library: cuBLAS, cuDNN, a Pallas kernel.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from sit_jax.jobs.preflight.hlo_text import Array, Instruction, first_group

OPCODES = ("dot", "convolution", "custom-call")

# Attention kernels whose text does not give their cost, by the target of the call (cuDNN's) or the
# instruction's name (splash attention's). The figures are how many products of the size of Q K^T
# each computes: forward 2, backward 5.
_ATTENTION_TARGETS = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
_ATTENTION_NAMES = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}

Operands = Sequence[tuple[Array, ...]]


def flops(product: Instruction, operands: Operands) -> int:
    """Return the FLOPs of an instruction of `OPCODES`, two per multiply-add.

    A call of an unknown kernel counts as its text states, or 0.
    """
    if product.opcode == "convolution":
        return _convolution(product, operands)
    target = call_target(product)
    if product.opcode == "dot" or target.startswith("__cublas$"):
        return _dot(product.arrays[0], operands[0][0], _contracted(product, "lhs"))
    if target.startswith(("__cudnn$convForward", "__cudnn$convBias")):
        return _convolution(product, operands)
    if count := attention_products(product):
        # [batch, heads, tokens, head width], like q
        shape = next(a.shape for a in product.arrays if len(a.shape) == 4)
        return count * 2 * math.prod(shape) * shape[2]
    return int(first_group(r'"cost_estimate":\{"flops":"(\d+)"', product.text) or 0)


def attention_products(call: Instruction) -> int:
    """Return how many products of the size of Q K^T a call computes; 0 if it is not attention."""
    if call.opcode != "custom-call":
        return 0
    if count := _ATTENTION_TARGETS.get(call_target(call)):
        return count
    return next((n for name, n in _ATTENTION_NAMES.items() if call.name.startswith(name)), 0)


def operand_precision(product: Instruction) -> str:
    """Return the precision that jax asked for, in lower case: default, high or highest."""
    if product.opcode == "custom-call":
        stated = first_group(r'"operand_precision":\["(\w+)"', product.text) or ""
    else:
        stated = product.attribute("operand_precision").partition(",")[0]
    return stated.lower() or "default"


def reads_along_contraction(product: Instruction, operands: Operands) -> bool:
    """Return whether the contracted axis of both operands is the contiguous one.

    Only then can a GPU's tensor cores read float32 operands without a transposition.
    """
    for side, operand in zip(("lhs", "rhs"), operands, strict=False):
        contracted = _contracted(product, side)
        innermost = operand[0].layout.partition(",")[0].partition(":")[0]
        if contracted and innermost not in contracted.split(","):
            return False
    return True


def _contracted(product: Instruction, side: str) -> str:
    """Return the dimensions of lhs or rhs that a product sums over: `1,2`; "" if not stated."""
    if product.opcode == "custom-call":
        listed = first_group(rf'"{side}_contracting_dimensions":\[([^\]]*)\]', product.text) or ""
        return listed.replace('"', "")
    return product.attribute(f"{side}_contracting_dims")


def without_workspace(results: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the results of a call of cuBLAS without its workspace, the last array.

    Two arrays are left where the call also keeps the operand of the GELU that it applies.
    """
    return results[:-1] if len(results) > 1 else results


def call_target(call: Instruction) -> str:
    """Return which library's function a custom call runs: `__cublas$gemm`."""
    return first_group(r'custom_call_target="([^"]*)"', call.text) or ""


def _dot(out: Array, lhs: Array, contracted: str) -> int:
    """Return the FLOPs of a product, with the dimensions of lhs that are summed over: `1,2`."""
    return (
        2 * math.prod(out.shape) * math.prod(lhs.shape[int(d)] for d in contracted.split(",") if d)
    )


def _convolution(product: Instruction, operands: Operands) -> int:
    lhs, rhs, out = operands[0][0].shape, operands[1][0].shape, product.arrays[0].shape
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", product.attribute("dim_labels"))
    # A batched matrix product is compiled to a convolution whose batch is a dilated spatial
    # dimension. Only the positions where the window meets an element are multiplied.
    positions = 1
    window = product.attribute("window")
    for dimension, label in enumerate(sorted(set(lhs_labels) - set("bf"))):
        positions *= _positions(
            lhs[lhs_labels.index(label)],
            rhs[rhs_labels.index(label)],
            out[out_labels.index(label)],
            _window(window, dimension),
        )
    batch = out[out_labels.index("b")]
    out_features = out[out_labels.index("f")]
    in_features = rhs[rhs_labels.index("i")]
    return 2 * positions * batch * out_features * in_features


class _Window(NamedTuple):
    """How a convolution's window moves along one dimension."""

    stride: int
    pad: int  # before the first element
    lhs_dilate: int
    rhs_dilate: int


def _window(text: str, dimension: int) -> _Window:
    """Parse one dimension of `size=3x3 pad=1_1x0_0`."""

    def value(name: str, default: int) -> int:
        values = first_group(rf"\b{name}=(\S+)", text)
        return int(values.split("x")[dimension].split("_")[0]) if values else default

    return _Window(
        stride=value("stride", 1),
        pad=value("pad", 0),
        lhs_dilate=value("lhs_dilate", 1),
        rhs_dilate=value("rhs_dilate", 1),
    )


@functools.cache
def _positions(lhs: int, rhs: int, out: int, window: _Window) -> int:
    """Return how many pairs (output, window position) of one dimension meet an element of lhs.

    The others meet padding or a gap of the dilation.
    """
    last = (lhs - 1) * window.lhs_dilate
    count = 0
    for o in range(out):
        for w in range(rhs):
            position = o * window.stride - window.pad + w * window.rhs_dilate
            count += 0 <= position <= last and position % window.lhs_dilate == 0
    return count
