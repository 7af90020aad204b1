"""The chips that programs can be compiled for without having them, and their compilers."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from sit_jax.errors import UserError, check, require
from sit_jax.jobs.preflight.chips import CHIPS, Chip
from sit_jax.jobs.preflight.gpu_targets import GPU_TARGETS


def leave_devices_alone() -> None:
    """Keep jax on the CPU, and stop libtpu from looking for a TPU. Call it before either starts."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Only the compiler is used: a training run on this host keeps its TPU.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # If this is unset, libtpu warns that it does not know the type.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    # The cache holds programs for the devices of this host.
    jax.config.update("jax_enable_compilation_cache", False)


def known_topologies() -> str:
    """Return all topologies for a message: `v5e:1x1 2x2 ..., h100:1 2 4 8`."""
    tpus = [f"{chip.name}:{chip.topologies}" for chip in CHIPS if chip.topologies]
    return ", ".join(tpus + [f"{name}:1 2 4 8" for name in GPU_TARGETS])


def open_topology(name: str) -> tuple[Chip, list[jax.Device]]:
    """Return the chip and the devices of a topology such as `v5e:4x4` or `h100:8`.

    Programs can be compiled for these devices, not run on them. Raises UserError if the topology
    is unknown or the chip's compiler is not installed.
    """
    kind, _, layout = name.partition(":")
    unknown = f"unknown --topology {name!r}; known: {known_topologies()}"
    chips = {chip.name: chip for chip in CHIPS if chip.topologies or chip.name in GPU_TARGETS}
    chip = require(chips.get(kind), unknown)
    side = "[1-9][0-9]{0,3}"  # a longer number would be expanded for minutes
    pattern = rf"{side}(x{side}){{0,2}}" if chip.topologies else side
    check(re.fullmatch(pattern, layout), unknown)
    return chip, _tpus(chip, layout) if chip.topologies else _gpus(chip, layout)


def one_line(error: Exception) -> str:
    """Return the first line of a compiler's error."""
    return str(error).strip().splitlines()[0].removesuffix(".")


def _tpus(chip: Chip, layout: str) -> list[jax.Device]:
    check(
        importlib.util.find_spec("libtpu"),
        "compiling for a TPU needs its compiler, but no TPU: "
        'pip install -e ".[tpu]" (jax\'s own libtpu, 137 MB)',
    )
    options: dict[str, object] = {}
    if chip.name == "v4":  # otherwise the compiler counts two devices a chip, unlike a run
        options["chip_config_name"] = "megacore"
    if set(layout.split("x")) == {"1"}:  # otherwise the compiler expects four chips a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(f"{chip.name}:{layout}", "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"libtpu does not know --topology {chip.name}:{layout} ({one_line(error)}); "
            f"known: {known_topologies()}"
        ) from error


def _gpus(chip: Chip, layout: str) -> list[jax.Device]:
    check(
        has_cuda(),
        "compiling for an NVIDIA GPU needs the CUDA wheels: "
        'pip install -e ".[cuda13]" or ".[cuda12]" (5 GB, no GPU needed)',
    )
    return topologies.get_topology_desc(
        "gpu", "cuda", target_config=GPU_TARGETS[chip.name].text(), topology=f"1x1x{layout}"
    ).devices


def has_cuda() -> bool:
    """Return True if a CUDA plugin of jax is installed."""
    return bool(
        importlib.util.find_spec("jax_plugins")
        and any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
    )
