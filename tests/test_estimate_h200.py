"""estimate: recorded programs, against traces of them on an H200."""

import collections
import lzma
import pathlib

import pytest

from sit_jax.jobs.preflight import estimate, hlo, kernels
from sit_jax.jobs.preflight.chips import CHIPS

H200 = next(chip for chip in CHIPS if chip.name == "h200")


def recorded(name):
    """Return XL/2's training step in bfloat16, as jax 0.11.2 compiled it on an H200.

    "scanned" is a loop over the layers at batch 128, before all leads; "unrolled" has 28 unrolled
    layers and batch 256, after all but the last two. The tests' times are sums of kernels in a
    trace of it, in ms; tests/benchmarks/README.md says more.
    """
    packed = (pathlib.Path(__file__).parent / "h200" / f"{name}.hlo.xz").read_bytes()
    return hlo.Program(lzma.decompress(packed).decode())


def rate_of(kernel):
    """Return the rate that limits a kernel of the recorded steps on an H200."""
    if kernel.flops:
        return max(kernel.flops, key=kernel.flops.get)
    if kernel.elements.get("operations", 0) > 2.5 * kernel.bytes:
        return "operations"  # GELU and its derivative
    return next((name for name in ("fills", "rows") if name in kernel.elements), kernel.access)


@pytest.mark.parametrize(
    ("name", "total", "milliseconds"),
    [
        (
            "scanned",
            258.1,
            {
                "bfloat16": 73.6,
                "bfloat16 to float32": 43.1,
                "attention forward": 9.3,
                "attention backward": 18.3,
                "operations": 6.7,
                "rows": 27.7,
                "elementwise": 47.1,
                "copies": 18.7,
                "fills": 12.2,
            },
        ),
        (
            "unrolled",
            404.0,
            {
                "bfloat16": 158.6,
                "bfloat16 to float32": 90.7,
                "attention forward": 9.6,
                "attention backward": 38.4,
                "operations": 36.0,
                "sums": 18.6,
                "rows": 4.8,
                "elementwise": 43.0,
            },
        ),
    ],
)
def test_the_estimate_is_near_what_an_h200_took(name, total, milliseconds):
    """The total lands within 10 %, and the kernels of each rate within 15 %."""
    step = recorded(name)
    assert 1e3 * estimate.estimate(step, H200).seconds == pytest.approx(total, rel=0.1)
    found = collections.Counter()
    for kernel in kernels.kernels(step):
        seconds = estimate.seconds_of(kernel, H200.attainable)
        found[rate_of(kernel)] += 1e3 * kernel.times * seconds
    for rate, want in milliseconds.items():
        assert found[rate] == pytest.approx(want, rel=0.15), rate
