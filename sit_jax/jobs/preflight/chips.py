"""Figures of each chip, per device as jax counts them: the makers', and for some measured ones."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Attainable:
    """What kernels reach on a chip. `kernels` says which kernel has which rate."""

    # FLOP/s of products by precision, and of cuDNN's attention by direction. "bfloat16 to float32"
    # are products with a float32 result, nearly all of them gradients of weights: few outputs for
    # so many multiprocessors, each a long sum. In a "tf32 transposed" product, the contracted axis
    # of an operand is not contiguous.
    flops: Mapping[str, float]
    # bytes/s of HBM: elementwise loops and reductions; "sums": LayerNorm's backward pass, if one
    # kernel also sums over the tokens; copies, slices and concatenations
    bandwidth: Mapping[str, float]
    # elements/s. "operations": one operation (a convert, a multiply, a tanh ...) of one element.
    # "rows": array elements that a Triton kernel around a reduction over rows (LayerNorm, softmax)
    # reads and writes. "fills": elements that a loop fills with zeros
    elements: Mapping[str, float]
    launch: float  # seconds that every kernel takes longer
    iteration: float  # seconds that every iteration of a loop takes longer
    source: str


# From traces of the XL/2 training step (bfloat16) on H200s, jax 0.11.2: two programs of batch 128
# and three of batch 256; "tf32" from traces of samplers. Where programs or kernels differ, the rate
# is that of all together, and their range is given. tests/benchmarks/README.md compares the
# estimates with what was measured.
_H200 = Attainable(
    flops={
        # 351 TFLOP in 456 ms: 804 at batch 128, 768 and 740 at 256 (a product of side 8192: 790)
        "bfloat16": 769e12,
        "bfloat16 to float32": 654e12,  # 175 TFLOP in 268 ms: 683 and 681, 635 and 648
        "tf32": 375e12,  # PyTorch's sampler, batch 64: 29.2 TFLOP in 77.9 ms
        "tf32 transposed": 296e12,  # ours: 29.8 TFLOP in 100.5 ms
        "float32": 48e12,  # sampling at "highest", batch 64: 691.5 ms, less what TF32 takes beside
        "attention forward": 229e12,  # 256 tokens, heads of 72: 226 to 233
        "attention backward": 144e12,  # with its two helper kernels: 141 to 148
    },
    bandwidth={
        "elementwise": 4.1e12,  # additions 4.2, the optimizer 4.2, sums over tokens or rows 3.8
        "sums": 2.34e12,  # 2.1 to 2.9
        "copies": 3.6e12,  # memcpy 3.9, joining the gradients of q, k and v 2.5
    },
    elements={
        "operations": 7.6e12,  # gelu, by tanh 7.6 or by exp 7.3; its derivative with a sum 8.0
        "rows": 1.0e12,  # 0.7 to 1.5, float32 like bfloat16
        "fills": 844e9,  # four loops: 2.1e11 threads a second, of four elements each
    },
    launch=1.5e-6,  # the shortest kernels take 0.7 to 1.6 us, and 0.5 us pass between two
    iteration=4.4e-6,  # the difference between a loop's idle time and that of unrolled layers
    source="measured on H200s",
)
# The multiprocessors and their clock are the H200's, and so is all that they limit. The rest, which
# the memory limits, has the H200's share of the data sheet's bandwidth.
_H100 = dataclasses.replace(
    _H200,
    bandwidth={
        "elementwise": 4.1e12 * 3352 / 4800,
        "sums": 2.34e12,
        "copies": 3.6e12 * 3352 / 4800,
    },
    source="an H200's, scaled to the H100's memory; not measured",
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are in bytes/s, and FLOP/s are of dense bfloat16 products."""

    name: str  # in a topology: v5e in v5e:4x4
    kinds: tuple[str, ...]  # how jax's `device_kind` begins
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float  # what one device can send over all its links (ICI, NVLink) at once
    topologies: str = ""  # common ones; empty if a topology is only a number of devices
    attainable: Attainable | None = None  # None: no kernel was measured on it


# From Google's TPU documentation and NVIDIA's data sheets. Where these count both directions of ICI
# and NVLink, the table counts one. jax calls a v5p "TPU v5", and counts a tpu7x as two devices.
# Slower variants of a chip have their own, longer kinds, because a wrong peak is worse than none.
_2D = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_3D = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 300e9, _3D),
    Chip("v4i", ("TPU v4 lite",), 138e12, 8 * GIB, 614e9, 100e9),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9, _2D),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 600e9, _3D),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1640e9, 400e9, _2D),
    Chip("tpu7x", ("TPU7x",), 2307e12 / 2, 96 * GIB, 7380e9 / 2, 300e9, _3D),
    Chip("a100-80gb", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9),
    Chip(
        "a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40e9, 1555e9, 300e9
    ),
    # SXM: "NVIDIA H100 80GB HBM3"
    Chip("h100", ("NVIDIA H100",), 989e12, 80e9, 3352e9, 450e9, attainable=_H100),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2039e9, 300e9),
    Chip("h100-nvl", ("NVIDIA H100 NVL",), 835e12, 94e9, 3938e9, 300e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, attainable=_H200),
    Chip("h200-nvl", ("NVIDIA H200 NVL",), 835e12, 141e9, 4800e9, 450e9),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 7700e9, 900e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with the longest kind that `device_kind` starts with; None if unknown."""
    chips = {kind: chip for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)}
    return chips[max(chips, key=len)] if chips else None
