"""Compiles a program and reports its memory, FLOPs, traffic and roofline, per device."""

import dataclasses
import time
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from sit_jax import sharding
from sit_jax.jobs import sampler, train
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight.chips import GIB, Chip
from sit_jax.jobs.preflight.estimate import Estimate, estimate
from sit_jax.jobs.preflight.topology import one_line
from sit_jax.jobs.setup import Setup

TRAIN_STEP = "train step"
SAMPLER = "sampler"

# Parts of jax's name of a line that say nothing about it.
_PLUMBING = {
    *("while", "body", "cond", "branch_0_fun", "checkpoint", "closed_call", "eval_jaxpr"),
    *("outer-loop", "checkpointed-no-vjp", "jit(diffeqsolve)"),
}


@dataclasses.dataclass(frozen=True)
class Preflight:
    """The costs of a program on each device, for one training step or one batch of samples.

    Figures are in bytes, FLOPs and seconds.
    """

    program: str  # TRAIN_STEP or SAMPLER
    topology: str
    devices: int
    mesh: dict[str, int]
    batch: int
    remat: str
    fits: bool
    verdict: str  # the compiler's message if it does not fit or does not compile
    hbm: float  # memory of the chip
    params: int
    optimizer: int  # moments and EMA
    compile_seconds: float
    # arguments, temporaries, code, alias, peak
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    model_flops: int | None = None  # of the network's matmuls; None for a sampler
    executed_flops: int = 0
    hbm_traffic: int = 0
    # from hlo.by_kind
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    background: float = 0.0  # fraction of the sent bytes that move during other computation
    data_dependent_loops: int = 0  # loops of unknown length, whose bodies are counted once
    # seconds of compute, hbm, interconnect
    roofline: dict[str, float] = dataclasses.field(default_factory=dict)
    mfu_bound: float | None = None
    images_per_second_bound: float | None = None
    estimate: Estimate | None = None  # None if the chip has no attainable figures
    mfu_estimate: float | None = None
    images_per_second_estimate: float | None = None

    @property
    def images_per_second(self) -> float:
        """Return the estimate, or where there is none the bound; 0 if a program has neither."""
        return self.images_per_second_estimate or self.images_per_second_bound or 0.0

    @property
    def outcome(self) -> str:
        """Return fits, does not fit, or does not compile (for another reason than memory)."""
        if self.fits:
            return "fits"
        lacks_memory = self.memory or self.verdict.startswith("RESOURCE_EXHAUSTED")
        return "does not fit" if lacks_memory else "does not compile"


class _Program(NamedTuple):
    function: jax.stages.Wrapped  # what jax.jit returns
    arguments: tuple  # abstract, with their shardings
    batch: int
    model_flops: int | None  # of the network's matmuls, per device


def examine(setup: Setup, topology: str, chip: Chip, program_name: str = TRAIN_STEP) -> Preflight:
    """Compile a program of the config for the devices of its mesh, and return its costs."""
    state = setup.abstract_state
    program = _train_step(setup) if program_name == TRAIN_STEP else _sampler(setup)
    start = time.perf_counter()
    compiled, verdict = _compile(program)
    report = Preflight(
        program=program_name,
        topology=topology,
        devices=setup.mesh.size,
        mesh=dict(setup.mesh.shape),
        batch=program.batch,
        remat=setup.config.model.remat,
        fits=compiled is not None,
        verdict=verdict,
        hbm=chip.hbm_bytes,
        params=bytes_per_device(state.params),
        optimizer=bytes_per_device((state.opt_state, state.ema)),
        compile_seconds=time.perf_counter() - start,
        model_flops=program.model_flops,
    )
    return _with_costs(report, compiled, chip) if compiled else report


def _train_step(setup: Setup) -> _Program:
    batch = setup.config.train.batch
    return _Program(
        function=cast(jax.stages.Wrapped, train.make_train_step(setup)),
        arguments=(setup.abstract_state, abstract_batch(setup), setup.codec.abstract_params),
        batch=batch,
        model_flops=setup.train_flops * batch // setup.mesh.size,
    )


def _sampler(setup: Setup) -> _Program:
    batch = setup.sample_batch
    rows = jax.ShapeDtypeStruct((batch,), np.int32, sharding=sharding.batch_sharding(setup.mesh))
    params = (setup.abstract_state.params, None)  # None: guidance by the network itself
    return _Program(
        function=cast(jax.stages.Wrapped, sampler.jit_sampler(setup)),
        arguments=(params, setup.codec.abstract_params, rows, rows),
        batch=batch,
        model_flops=None,
    )


def _compile(program: _Program) -> tuple[jax.stages.Compiled | None, str]:
    """Return the compiled program and "", or None and the compiler's message."""
    lowered = program.function.lower(*program.arguments)
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        return None, one_line(error)


def _with_costs(report: Preflight, compiled: jax.stages.Compiled, chip: Chip) -> Preflight:
    """Return the report with the figures that are read from the compiled program."""
    program = hlo.Program(compiled.as_text() or "")
    memory = _memory(compiled)
    fits = memory["peak"] <= chip.hbm_bytes  # a GPU's compiler does not refuse
    needs = f"needs {memory['peak'] / GIB:.2f} GiB of {chip.hbm_bytes / GIB:.2f} GiB"
    sent = sum(c.times * c.sent for c in program.collectives)
    sent_in_background = sum(c.times * c.sent for c in program.collectives if c.in_background)
    roofline = {
        "compute": program.bfloat16_flops / chip.peak_flops,
        "hbm": program.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sent / chip.link_bandwidth,
    }
    bound = max(roofline.values())
    estimated = estimate(program, chip)
    report = dataclasses.replace(
        report,
        fits=fits,
        verdict="" if fits else needs,
        memory=memory,
        executed_flops=program.flops,
        hbm_traffic=program.hbm_bytes,
        collectives=hlo.by_kind(program.collectives),
        background=sent_in_background / max(sent, 1),
        data_dependent_loops=program.unknown_loops,
        roofline=roofline,
        mfu_bound=report.model_flops / chip.peak_flops / bound if report.model_flops else None,
        images_per_second_bound=None if program.unknown_loops else report.batch / bound,
    )
    if estimated is None:
        return report
    seconds = estimated.seconds
    return dataclasses.replace(
        report,
        estimate=estimated,
        mfu_estimate=report.model_flops / chip.peak_flops / seconds if report.model_flops else None,
        images_per_second_estimate=None if program.unknown_loops else report.batch / seconds,
    )


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    stats: Any = compiled.memory_analysis()  # XLA's CompiledMemoryStats
    peak = (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "peak": peak,
    }


def bytes_per_device(tree: Any) -> int:
    """Return the bytes of a tree of abstract arrays that one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def table(report: Preflight) -> str:
    """Return the report as lines of text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    verdict = report.outcome if report.fits else f"{report.outcome}: {report.verdict}"
    rows = [
        ("verdict", verdict),
        ("mesh, batch, remat", f"{mesh}; {report.batch}; {report.remat}"),
        ("parameters", f"{gib(report.params)} a device; optimizer and EMA {gib(report.optimizer)}"),
    ]
    if report.memory:
        rows += _cost_rows(report)
    if report.mfu_bound and report.images_per_second_bound:
        rows.append(("at most", _speed(report.images_per_second_bound, report.mfu_bound)))
    if report.memory:
        rows += _estimate_rows(report)
    if report.data_dependent_loops:
        note = (
            "a loop whose length depends on the data (the solver's) counts once: "
            "costs are of one step"
        )
        rows.append(("note", note))
    rows.append(("compiled in", f"{report.compile_seconds:.1f} s"))
    title = f"{report.program} on {report.topology}, {_counted(report.devices, 'device')}"
    return "\n".join([title, *(f"  {name:<20}{text}" for name, text in rows)])


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _cost_rows(report: Preflight) -> list[tuple[str, str]]:
    """Return the rows that only a compiled program has."""
    parts = ", ".join(
        f"{name} {gib(size)}" for name, size in report.memory.items() if name != "peak"
    )
    rows = [
        ("memory a device", f"{gib(report.memory['peak'])} of {gib(report.hbm)}: {parts}"),
        ("FLOPs", _flops_line(report)),
        ("HBM traffic", f"{report.hbm_traffic / 1e9:.2f} GB"),
    ]
    for kind, sent in report.collectives.items():
        text = f"{sent['in_loop'] / 1e6:.2f} MB in loops, {sent['outside'] / 1e6:.2f} MB outside"
        rows.append((kind, f"{text}, {_counted(sent['count'], 'transfer')}"))
    if report.collectives:
        rows.append(("in the background", f"{report.background:.0%} of the bytes sent"))
    slowest = max(report.roofline, key=lambda unit: report.roofline[unit])
    times = ", ".join(f"{unit} {1e3 * seconds:.1f} ms" for unit, seconds in report.roofline.items())
    rows.append(("roofline", f"{times}: bound by {slowest}"))
    return rows


def _estimate_rows(report: Preflight) -> list[tuple[str, str]]:
    estimated = report.estimate
    if estimated is None:
        chip = report.topology.partition(":")[0]
        return [("estimate", f"none: how fast kernels are on {chip} has not been measured")]
    total = f"{1e3 * estimated.seconds:.1f} ms"
    if report.images_per_second_estimate:
        total += f", {_speed(report.images_per_second_estimate, report.mfu_estimate)}"
    rows = [("estimate", f"{total}; kernels' rates: {estimated.source}")]
    for kind, cost in estimated.kinds.items():
        unit = {"loops": "iteration", "links": "transfer"}.get(kind, "kernel")
        share = cost.seconds / estimated.seconds
        row = f"{1e3 * cost.seconds:8.1f} ms {share:6.1%}  {_counted(cost.count, unit)}"
        rows.append((f"  {kind}", row))
    return rows


def kernel_table(estimated: Estimate) -> str:
    """Return the kernels that take longest as lines of text, equal ones in one line."""
    lines = ["  the longest kernels: all runs, each run, its bytes, kind, name, line of the model"]
    for kernel in estimated.largest:
        each = f"{kernel.count:5d} x {1e3 * kernel.seconds / kernel.count:7.3f} ms"
        cost = f"{1e3 * kernel.seconds:8.2f} ms {each} {kernel.bytes / 1e6:8.1f} MB"
        line = "/".join(part for part in kernel.origin.split("/") if part not in _PLUMBING)
        lines.append(f"  {cost}  {kernel.kind:11}  {kernel.name}  {line}".rstrip())
    return "\n".join(lines)


def _speed(images_per_second: float, mfu: float | None) -> str:
    """Format a speed; a sampler has no MFU."""
    images = f"{images_per_second:,.0f} images/s"
    return f"{images}, MFU {mfu:.1%}" if mfu else images


def _flops_line(report: Preflight) -> str:
    executed = f"executed {report.executed_flops / 1e12:.3f} T a device"
    if report.model_flops is None:
        return executed
    ratio = report.executed_flops / report.model_flops
    recomputed = f", {1 - 1 / ratio:.1%} of them recomputed" if ratio > 1 else ""
    return f"model {report.model_flops / 1e12:.3f} T, {executed}: {ratio:.3f} x{recomputed}"


def gib(size: float) -> str:
    """Format a number of bytes: `15.81 GiB`."""
    return f"{size / GIB:.2f} GiB"
