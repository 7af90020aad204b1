"""chips: the peak of each device kind."""

import pytest

from sit_jax.jobs.preflight import chips
from sit_jax.jobs.preflight.gpu_targets import GPU_TARGETS


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v4 lite", 138e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10G", None),
        ("TPU7x", 1153.5e12),  # half a chip: jax counts two devices
        ("cpu", None),
        ("", None),
    ],
)
def test_the_chip_with_the_longest_matching_kind_gives_the_peak(kind, peak):
    chip = chips.chip_of(kind)
    assert (chip and chip.peak_flops) == peak


def test_names_and_kinds_are_unique():
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_a_target_describes_the_chip_of_its_name(name):
    target = GPU_TARGETS[name]
    chip = chips.chip_of(target.device)
    assert chip and chip.name == name
    # The makers give round figures.
    assert target.memory_bandwidth == pytest.approx(chip.hbm_bandwidth, rel=0.01)
    assert target.memory == pytest.approx(chip.hbm_bytes, rel=0.08)
