"""Sorts the kernels in the trace of a GPU into kinds, by their names.

A kernel is (name, start, end) in nanoseconds. The names are those of XLA, of PyTorch and its
compiler, and of NVIDIA's libraries.
"""

import collections
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from sit_jax.jobs.preflight.kernels import KINDS as ALL_KINDS
from sit_jax.jobs.preflight.kernels import kind_of_words

Kernel = tuple[str, float, float]

KINDS = tuple(kind for kind in ALL_KINDS if kind != "links")
LARGEST = 12  # kernels listed by name

_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|compute_dot_do_o|convert_dq_to_16bits", re.I)
_PRODUCT = re.compile(
    r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|triton_mm|implicit_convolve|cudnn::", re.I
)
_COPY = re.compile(r"memcpy|copy_kernel_cuda|CatArray|nchwToNhwc|nhwcToNchw", re.I)
_FILL = re.compile(r"memset|FillFunctor", re.I)
# A compiler names a kernel after its operations. These are PyTorch's names for some of XLA's.
_AS_XLA = dict.fromkeys(
    ("cat", "clone", "permute", "split", "stack", "unsqueeze", "view"), "copy"
) | dict.fromkeys(("full", "zeros"), "broadcast")
_FRAME = {"", "fused", "fusion", "input", "loop", "per", "poi", "red", "to", "triton", "wrapped"}


def kind_of(name: str) -> str:
    """Return the kind of a kernel: one of `KINDS`. Reductions and norms count as elementwise."""
    if _ATTENTION.search(name):  # first: some of its kernels are made of CUTLASS
        return "attention"
    if _FILL.search(name):
        return "fills"
    if _COPY.search(name):
        return "copies"
    if _PRODUCT.search(name):
        return "products"
    words = set(re.split(r"[\W\d_]+", name.lower())) - _FRAME
    return kind_of_words(_AS_XLA.get(word, word) for word in words)


def busy(kernels: Iterable[Kernel]) -> float:
    """Return the nanoseconds in which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def summary(kernels: Sequence[Kernel], units: int) -> dict:
    """Return the milliseconds of each kind in one of `units` equal steps, and the largest kernels.

    Idle is the time between the first and the last kernel in which none ran. Kernels that overlap
    count in full, so the kinds can add up to more than the rest of the total.
    """
    if not kernels:
        raise ValueError("the trace has no kernel of a GPU")
    names, kinds = collections.Counter(), collections.Counter()
    runs = collections.Counter()
    for name, start, end in kernels:
        kinds[kind_of(name)] += end - start
        names[name] += end - start
        runs[name] += 1
    span = max(end for _, _, end in kernels) - min(start for _, start, _ in kernels)

    def per_unit(nanoseconds: float) -> float:
        return round(nanoseconds / 1e6 / units, 3)

    return {
        "total": per_unit(span),
        "idle": per_unit(span - busy(kernels)),
        **{kind: per_unit(kinds[kind]) for kind in KINDS},
        "largest": [
            {"ms": per_unit(time), "runs": runs[name] / units, "kind": kind_of(name), "name": name}
            for name, time in names.most_common(LARGEST)
        ],
    }


def from_jax(folder: pathlib.Path) -> list[Kernel]:
    """Return the kernels that `jax.profiler.trace` recorded in the folder."""
    from jax.profiler import ProfileData

    kernels = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):  # the others repeat them by operation
                    kernels += [
                        (event.name, event.start_ns, event.start_ns + event.duration_ns)
                        for event in line.events
                    ]
    return kernels


def from_torch(trace: pathlib.Path) -> list[Kernel]:
    """Return the kernels in a trace that `torch.profiler` exported."""
    return [
        (event["name"], event["ts"] * 1e3, (event["ts"] + event["dur"]) * 1e3)
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
