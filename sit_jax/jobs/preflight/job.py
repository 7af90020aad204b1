"""`--mode preflight`: compiles the real programs for chips that are not here, and says whether they fit and how fast.

The compiler is the chip's own (libtpu, or the CUDA plugin), so the memory verdict is what a run would meet. The rest is
read from the compiled program (`sit_jax.hlo`) and from the makers' figures (`sit_jax.chips`). The roofline takes each
unit at its peak and all of them at once: a run can be slower than that, never faster, as far as the HBM traffic is
what the program's kernels read and write.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from tqdm import tqdm

from sit_jax import sharding, storage
from sit_jax.errors import UserError, check
from sit_jax.jobs import sampler, train
from sit_jax.jobs.preflight import hlo
from sit_jax.jobs.preflight.chips import CHIPS, GIB, Chip
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.settings import Config

# XLA's description of an H100 SXM: what its GPU compiler asks a device for when there is one.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "sm_90"
"""
_GPU_TARGETS = {"h100": _H100}


def leave_devices_alone() -> None:
    """Keeps jax on the CPU and libtpu from looking for a TPU; to be called before either has started."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = (
        "1"  # a compiler is no device: a training run beside it keeps its own
    )
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v5litepod-16"
    )  # unset, libtpu warns that it does not know it
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # its programs are for devices that are here


def known_topologies() -> str:
    """All that a message can list: `v5e:1x1 2x2 ..., h100:1 2 4 8`."""
    tpus = [f"{chip.name}:{chip.topologies}" for chip in CHIPS if chip.topologies]
    return ", ".join(tpus + [f"{name}:1 2 4 8" for name in _GPU_TARGETS])


def open_topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """The chip and the devices of `v5e:4x4`, `h100:8`. They can be compiled for, not computed on.

    `UserError` for an unknown one, or if the chip's compiler is not installed.
    """
    kind, _, layout = name.partition(":")
    chip = next(
        (chip for chip in CHIPS if chip.name == kind and (chip.topologies or kind in _GPU_TARGETS)),
        None,
    )
    valid = re.fullmatch(r"\d+(x\d+)*" if chip and chip.topologies else r"[1-9]\d*", layout)
    check(chip and valid, f"unknown --topology {name!r}; known: {known_topologies()}")
    return chip, (_tpus if chip.topologies else _gpus)(chip, layout)


def _tpus(chip: Chip, layout: str) -> list[jax.Device]:
    check(
        importlib.util.find_spec("libtpu"),
        'compiling for a TPU needs its compiler, but no TPU: pip install -e ".[tpu]" (jax\'s own libtpu, 137 MB)',
    )
    # Without them the compiler takes a v4 for two devices, where a run sees one, and a host for four chips.
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    if set(layout.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(f"{chip.name}:{layout}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology {chip.name}:{layout} is none for libtpu ({_one_line(error)}); known: {known_topologies()}"
        ) from error


def _gpus(chip: Chip, layout: str) -> list[jax.Device]:
    check(
        _has_cuda(),
        'compiling for an NVIDIA GPU needs the CUDA wheels: pip install -e ".[cuda12]" (5 GB, no GPU needed)',
    )
    target = _GPU_TARGETS[chip.name]
    return topologies.get_topology_desc(
        "gpu", "cuda", target_config=target, topology=f"1x1x{layout}"
    ).devices


def _has_cuda() -> bool:
    return bool(
        importlib.util.find_spec("jax_plugins")
        and importlib.util.find_spec("jax_plugins.xla_cuda12")
    )


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What one program costs on each device. Bytes, FLOPs and seconds; a step of training, or a batch of samples."""

    program: str  # train step | sampler
    topology: str
    devices: int
    mesh: dict[str, int]
    batch: int
    remat: str
    fits: bool
    verdict: str  # the compiler's own words where it does not fit, or does not compile
    hbm: float  # of the chip
    params: int
    optimizer: int  # moments and EMA
    compile_seconds: float
    memory: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # arguments, temporaries, code, alias, peak
    model_flops: int | None = None  # what the network's matmuls need; None for a sampler
    executed_flops: int = 0
    hbm_traffic: int = 0
    collectives: dict[str, dict[str, int]] = dataclasses.field(
        default_factory=dict
    )  # as hlo.by_kind
    background: float = (
        0.0  # share of the collectives' bytes that move while something else is computed
    )
    data_dependent_loops: int = 0  # their bodies count once
    roofline: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # seconds of compute, hbm, interconnect
    mfu_bound: float | None = None
    images_per_second_bound: float | None = None

    @property
    def outcome(self) -> str:
        """fits | does not fit | does not compile: a compiler may fail for other reasons than memory."""
        if self.fits:
            return "fits"
        lacks_memory = self.memory or self.verdict.startswith("RESOURCE_EXHAUSTED")
        return "does not fit" if lacks_memory else "does not compile"


def examine(setup: Setup, topology: str, chip: Chip, program: str = "train step") -> Preflight:
    """Compiles a program of the config for the devices of its mesh."""
    state, codec_params = setup.abstract_state, setup.codec.abstract_params
    is_train = program == "train step"
    if is_train:
        function, arguments = (
            train.make_train_step(setup),
            (state, train.abstract_batch(setup), codec_params),
        )
    else:
        rows = jax.ShapeDtypeStruct(
            (setup.config.sample.batch,), np.int32, sharding=sharding.batch_sharding(setup.mesh)
        )
        function, arguments = (
            sampler.jit_sampler(setup),
            ((state.params, None), codec_params, rows, rows),
        )
    start, devices = time.perf_counter(), setup.mesh.size
    compiled, verdict = _compile(function, arguments)
    train_flops = setup.train_flops * setup.config.train.batch // devices
    found = Preflight(
        program=program,
        topology=topology,
        devices=devices,
        mesh=dict(setup.mesh.shape),
        batch=setup.config.train.batch if is_train else setup.config.sample.batch,
        remat=setup.config.model.remat,
        fits=compiled is not None,
        verdict=verdict,
        hbm=chip.hbm_bytes,
        params=bytes_per_device(state.params),
        optimizer=bytes_per_device((state.opt_state, state.ema)),
        compile_seconds=time.perf_counter() - start,
        model_flops=train_flops if is_train else None,
    )
    return _with_costs(found, compiled, chip) if compiled else found


def _compile(function: Callable, arguments: tuple) -> tuple[Any, str]:
    """The compiled program, and ""; or None, and what the compiler said instead."""
    lowered = function.lower(*arguments)
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        return None, _one_line(error)


def _with_costs(found: Preflight, compiled: Any, chip: Chip) -> Preflight:
    program, stats = hlo.Program(compiled.as_text()), compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
        "peak": stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
        + stats.output_size_in_bytes - stats.alias_size_in_bytes,
    }  # fmt: skip
    fits = memory["peak"] <= chip.hbm_bytes  # a GPU's compiler does not refuse
    sent = sum(c.times * c.sent for c in program.collectives)
    roofline = {
        "compute": program.bfloat16_flops / chip.peak_flops,
        "hbm": program.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sent / chip.link_bandwidth,
    }
    bound = max(roofline.values())
    return dataclasses.replace(
        found,
        fits=fits,
        verdict=""
        if fits
        else f"needs {memory['peak'] / GIB:.2f} GiB of {chip.hbm_bytes / GIB:.2f} GiB",
        memory=memory,
        executed_flops=program.flops,
        hbm_traffic=program.hbm_bytes,
        collectives=hlo.by_kind(program.collectives),
        background=sum(c.times * c.sent for c in program.collectives if c.in_background)
        / max(sent, 1),
        data_dependent_loops=program.unknown_loops,
        roofline=roofline,
        mfu_bound=found.model_flops / chip.peak_flops / bound if found.model_flops else None,
        images_per_second_bound=None if program.unknown_loops else found.batch / bound,
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of abstract arrays that one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def table(found: Preflight) -> str:
    """The report as lines of text."""
    rows = [("verdict", found.outcome + f": {found.verdict}" * (not found.fits))]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    rows += [
        ("mesh, batch, remat", f"{mesh}; {found.batch}; {found.remat}"),
        ("parameters", f"{_gib(found.params)} a device; optimizer and EMA {_gib(found.optimizer)}"),
    ]
    if found.memory:
        memory = ", ".join(
            f"{name} {_gib(size)}" for name, size in found.memory.items() if name != "peak"
        )
        rows += [
            ("memory a device", f"{_gib(found.memory['peak'])} of {_gib(found.hbm)}: {memory}")
        ]
        rows += [
            ("FLOPs", _flops_line(found)),
            ("HBM traffic", f"{found.hbm_traffic / 1e9:.2f} GB"),
        ]
        for kind, moved in found.collectives.items():
            text = (
                f"{moved['in_loop'] / 1e6:.2f} MB in loops, {moved['outside'] / 1e6:.2f} MB outside"
            )
            rows.append((kind, f"{text}, {moved['count']} transfers"))
        rows += (
            [("in the background", f"{found.background:.0%} of the bytes that are sent")]
            if found.collectives
            else []
        )
        slowest = max(found.roofline, key=found.roofline.get)
        times = ", ".join(
            f"{name} {1e3 * seconds:.1f} ms" for name, seconds in found.roofline.items()
        )
        rows.append(("roofline", f"{times}: bound by {slowest}"))
    if found.mfu_bound:
        rows.append(
            ("at most", f"{found.images_per_second_bound:,.0f} images/s, MFU {found.mfu_bound:.1%}")
        )
    if found.data_dependent_loops:
        rows.append(
            (
                "note",
                "a loop that ends when the data says so (the solver's) counts once: costs are of one step",
            )
        )
    rows.append(("compiled in", f"{found.compile_seconds:.1f} s"))
    head = f"{found.program} on {found.topology}, {found.devices} devices"
    return "\n".join([head, *(f"  {name:<20}{text}" for name, text in rows)])


def _flops_line(found: Preflight) -> str:
    executed = f"executed {found.executed_flops / 1e12:.3f} T a device"
    if found.model_flops is None:
        return executed
    ratio = found.executed_flops / found.model_flops
    share = f", {1 - 1 / ratio:.1%} of them recomputed" if ratio > 1 else ""
    return f"model {found.model_flops / 1e12:.3f} T, {executed}: {ratio:.3f} x{share}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].removesuffix(".")


def run(
    config: Config,
    topology: str,
    json_file: str | None = None,
    *,
    search: bool = False,
    sampler: bool = False,
):
    """Prints a report of the train step, and with `sampler` of the sampler; or `search`es for the fastest that fits.

    `UserError`, after the report, if what was asked for does not fit.
    """
    chip, devices = open_topology(topology)
    if search:
        found = list(find_fastest(config, topology, chip, devices))
    else:
        setup = set_up(config, devices)
        found = []
        for program in ("train step", "sampler") if sampler else ("train step",):
            found.append(examine(setup, topology, chip, program))
            print(table(found[-1]), flush=True)
    if json_file:
        storage.write_text(
            json_file, json.dumps([dataclasses.asdict(report) for report in found], indent=2) + "\n"
        )
    if not search:
        for outcome, remedy in _REMEDIES.items():
            programs = " and the ".join(
                report.program for report in found if report.outcome == outcome
            )
            check(not programs, f"the {programs} {outcome} on {topology}; {remedy}")
        return
    fitting = [report for report in found if report.fits]
    check(
        fitting,
        f"none of {len(found)} candidates fits on {topology}; take a larger one or a smaller train.batch",
    )
    best = max(fitting, key=lambda report: report.images_per_second_bound)
    flags = {"train.batch": best.batch, "model.remat": best.remat} | {
        f"mesh.{a}": n for a, n in best.mesh.items()
    }
    print(f"\nthe fastest that fits\n{table(best)}")
    print(" ".join(f"--config.{key}={value}" for key, value in flags.items()))


_REMEDIES = {
    "does not compile": "the compiler fails, and not for memory: set precision.matmul=default, or try another libtpu",
    "does not fit": "raise mesh.fsdp, set model.remat to dots or full, lower train.batch, or let --search look",
}


def find_fastest(
    config: Config, topology: str, chip: Chip, devices: Sequence[jax.Device]
) -> Iterator[Preflight]:
    """Compiles what may still be the fastest, and prints a line for each.

    Left out: what needs more memory than something that did not fit, and what could be faster by 1 % at most at the
    chip's peak.
    """
    tried: list[Preflight] = []
    todo = candidates(config, len(devices))
    for candidate in tqdm(todo, unit="candidate", disable=None):
        setup = _set_up_or_none(candidate, devices)
        if setup is None or _needs_more(setup, chip, tried) or _cannot_win(setup, chip, tried):
            continue
        tried.append(examine(setup, topology, chip))
        tqdm.write(_search_line(tried[-1]))
        yield tried[-1]


def candidates(config: Config, devices: int) -> list[Config]:
    """The same, twice and half the batch, on meshes from all fsdp to all data, with every remat policy.

    First what is the fastest as a rule, for the sake of what need not be tried then.
    """
    found = []
    batches = (config.train.batch, config.train.batch * 2, config.train.batch // 2)
    for batch, remat, tensor in itertools.product(batches, ("dots", "none", "full"), (1, 2)):
        rest = devices // tensor
        middle = max(size for size in sharding.divisors(rest) if size * size <= rest)
        for fsdp in sorted({rest, rest // middle, 1}, reverse=True):
            mesh = dataclasses.replace(config.mesh, data=rest // fsdp, fsdp=fsdp, tensor=tensor)
            model = dataclasses.replace(config.model, remat=remat)
            train_ = dataclasses.replace(config.train, batch=batch)
            # Samples are not what is searched for: a batch of them that any mesh splits.
            sample_ = dataclasses.replace(config.sample, batch=devices)
            found.append(
                dataclasses.replace(config, mesh=mesh, model=model, train=train_, sample=sample_)
            )
    return found


_BY_MEMORY = ("full", "dots", "none")  # remat policies: what the later ones keep is more


def _set_up_or_none(config: Config, devices: Sequence[jax.Device]) -> Setup | None:
    try:
        return set_up(config, devices)
    except UserError:  # a batch or a number of heads that this mesh does not divide
        return None


def _needs_more(setup: Setup, chip: Chip, tried: Sequence[Preflight]) -> bool:
    if bytes_per_device(setup.abstract_state) > chip.hbm_bytes:
        return True
    needs = _BY_MEMORY.index(setup.config.model.remat)
    return any(
        t.outcome == "does not fit"
        and t.mesh == dict(setup.mesh.shape)
        and t.batch <= setup.config.train.batch
        and _BY_MEMORY.index(t.remat) <= needs
        for t in tried
    )


def _cannot_win(setup: Setup, chip: Chip, tried: Sequence[Preflight]) -> bool:
    """Recomputing everything costs a third on top; the last hundredth is not worth a compilation."""
    factor = 4 / 3 if setup.config.model.remat == "full" else 1
    most = chip.peak_flops * setup.mesh.size / setup.train_flops / factor
    return any(t.fits and t.images_per_second_bound >= 0.99 * most for t in tried)


def _search_line(found: Preflight) -> str:
    mesh = " x ".join(map(str, found.mesh.values()))
    head = f"batch {found.batch:5d}  mesh {mesh:12}  remat {found.remat:4}"
    if not found.fits:
        return f"{head}  {found.outcome}: {found.verdict}"
    return (
        f"{head}  {_gib(found.memory['peak'])}, at most {found.images_per_second_bound:,.0f} images/s, "
        f"MFU {found.mfu_bound:.1%}"
    )
