"""The makers' figures for each chip, per device as jax counts them."""

import dataclasses

GIB = 2**30


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
    Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9),
    Chip(
        "a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 40e9, 1555e9, 300e9
    ),
    Chip("h100", ("NVIDIA H100",), 989e12, 80e9, 3352e9, 450e9),  # SXM: "NVIDIA H100 80GB HBM3"
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2039e9, 300e9),
    Chip("h100-nvl", ("NVIDIA H100 NVL",), 835e12, 94e9, 3938e9, 300e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9),
    Chip("h200-nvl", ("NVIDIA H200 NVL",), 835e12, 141e9, 4800e9, 450e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with the longest kind that `device_kind` starts with; None if unknown."""
    chips = {kind: chip for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind)}
    return chips[max(chips, key=len)] if chips else None
