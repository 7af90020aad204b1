"""The declaration of a job: how it runs, a line of help, and its own flags."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from etils import epath

from sit_jax.jobs.setup import Setup
from sit_jax.laws import in_group
from sit_jax.settings import Config

# Groups of settings for `Job.uses`. Those of the network, in every job on trained weights:
NETWORK = (
    "model.",
    "latents.",
    "precision.",
    "mesh.",
    "transport.path",
    "transport.prediction",
    "transport.sample_eps",
    "data.source",
    "data.image_size",
    "data.channels",
    "data.classes",
)
# Those of every solver, for jobs that choose the solver or its steps in their own way:
SAMPLER = (
    "sample.weights",
    "sample.checkpoint",
    "sample.seed",
    "sample.batch",
    "sample.microbatch",
    "sample.time_shift",
    "sample.error_norm",
    "sample.cfg_channels",
    "sample.cfg_interval",
    "sample.guide",
)
SHEET = ("log.sheet_count", "sample.columns", "sample.scale")

Overrides = Sequence[tuple[str, str]]  # (dotted key, text) of each --config.KEY=TEXT


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag that only one job takes. Without a metavar it is a switch."""

    name: str
    help: str
    metavar: str | None = None
    is_path: bool = False


def _accept(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Accept any flags."""


def _accept_batches(setup: Setup) -> None:
    """Accept any batches."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One --mode of the command line."""

    run: Callable[[Config, epath.Path, argparse.Namespace], None]
    help: str  # one line
    memory: str = ""  # what to lower if memory runs out
    uses: tuple[str, ...] | None = None  # settings, and sections such as "sample."; None: all
    flags: tuple[Flag, ...] = ()
    # Raises UserError for flags or overrides that the job does not accept.
    check: Callable[[argparse.Namespace, Overrides], None] = _accept
    # Raises UserError unless the batches that the job uses divide over the devices.
    check_batches: Callable[[Setup], None] = _accept_batches
    # False for a job that only compiles: it needs no workdir and claims no device.
    uses_devices: bool = True
    # Flags of which one is enough without a workdir and a config. Settings are then the defaults.
    instead_of_workdir: tuple[str, ...] = ()

    def takes(self, key: str) -> bool:
        """Return True if the job uses the setting."""
        return self.uses is None or in_group(key, self.uses)
