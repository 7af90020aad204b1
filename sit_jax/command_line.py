"""The command line: its flags, its help, and --config.KEY=VALUE overrides."""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from sit_jax import settings_help, storage
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.jobs.job import Flag, Overrides
from sit_jax.jobs.table import JOBS

_USAGE = """\
python -m sit_jax.main --config configs/digits.py --workdir runs/digits
       python -m sit_jax.main --workdir runs/digits --mode sample --config.sample.cfg_scale=4
       python -m sit_jax.main --config configs/digits.py --mode preflight --topology v5e:4x4
       python -m sit_jax.main --mode evaluate --samples X --reference Y
       python -m sit_jax.main --help-config [SECTION]"""
_EPILOG = """\
Settings are flags: --config.train.steps=1000, --config.sample.labels=3,1,4. --help-config lists
the sections of settings, --help-config SECTION explains the settings of one. A workdir records its
config, so --workdir on its own continues, samples or evaluates a run."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Return the flags, and (key, text) for each --config.KEY=TEXT or --config.KEY TEXT.

    --help and --help-config print and exit. Raises `UserError` for flags that make no sense
    together, and for a path in a bucket that cannot be read.
    """
    flags, overrides = parse_elsewhere(argv)
    for name, path in paths(flags).items():
        storage.check_reachable(name, path)
    return flags, overrides


def paths(flags: argparse.Namespace) -> dict[str, str]:
    """Return the paths that were given as flags, by the flag."""
    names = ["workdir", *(flag.name for flag in JOBS[flags.mode].flags if flag.is_path)]
    given = {f"--{name}": getattr(flags, name) for name in names}
    return {name: path for name, path in given.items() if path is not None}


def parse_elsewhere(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Return what `parse` does for a command of another machine: no bucket is read."""
    parser = _parser()
    flags, unknown = parser.parse_known_args(argv)
    if flags.help_config is not None:
        ignored = [
            f"--{name.replace('_', '-')}"
            for name, value in vars(flags).items()
            if name != "help_config" and value != parser.get_default(name)
        ]
        ignored += [text.partition("=")[0] for text in unknown]
        check(
            not ignored,
            f"--help-config only prints, and does nothing with {', '.join(ignored)}; give it "
            "without other flags",
        )
        print(settings_help.as_text(flags.help_config))
        raise SystemExit(0)
    if flags.mode not in JOBS:
        raise unknown_name("mode", flags.mode, JOBS)
    check(flags.config != "", "--config is empty; expected a file such as configs/digits.py")
    job = JOBS[flags.mode]
    if job.uses_devices:
        if flags.workdir is None and not any(
            getattr(flags, name) for name in job.instead_of_workdir
        ):
            others = "".join(f" (or --{name})" for name in job.instead_of_workdir)
            _refuse(f"the following arguments are required: --workdir{others}")
        check(flags.workdir != "", "--workdir is empty; expected a folder such as runs/digits")
    for flag, modes in _flags_by_modes():
        # A switch is False unless given; any other flag is None, and may be given empty.
        is_given = getattr(flags, flag.name) not in (None, False)
        check(
            not is_given or flags.mode in modes,
            f"--{flag.name} is for --mode {', '.join(modes)}, not {flags.mode}",
        )
    overrides = _overrides(unknown)
    job.check(flags, overrides)
    for name, path in paths(flags).items():
        setattr(flags, name.removeprefix("--"), storage.expand(name, path))
    return flags, overrides


def _flags_by_modes() -> list[tuple[Flag, list[str]]]:
    """Return every job's own flag once, with the modes that take it."""
    flags = dict.fromkeys(flag for job in JOBS.values() for flag in job.flags)
    return [(flag, [mode for mode, job in JOBS.items() if flag in job.flags]) for flag in flags]


def unused(mode: str, overrides: Overrides) -> list[str]:
    """Return a line for each override that the mode does not use, with the modes that do."""
    lines = []
    for key, _ in overrides:
        users = [name for name, job in JOBS.items() if job.takes(key)]
        if mode not in users:
            lines.append(
                f"note: --config.{key} has no effect on --mode {mode}; it is for --mode "
                f"{', '.join(users)}"
            )
    return lines


def _parser() -> argparse.ArgumentParser:
    modes = "\n".join(f"  {name:<11} {job.help}" for name, job in JOBS.items())
    parser = argparse.ArgumentParser(
        "sit_jax",
        usage=_USAGE,
        description=f"Train, sample and evaluate scalable interpolant transformers.\n\n"
        f"modes:\n{modes}",
        epilog=textwrap.fill(" ".join(_EPILOG.split()), 88, break_on_hyphens=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        help="config file: configs/X.py, or configs/X.py:variant; default: the workdir's own",
    )
    parser.add_argument(
        "--workdir", help="folder (local or gs://) of checkpoints, logs and results"
    )
    parser.add_argument("--mode", default="train", help="one of the modes above (default: train)")
    parser.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="SECTION",
        help="list the sections of settings, or explain those of one section (or one setting), "
        "and exit",
    )
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="join several processes into one run (default: if jax finds a cluster, or "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set)",
    )
    for modes, pairs in itertools.groupby(_flags_by_modes(), lambda pair: pair[1]):
        group = parser.add_argument_group(f"--mode {', '.join(modes)}")
        for flag, _ in pairs:
            if flag.metavar:
                group.add_argument(f"--{flag.name}", metavar=flag.metavar, help=flag.help)
            else:
                group.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
    # argparse would print its usage and exit; a mistake is one line here.
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; see python -m sit_jax.main --help")


def _overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, text) for each --config flag. Raises `UserError` for any other argument."""
    overrides = []
    remaining = list(arguments)
    while remaining:
        flag, equals, text = remaining.pop(0).partition("=")
        check(
            flag.startswith("--config."),
            f"unknown flag {flag!r}; see python -m sit_jax.main --help",
        )
        if not equals and remaining and not remaining[0].startswith("--config."):
            text = remaining.pop(0)
        check(text, f"{flag} has no value; expected {flag}=VALUE")
        overrides.append((flag.removeprefix("--config."), text))
    return overrides
