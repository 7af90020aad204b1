"""Estimates how long a compiled program takes on a chip whose attainable figures are known.

A kernel takes the longest of three times: its FLOPs at the rate of products of its precision, its
bytes at the bandwidth of its kind of access, and its elements (operations, elements of rows, zeros
to fill) at theirs. Bytes that a product writes beside its result are added to the time of its
FLOPs. A launch and an iteration of a loop also have their costs.
Kernels run one after another. Transfers between devices that run in the background hide behind
them; no speed of transfers was measured, so they take the links at their data-sheet peak.
"""

import collections
import dataclasses
from collections.abc import Iterable

from sit_jax.jobs.preflight.chips import Attainable, Chip
from sit_jax.jobs.preflight.hlo import Program
from sit_jax.jobs.preflight.kernels import KINDS, Kernel, kernels

LARGEST = 20  # kernels listed


@dataclasses.dataclass(frozen=True)
class KindTime:
    """The kernels of one kind: how long all of them take, and how many run."""

    seconds: float
    count: int


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Equal kernels of one line of the model, or of the optimizer."""

    name: str  # of the first, in the compiled text
    kind: str
    seconds: float  # of all executions
    count: int
    bytes: int  # of one execution
    flops: int
    origin: str  # jax's name of the line


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of one run of a program."""

    seconds: float
    kinds: dict[str, KindTime]  # largest first; loops are what their iterations cost
    largest: list[KernelTime]
    source: str  # of the attainable figures


def estimate(program: Program, chip: Chip) -> Estimate | None:
    """Return the estimate; None for a chip without attainable figures."""
    if chip.attainable is None:
        return None
    times = kernel_times(kernels(program), chip.attainable)
    kinds = {kind: _sum(time for time in times if time.kind == kind) for kind in KINDS}
    links = {False: 0.0, True: 0.0}  # by whether they are in the background
    for transfer in program.collectives:
        seconds = transfer.times * transfer.sent / chip.link_bandwidth
        links[transfer.in_background] += seconds
    kinds["links"] = KindTime(links[False], sum(c.times for c in program.collectives))
    iterations = program.iterations
    kinds["loops"] = KindTime(iterations * chip.attainable.iteration, iterations)
    by_time = sorted(kinds.items(), key=lambda item: -item[1].seconds)
    return Estimate(
        seconds=max(sum(time.seconds for time in kinds.values()), links[True]),
        kinds={kind: time for kind, time in by_time if time.count},
        largest=times[:LARGEST],
        source=chip.attainable.source,
    )


def seconds_of(kernel: Kernel, attainable: Attainable) -> float:
    """Return how long one execution of a kernel takes."""
    bandwidth = attainable.bandwidth[kernel.access]
    computing = sum(count / attainable.flops[rate] for rate, count in kernel.flops.items())
    counting = [count / attainable.elements[rate] for rate, count in kernel.elements.items()]
    waiting = kernel.beside / bandwidth  # not hidden behind the product
    return max(computing + waiting, kernel.bytes / bandwidth, *counting) + attainable.launch


def kernel_times(found: Iterable[Kernel], attainable: Attainable) -> list[KernelTime]:
    """Return the times of kernels, equal ones together, the longest first.

    Equal kernels are those of one origin and cost: a layer's, where the layers are not a loop.
    """
    groups: dict[object, list[Kernel]] = collections.defaultdict(list)
    for kernel in found:
        cost = (kernel.bytes, *kernel.flops.items(), *kernel.elements.items())
        groups[kernel.kind, kernel.access, kernel.origin, cost].append(kernel)
    times = []
    for first, *others in groups.values():
        count = first.times + sum(kernel.times for kernel in others)
        time = KernelTime(
            name=first.name,
            kind=first.kind,
            seconds=count * seconds_of(first, attainable),
            count=count,
            bytes=first.bytes,
            flops=sum(first.flops.values()),
            origin=first.origin,
        )
        times.append(time)
    return sorted(times, key=lambda time: -time.seconds)


def _sum(times: Iterable[KernelTime]) -> KindTime:
    total = list(times)
    return KindTime(sum(time.seconds for time in total), sum(time.count for time in total))
