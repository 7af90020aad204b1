"""The one entry point: flags -> config -> one job."""

import argparse
import os
import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from etils import epath

from sit_jax import config as config_lib
from sit_jax import report
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.jobs import sample, train

JOBS = {"train": train.run, "sample": sample.run}

_USAGE = """\
python -m sit_jax.main --config configs/digits.py --workdir runs/digits      train, or continue what is there
       python -m sit_jax.main --workdir runs/digits                                 continue, with the recorded config
       python -m sit_jax.main --workdir runs/digits --mode sample --config.sample.cfg_scale=4"""
_EPILOG = "Every setting of sit_jax/config.py is a flag: --config.train.steps=1000, --config.sample.labels=3,1,4."


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the (key, text) overrides given as --config.KEY=TEXT or --config.KEY TEXT."""
    parser = argparse.ArgumentParser("sit_jax", usage=_USAGE, description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument(
        "--config", help="config file: configs/X.py, or configs/X.py:variant; default: the workdir's own"
    )
    parser.add_argument("--workdir", required=True, help="folder (local or gs://) of checkpoints, logs and samples")
    parser.add_argument("--mode", default="train", help=f"what to do: {', '.join(JOBS)} (default: train)")
    parser.error = _refuse
    flags, rest = parser.parse_known_args(argv)
    check(flags.workdir, "--workdir is empty; expected a folder such as runs/digits")
    if flags.mode not in JOBS:
        raise unknown_name("mode", flags.mode, JOBS)
    overrides = []
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        check(flag.startswith("--config."), f"unknown flag {flag!r}; see python -m sit_jax.main --help")
        if not equals and rest and not rest[0].startswith("--config."):
            text = rest.pop(0)
        check(text, f"{flag} has no value; expected {flag}=VALUE")
        overrides.append((flag.removeprefix("--config."), text))
    return flags, overrides


def _refuse(message: str) -> None:
    raise UserError(f"{message}; see python -m sit_jax.main --help")


def load_config(flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> config_lib.Config:
    """The config of the flags, or the workdir's own. `UserError` if they are not of the same run."""
    recorded = epath.Path(flags.workdir) / "config.json"
    check(
        flags.config or recorded.exists(),
        f"--workdir {flags.workdir!r} holds no run yet; give --config as well, such as --config configs/digits.py",
    )
    config = config_lib.load(flags.config or str(recorded), overrides)
    if recorded.exists():
        for key, (old, new) in config_lib.changes(config_lib.load(str(recorded)), config).items():
            raise UserError(
                f"{key} is {new!r}, but the run in {flags.workdir!r} has {old!r}; keep it, or use another --workdir"
            )
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0, or 2 after one line on stderr for a mistake of the user's."""
    try:
        flags, overrides = parse(sys.argv[1:] if argv is None else argv)
        config = load_config(flags, overrides)
        use_compilation_cache()
        absl_flags.FLAGS.mark_as_parsed()  # grain's reader processes look flags up
        print(report.devices_line(), flush=True)
        if warning := report.unused_accelerator_warning():
            print(warning, file=sys.stderr)
        JOBS[flags.mode](config, epath.Path(flags.workdir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def use_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR, or the user's cache folder, for the next start."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "sit_jax", "xla"))


if __name__ == "__main__":
    sys.exit(main())
