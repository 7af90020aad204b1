"""The one entry point: flags -> config -> one job."""

import argparse
import ctypes
import os
import sys
import traceback
from collections.abc import Sequence

from absl import flags as absl_flags
from etils import epath

from sit_jax import config as config_lib
from sit_jax import hosts, report
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.jobs import invert, likelihood, sample, sweep, train
from sit_jax.jobs.preflight import job as preflight
from sit_jax.settings import Config

JOBS = {
    "train": train.run,
    "sample": sample.run,
    "sweep": sweep.run,
    "invert": invert.run,
    "likelihood": likelihood.run,
    "preflight": preflight.run,
}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h

_USAGE = """\
python -m sit_jax.main --config configs/digits.py --workdir runs/digits      train, or continue what is there
       python -m sit_jax.main --workdir runs/digits                                 continue, with the recorded config
       python -m sit_jax.main --workdir runs/digits --mode sample --config.sample.cfg_scale=4
       python -m sit_jax.main --workdir runs/digits --mode likelihood               bits/dim of the data
       python -m sit_jax.main --config configs/digits.py --mode preflight --topology v5e:4x4       does it fit?"""
_EPILOG = "Every setting of sit_jax/settings.py is a flag: --config.train.steps=1000, --config.sample.labels=3,1,4."


_ONLY_FOR = {"fork": "train", "profile": "train"} | dict.fromkeys(
    ("topology", "search", "sampler", "json"), "preflight"
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The flags, and the (key, text) overrides given as --config.KEY=TEXT or --config.KEY TEXT."""
    parser = argparse.ArgumentParser(
        "sit_jax", usage=_USAGE, description=__doc__, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        help="config file: configs/X.py, or configs/X.py:variant; default: the workdir's own",
    )
    parser.add_argument(
        "--workdir", help="folder (local or gs://) of checkpoints, logs and samples"
    )
    parser.add_argument(
        "--mode", default="train", help=f"what to do: {', '.join(JOBS)} (default: train)"
    )
    parser.add_argument(
        "--fork", metavar="NEWDIR", help="train a new run in NEWDIR from the weights in the workdir"
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="write a trace of these training steps to WORKDIR/profile",
    )
    parser.add_argument(
        "--topology", help="preflight: the chips to compile for, none needed here: v5e:4x4, h100:8"
    )
    parser.add_argument(
        "--search", action="store_true", help="preflight: try batches, meshes and remat policies"
    )
    parser.add_argument("--sampler", action="store_true", help="preflight: compile the sampler too")
    parser.add_argument("--json", metavar="FILE", help="preflight: write the figures there")
    parser.add_argument(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="several processes, one run (default: where jax finds a cluster, or JAX_COORDINATOR_ADDRESS and its like "
        "are set)",
    )
    parser.error = _refuse
    flags, rest = parser.parse_known_args(argv)
    flags.profile = steps_to_profile(flags.profile)
    if flags.mode not in JOBS:
        raise unknown_name("mode", flags.mode, JOBS)
    if flags.mode != "preflight":
        if flags.workdir is None:
            parser.error("the following arguments are required: --workdir")
        check(flags.workdir, "--workdir is empty; expected a folder such as runs/digits")
    else:
        check(
            flags.topology,
            f"--mode preflight needs --topology; known: {preflight.known_topologies()}",
        )
    for name, mode in _ONLY_FOR.items():
        check(
            not getattr(flags, name) or flags.mode == mode,
            f"--{name} is for --mode {mode}, not {flags.mode}",
        )
    overrides = []
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        check(
            flag.startswith("--config."),
            f"unknown flag {flag!r}; see python -m sit_jax.main --help",
        )
        if not equals and rest and not rest[0].startswith("--config."):
            text = rest.pop(0)
        check(text, f"{flag} has no value; expected {flag}=VALUE")
        check(
            flags.mode != "likelihood" or not flag.startswith("--config.sample."),
            f"{flag} means nothing to --mode likelihood: log p is of the unguided ODE, with settings of its own; "
            "see --config.likelihood.solver and the others in sit_jax/settings.py",
        )
        overrides.append((flag.removeprefix("--config."), text))
    return flags, overrides


def _refuse(message: str) -> None:
    raise UserError(f"{message}; see python -m sit_jax.main --help")


def load_config(flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> Config:
    """The config of the flags, or the workdir's own. `UserError` if they are not of the same run."""
    if not flags.workdir:
        check(
            flags.config,
            "--mode preflight needs --config, such as --config configs/digits.py, or --workdir",
        )
        return config_lib.load(flags.config, overrides)
    recorded = epath.Path(flags.workdir) / "config.json"
    check(
        flags.config or recorded.exists(),
        f"--workdir {flags.workdir!r} holds no run yet; give --config as well, such as --config configs/digits.py",
    )
    config = config_lib.load(flags.config or str(recorded), overrides)
    if recorded.exists() and not flags.fork:
        refuse_another_run(config_lib.load(str(recorded)), config, flags)
    return config


def refuse_another_run(recorded: Config, config: Config, flags: argparse.Namespace) -> None:
    """`UserError` that names every setting which this mode may not change, with both values."""
    changes = config_lib.changes(recorded, config).items()
    if flags.mode == "train":
        fixed = {
            key: values for key, values in changes if not key.startswith(config_lib.CHANGEABLE)
        }
    else:
        fixed = {key: values for key, values in changes if key.startswith(config_lib.NETWORK)}
    listed = ", ".join(f"{key} is {new!r} but was {old!r}" for key, (old, new) in fixed.items())
    check(
        not fixed,
        f"the run in {flags.workdir!r} is another one: {listed}; keep what was, use another --workdir, "
        "or --fork NEWDIR for a new run from these weights",
    )


def steps_to_profile(text: str | None) -> tuple[int, int] | None:
    """ "100:110" -> (100, 110)."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    valid = first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)
    check(valid, f"--profile is {text!r}; expected two steps FIRST:LAST such as 100:110")
    return int(first), int(last)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0, or 2 after one line on stderr for a mistake of the user's."""
    try:
        flags, overrides = parse(sys.argv[1:] if argv is None else argv)
        if flags.mode == "preflight":
            config = load_config(flags, overrides)
            preflight.leave_devices_alone()
            preflight.run(
                config, flags.topology, flags.json, search=flags.search, sampler=flags.sampler
            )
            return 0
        use_compilation_cache()
        hosts.join(flags.distributed, preemptible=flags.mode == "train")
        keep_host_memory()  # makes the devices' client: after joining, which comes before it, and before all else
        with hosts.only_first_prints():
            run_job(flags, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if hosts.is_multiprocess():
            hosts.exit_now(2)
        return 2
    except Exception as error:
        if not hosts.is_multiprocess():
            raise
        traceback.print_exc()
        print(hosts.exit_message(error), file=sys.stderr)
        hosts.exit_now(1)
    return 0


def run_job(flags: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> None:
    """The job of the flags, as this process or as one of several."""
    config, workdir = (
        hosts.run_on_all(lambda: load_config(flags, overrides)),
        epath.Path(flags.workdir),
    )
    hosts.check_same("config", config_lib.flatten(config))
    hosts.check_same("command", {f"--{name}": str(value) for name, value in vars(flags).items()})
    absl_flags.FLAGS.mark_as_parsed()  # grain's reader processes look flags up
    print(report.devices_line(), flush=True)
    if warning := report.unused_accelerator_warning():
        print(warning, file=sys.stderr)
    if flags.fork:
        train.fork(config, workdir, epath.Path(flags.fork))
        workdir = epath.Path(flags.fork)
    options = {"profile": flags.profile} if flags.profile else {}
    JOBS[flags.mode](config, workdir, **options)
    hosts.gather(None)  # together to the end: one that leaves early counts as dead


def use_compilation_cache() -> None:
    """Keeps compiled programs in $JAX_COMPILATION_CACHE_DIR, or the user's cache folder, for the next start."""
    import jax

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "sit_jax", "xla"))


def keep_host_memory() -> None:
    """On the CPU, keeps the memory that a step frees for the next one, where the C library can.

    XLA allocates its temporaries anew each time, and glibc fetches an allocation that large from the system and gives
    it back: 190,000 page faults in a SiT-S/2 step of batch 8, a twelfth of its time. To be found again the allocation
    must be made in the main thread, where it is with synchronous dispatch.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the CPU's client is made
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


if __name__ == "__main__":
    sys.exit(main())
