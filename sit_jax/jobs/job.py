"""The declaration of a job: how it runs, a line of help, and its own flags."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from etils import epath

from sit_jax.settings import Config

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


@dataclasses.dataclass(frozen=True)
class Job:
    """One --mode of the command line."""

    run: Callable[[Config, epath.Path, argparse.Namespace], None]
    help: str  # one line
    memory: str = ""  # what to lower if memory runs out
    flags: tuple[Flag, ...] = ()
    # Raises UserError for flags or overrides that the job does not accept.
    check: Callable[[argparse.Namespace, Overrides], None] = _accept
    # False for a job that only compiles: it needs no workdir and claims no device.
    uses_devices: bool = True
