"""Searches batches, meshes and remat policies for the fastest train step that fits."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax
from tqdm import tqdm

from sit_jax import sharding
from sit_jax.errors import UserError
from sit_jax.jobs.preflight.chips import Chip
from sit_jax.jobs.preflight.report import Preflight, bytes_per_device, examine, gib
from sit_jax.jobs.setup import Setup, check_train_batch, set_up
from sit_jax.settings import Config

# For each remat policy those that keep less. On a GPU "operands" and "none" keep about as much.
_LESS = {"full": (), "dots": ("full",), "operands": ("full", "dots"), "none": ("full", "dots")}


def find_fastest(
    config: Config, topology: str, chip: Chip, devices: Sequence[jax.Device]
) -> Iterator[Preflight]:
    """Compile the candidates that may be the fastest; print a line for each and yield its report.

    Skips candidates that need more memory than one that already did not fit, or that even at the
    chip's peak could be faster by at most 1 %.
    """
    tried: list[Preflight] = []
    for candidate in tqdm(candidates(config, len(devices)), unit="candidate", disable=None):
        setup = _set_up_or_none(candidate, devices)
        if setup is None or _needs_more(setup, chip, tried) or _cannot_win(setup, chip, tried):
            continue
        report = examine(setup, topology, chip)
        tried.append(report)
        tqdm.write(_line(report))
        yield report


def candidates(config: Config, device_count: int) -> list[Config]:
    """Return configs for a search, likely winners first, so that more of the others are skipped.

    They have the config's batch, twice and half of it, meshes from all fsdp to all data, with
    tensor 1 or, for an even number of devices, 2, and every remat policy.
    """
    configs = []
    batches = (config.train.batch, config.train.batch * 2, config.train.batch // 2)
    tensors = [tensor for tensor in (1, 2) if device_count % tensor == 0]
    remats = ("dots", "operands", "none", "full")
    for batch, remat, tensor in itertools.product(batches, remats, tensors):
        shards = device_count // tensor  # data x fsdp
        middle = max(size for size in sharding.divisors(shards) if size * size <= shards)
        for fsdp in sorted({shards, shards // middle, 1}, reverse=True):
            candidate = dataclasses.replace(
                config,
                mesh=dataclasses.replace(
                    config.mesh, data=shards // fsdp, fsdp=fsdp, tensor=tensor
                ),
                model=dataclasses.replace(config.model, remat=remat),
                train=dataclasses.replace(config.train, batch=batch),
            )
            configs.append(candidate)
    return configs


def _set_up_or_none(config: Config, devices: Sequence[jax.Device]) -> Setup | None:
    try:
        setup = set_up(config, devices)
        check_train_batch(setup)
    except UserError:  # the mesh does not divide the batch or the number of heads
        return None
    return setup


def _needs_more(setup: Setup, chip: Chip, tried: Sequence[Preflight]) -> bool:
    """Return True if the state by itself does not fit, or a smaller candidate did not."""
    if bytes_per_device(setup.abstract_state) > chip.hbm_bytes:
        return True
    remat = setup.config.model.remat
    return any(
        report.outcome == "does not fit"
        and report.mesh == dict(setup.mesh.shape)
        and report.batch <= setup.config.train.batch
        and report.remat in (remat, *_LESS[remat])
        for report in tried
    )


def _cannot_win(setup: Setup, chip: Chip, tried: Sequence[Preflight]) -> bool:
    """Return True if this candidate at the chip's peak is at most 1 % faster than the best.

    With remat "full" it executes the forward pass twice: 4/3 of the FLOPs.
    """
    recomputation = 4 / 3 if setup.config.model.remat == "full" else 1
    peak = chip.peak_flops * setup.mesh.size / setup.train_flops / recomputation
    return any(report.fits and report.images_per_second >= 0.99 * peak for report in tried)


def _line(report: Preflight) -> str:
    mesh = " x ".join(map(str, report.mesh.values()))
    candidate = f"batch {report.batch:5d}  mesh {mesh:12}  remat {report.remat:8}"
    if not report.fits:
        return f"{candidate}  {report.outcome}: {report.verdict}"
    estimated = report.estimate is not None
    mfu = report.mfu_estimate if estimated else report.mfu_bound
    return (
        f"{candidate}  {gib(report.memory['peak'])}, {'estimated' if estimated else 'at most'} "
        f"{report.images_per_second:,.0f} images/s, MFU {mfu:.1%}"
    )
