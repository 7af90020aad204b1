"""`--mode preflight`: compiles a run's programs for chips that are not present, and reports costs.

The compiler is the chip's own (libtpu, or the CUDA plugin), so its memory verdict is the one that a
run would get. All other figures are read from the compiled program (`hlo`) and from the makers'
data (`chips`). The roofline assumes that every unit runs at its peak and that all of them overlap.
So a run can be slower than the roofline but not faster, provided that its kernels read and write
all the HBM traffic that is counted. Where measured figures of a chip exist, the time of a run is
also estimated, kernel by kernel (`estimate`).
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

import jax
from etils import epath

from sit_jax import storage
from sit_jax.errors import check
from sit_jax.jobs.job import Flag, Job, Overrides
from sit_jax.jobs.preflight.chips import CHIPS, Chip
from sit_jax.jobs.preflight.report import (
    SAMPLER,
    TRAIN_STEP,
    Preflight,
    examine,
    kernel_table,
    table,
)
from sit_jax.jobs.preflight.search import find_fastest
from sit_jax.jobs.preflight.topology import known_topologies, leave_devices_alone, open_topology
from sit_jax.jobs.setup import check_sample_batch, check_train_batch, set_up
from sit_jax.settings import Config

_REMEDIES = {
    "does not compile": "the compiler fails, and not for lack of memory: set "
    "precision.matmul=default, or try another libtpu or other CUDA wheels",
    "does not fit": "raise mesh.fsdp, set model.remat to dots or full, lower train.batch, or try "
    "--search",
}


def preflight(
    config: Config,
    topology: str,
    json_file: str | None = None,
    *,
    search: bool = False,
    sampler: bool = False,
    kernels: bool = False,
) -> None:
    """Print a report of the train step, and with `sampler` one of the sampler.

    With `kernels`, list the kernels of each that take longest, by the estimate.
    With `search`, look for the fastest train step that fits instead. `json_file` receives all
    reports. Raises UserError, after the reports, if a program, or every candidate, does not fit.
    """
    chip, devices = open_topology(topology)
    check(
        chip.attainable or not kernels,
        f"--kernels needs an estimate, and how fast kernels are on {chip.name} has not been "
        f"measured; known: {', '.join(c.name for c in CHIPS if c.attainable)}",
    )
    check(
        not sampler or chip.topologies or config.sample.steps is not None,
        f"--sampler with steps that adapt does not compile for a GPU that is absent ({topology}): "
        "the solver's own checks call the host; set sample.steps",
    )
    if search:
        reports = list(find_fastest(config, topology, chip, devices))
    else:
        programs = (TRAIN_STEP, SAMPLER) if sampler else (TRAIN_STEP,)
        reports = _print_reports(config, topology, chip, devices, programs)
    if kernels:
        _print_kernels(reports)
    if json_file:
        rows = [dataclasses.asdict(report) for report in reports]
        storage.write_text(json_file, json.dumps(rows, indent=2) + "\n")
    if search:
        _print_fastest(reports, topology, chip)
    else:
        _check_fit(reports, topology)


def _print_reports(
    config: Config,
    topology: str,
    chip: Chip,
    devices: Sequence[jax.Device],
    programs: Sequence[str],
) -> list[Preflight]:
    setup = set_up(config, devices)
    check_train_batch(setup)
    if SAMPLER in programs:
        check_sample_batch(setup)
    reports = []
    for program in programs:
        report = examine(setup, topology, chip, program)
        print(table(report), flush=True)
        reports.append(report)
    return reports


def _print_kernels(reports: Sequence[Preflight]) -> None:
    for report in reports:
        if report.estimate:  # None if it does not compile
            print(f"{report.program} on {report.topology}\n{kernel_table(report.estimate)}")


def _check_fit(reports: Sequence[Preflight], topology: str) -> None:
    """Raise UserError unless all programs fit."""
    for outcome, remedy in _REMEDIES.items():
        programs = [report.program for report in reports if report.outcome == outcome]
        check(not programs, f"the {' and the '.join(programs)} {outcome} on {topology}; {remedy}")


def _print_fastest(reports: Sequence[Preflight], topology: str, chip: Chip) -> None:
    """Print the report and the flags of the fastest; raise UserError if none fits."""
    fitting = [report for report in reports if report.fits]
    check(
        fitting,
        f"none of {len(reports)} candidates fits on {topology}; take a larger topology or a "
        "smaller train.batch",
    )
    fastest = max(fitting, key=lambda report: report.images_per_second)
    settings = {"train.batch": fastest.batch, "model.remat": fastest.remat}
    settings |= {f"mesh.{axis}": size for axis, size in fastest.mesh.items()}
    ranked_by = "estimate" if chip.attainable else "bound: the kernels' speed was not measured"
    print(f"\nthe fastest that fits, by the {ranked_by}\n{table(fastest)}")
    print(" ".join(f"--config.{key}={value}" for key, value in settings.items()))


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Compile for --topology. The workdir is not used."""
    leave_devices_alone()
    preflight(
        config,
        flags.topology,
        flags.json,
        search=flags.search,
        sampler=flags.sampler,
        kernels=flags.kernels,
    )


def _check_flags(flags: argparse.Namespace, overrides: Overrides) -> None:
    check(flags.json != "", "--json is empty; expected a file such as preflight.json")
    check(
        not (flags.search and flags.kernels),
        "--kernels lists the kernels of one configuration; leave out --search",
    )
    check(flags.topology, f"--mode preflight needs --topology; known: {known_topologies()}")


JOB = Job(
    run,
    "compile for chips that are not present: does it fit, and how fast can it be?",
    memory="train.batch",
    flags=(
        Flag(
            "topology", "chips to compile for, which need not be present: v5e:4x4, h100:8", "CHIPS"
        ),
        Flag("search", "try batches, meshes and remat policies"),
        Flag("sampler", "compile the sampler too"),
        Flag("kernels", "list the kernels that take longest, by the estimate"),
        Flag("json", "write the figures to this file", "FILE", is_path=True),
    ),
    check=_check_flags,
    uses_devices=False,
    uses=(
        "seed",
        "model.",
        "transport.",
        "data.",
        "latents.",
        "train.",
        "optimizer.",
        "precision.",
        "mesh.",
        "sample.",
    ),
)
