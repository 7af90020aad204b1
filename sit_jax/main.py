"""The entry point: flags -> config -> one job."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from absl import flags as absl_flags
from etils import epath

from sit_jax import command_line, hosts, report, runtime, storage
from sit_jax import config as config_lib
from sit_jax.errors import check
from sit_jax.jobs.job import Overrides
from sit_jax.jobs.table import JOBS
from sit_jax.settings import Config
from sit_jax.validation import check_null_label


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job and return its exit status.

    It is 0, or 2 after an error in one line on stderr: what was given, or the machine, has to
    change. It is 1 after a traceback, which is a bug, and 130 after Ctrl-C.
    """
    try:
        run(*command_line.parse(sys.argv[1:] if argv is None else argv))
        return 0
    except KeyboardInterrupt:
        status = 130
        print("error: interrupted; the same command starts or continues the job", file=sys.stderr)
    except Exception as error:
        line = report.failure_line(error)
        status = 2 if line else 1
        if not line:
            traceback.print_exc()
            line = hosts.exit_message(error) if hosts.is_multiprocess() else report.bug_line(error)
        print(f"error: {line}", file=sys.stderr)
    if hosts.is_multiprocess():
        hosts.exit_now(status)
    return status


def run(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Run the job of the flags, after joining the other processes of the run."""
    if not JOBS[flags.mode].uses_devices:
        run_job(load_config(flags, overrides), flags, overrides)
        return
    if warning := runtime.fix_numerics():
        print(warning, file=sys.stderr)
    runtime.use_compilation_cache()
    hosts.join(flags.distributed, preemptible=flags.mode == "train")
    runtime.keep_host_memory()
    with hosts.only_first_prints():
        run_on_devices(flags, overrides)


def run_on_devices(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Run the job of the flags, in this process or in each of several."""
    config = hosts.run_on_all(lambda: load_config(flags, overrides))
    hosts.check_same("config", config_lib.flatten(config))
    hosts.check_same("command", {f"--{name}": str(value) for name, value in vars(flags).items()})
    absl_flags.FLAGS.mark_as_parsed()  # grain's reader processes read absl's flags
    print(report.devices_line(), flush=True)
    if warning := report.unused_accelerator_warning():
        print(warning, file=sys.stderr)
    run_job(config, flags, overrides)
    hosts.gather(None)  # a process that exits before the others counts as dead


def run_job(config: Config, flags: argparse.Namespace, overrides: Overrides) -> None:
    """Run the job, and say which overrides it does not use.

    Raises `UserError` with the remedy if memory runs out.
    """
    job = JOBS[flags.mode]
    for line in command_line.unused(flags.mode, overrides):
        print(line, flush=True)
    try:
        job.run(config, epath.Path(flags.workdir or ""), flags)
    except Exception as error:
        reason = report.lack_of_memory(error)
        check(
            not reason,
            f"out of memory ({reason}); lower {job.memory}; mesh.fsdp splits the weights over "
            "devices, and --mode preflight says what fits",
        )
        raise


def load_config(flags: argparse.Namespace, overrides: Overrides) -> Config:
    """Return the config of the flags, or the workdir's own if they name none.

    Raises `UserError` if the mode would use a null label that was not trained.
    """
    config = _load_config(flags, overrides)
    check_null_label(config, JOBS[flags.mode].takes)
    return config


def _load_config(flags: argparse.Namespace, overrides: Overrides) -> Config:
    if not flags.workdir:
        if JOBS[flags.mode].instead_of_workdir and not flags.config:
            return config_lib.from_values(config_lib.default().to_dict(), overrides)
        check(
            flags.config,
            f"--mode {flags.mode} needs --config, such as --config configs/digits.py, or --workdir",
        )
        return config_lib.load(flags.config, overrides)
    workdir = epath.Path(flags.workdir)
    storage.clean_up(workdir.parent, workdir.name)  # a conversion may have died while it renamed
    check(
        not workdir.is_file(),
        f"--workdir {flags.workdir!r} cannot be used (it is a file); give a folder",
    )
    recorded = workdir / "config.json"
    check(
        flags.config or recorded.exists(),
        f"--workdir {flags.workdir!r} holds no run yet; give --config as well, such as --config "
        "configs/digits.py",
    )
    return config_lib.load(flags.config or str(recorded), overrides)


if __name__ == "__main__":
    sys.exit(main())
