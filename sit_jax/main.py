"""The entry point: flags -> config -> one job."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from absl import flags as absl_flags
from etils import epath

from sit_jax import command_line, hosts, report, runtime
from sit_jax import config as config_lib
from sit_jax.errors import UserError, check
from sit_jax.jobs.job import Overrides
from sit_jax.jobs.table import JOBS
from sit_jax.settings import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job and return its exit status: 0, or 2 after a one-line error on stderr."""
    try:
        flags, overrides = command_line.parse(sys.argv[1:] if argv is None else argv)
        if not JOBS[flags.mode].uses_devices:
            config = load_config(flags, overrides)
            JOBS[flags.mode].run(config, epath.Path(flags.workdir or ""), flags)
            return 0
        if warning := runtime.fix_numerics():
            print(warning, file=sys.stderr)
        runtime.use_compilation_cache()
        hosts.join(flags.distributed, preemptible=flags.mode == "train")
        runtime.keep_host_memory()
        with hosts.only_first_prints():
            run_on_devices(flags, overrides)
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


def run_on_devices(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Run the job of the flags, in this process or in each of several."""
    config = hosts.run_on_all(lambda: load_config(flags, overrides))
    hosts.check_same("config", config_lib.flatten(config))
    hosts.check_same("command", {f"--{name}": str(value) for name, value in vars(flags).items()})
    absl_flags.FLAGS.mark_as_parsed()  # grain's reader processes read absl's flags
    print(report.devices_line(), flush=True)
    if warning := report.unused_accelerator_warning():
        print(warning, file=sys.stderr)
    JOBS[flags.mode].run(config, epath.Path(flags.workdir), flags)
    hosts.gather(None)  # a process that exits before the others counts as dead


def load_config(flags: argparse.Namespace, overrides: Overrides) -> Config:
    """Return the config of the flags, or the workdir's own if they name none."""
    if not flags.workdir:
        check(
            flags.config,
            f"--mode {flags.mode} needs --config, such as --config configs/digits.py, or --workdir",
        )
        return config_lib.load(flags.config, overrides)
    recorded = epath.Path(flags.workdir) / "config.json"
    check(
        flags.config or recorded.exists(),
        f"--workdir {flags.workdir!r} holds no run yet; give --config as well, such as --config "
        "configs/digits.py",
    )
    return config_lib.load(flags.config or str(recorded), overrides)


if __name__ == "__main__":
    sys.exit(main())
