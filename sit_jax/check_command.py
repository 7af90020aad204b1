"""Checks, on any machine, that a command of `sit_jax.main` can start on the devices of another one.

    python -m sit_jax.check_command --devices 16 -- --config configs/latents.py --workdir gs://B/run

The scripts in launch/ run this before they create anything. It needs no accelerator and compiles
nothing. It does what the command does before its first look at the data: it reads the flags and the
config, and sets up the network and the mesh, on as many devices of the CPU.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence

import jax
from etils import epath

from sit_jax import command_line, main, report, storage
from sit_jax.data import latent_cache, pipeline
from sit_jax.data.latents import check_fit
from sit_jax.data.sources import SOURCES
from sit_jax.errors import UserError, check
from sit_jax.jobs.data import check_autoencoder, check_classes
from sit_jax.jobs.job import Job, Overrides
from sit_jax.jobs.preflight.topology import leave_devices_alone
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.table import JOBS
from sit_jax.laws import declared, user_path
from sit_jax.settings import Config, Mesh, get

_MOST_DEVICES = 2**14


def check_command(
    argv: Sequence[str],
    devices: Sequence[jax.Device],
    *,
    elsewhere: bool = False,
    brings_data: bool = False,
    manifest: str | None = None,
) -> str:
    """Return a line on what the command does on so many devices.

    `elsewhere` says that its machines have none of the folders of this one, `brings_data` that
    data.path is made on them before the start, and `manifest` is the folder of the manifest of the
    stored latents that it will hold. Raises `UserError` if the command cannot start.
    """
    flags, overrides = _parse(argv)
    job = JOBS[flags.mode]
    check(job.uses_devices, f"--mode {flags.mode} needs no accelerator; run it on this machine")
    config = _load_config(flags, overrides)
    _check_data_is_named(config, job)
    if elsewhere:
        _check_paths(config, job, flags, brings_data)
    elif not brings_data:
        manifest = _local_manifest(config, job)
    data = [_check_manifest(config, manifest)] if manifest else []
    if not job.takes("mesh.data"):  # each host encodes on a mesh of its own
        config = dataclasses.replace(config, mesh=Mesh())
    setup = set_up(config, devices)
    job.check_batches(setup)
    words = [f"{flags.mode} on {len(devices)} devices"]
    words.append(" x ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items()))
    words.append("input " + "x".join(map(str, setup.input_shape)))
    return ", ".join(words + data)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # of --help
            return command_line.parse_elsewhere(argv)
    except SystemExit as error:
        raise UserError("--help and --help-config only print; run them on this machine") from error


def _load_config(flags: argparse.Namespace, overrides: Overrides) -> Config:
    if flags.config:  # the workdir is not needed, and may be out of reach
        flags = argparse.Namespace(**{**vars(flags), "workdir": None})
        return main.load_config(flags, overrides)
    try:
        storage.check_reachable("--workdir", flags.workdir)
    except UserError as error:
        raise UserError(f"{error}; or give --config as well, so that it can be checked") from error
    return main.load_config(flags, overrides)


def _check_data_is_named(config: Config, job: Job) -> None:
    data = config.data
    kind = SOURCES[data.source]
    if not job.takes("data.path"):
        return
    check(
        data.path or not kind.needs_path,
        f"data.path is empty, but data.source={data.source!r} needs a folder; set it, or name "
        "stored latents that are to be copied to the machines: --data gs://BUCKET/FOLDER before --",
    )
    check(
        not data.path or kind.reads_buckets or not storage.is_remote(data.path),
        f"data.path {data.path!r} is in a bucket, but data.source={data.source!r} reads only local "
        f"folders; mount the bucket: --data {data.path} --mount before --",
    )


def _check_paths(config: Config, job: Job, flags: argparse.Namespace, brings_data: bool) -> None:
    """Raise `UserError` for a folder of this machine, which the other machines do not have."""
    paths = command_line.paths(flags)
    for entry in declared(Config):
        if entry.law is user_path and job.takes(entry.key):
            paths[entry.key] = get(config, entry.key)
    if brings_data:
        del paths["data.path"]
    for name, path in paths.items():
        remedy = "give one in a bucket, such as gs://BUCKET/FOLDER"
        if name == "data.path":
            mount = "" if config.data.source == "latents" else " --mount"
            remedy = f"copy it to a bucket and give --data gs://BUCKET/FOLDER{mount} before --"
        check(
            not path or storage.is_remote(path),
            f"{name} {path!r} is a folder of this machine, and the command runs on others; "
            f"{remedy} (or --no_check before --, if those have it)",
        )


def _local_manifest(config: Config, job: Job) -> str | None:
    """Return the folder if data.path holds stored latents. Raises `UserError` if it is missing."""
    data = config.data
    if not data.path or not job.takes("data.path"):
        return None
    storage.check_reachable("data.path", data.path)
    check(epath.Path(data.path).exists(), f"data.path {data.path!r} does not exist; correct it")
    return data.path if data.source == "latents" else None


def _check_manifest(config: Config, folder: str) -> str:
    """Return the number of latents. Raises `UserError` unless they are those of the config."""
    data = config.data
    check(
        data.source == "latents",
        f"the data are stored latents, but data.source is {data.source!r}; give a config such as "
        "configs/latents.py",
    )
    manifest = latent_cache.read_manifest(folder)
    check_fit(manifest, data.options)
    check_classes(data, manifest.plan.class_names)
    check_autoencoder(config.latents, manifest, folder)
    pipeline.check_flip(manifest.plan.moments.mirrored, data.flip)
    return f"{manifest.records:,} latents"


def _read_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options before -- and the arguments after it."""
    split = list(argv).index("--")
    parser = argparse.ArgumentParser("python -m sit_jax.check_command", allow_abbrev=False)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--elsewhere", action="store_true")
    parser.add_argument("--brings_data", action="store_true")
    parser.add_argument("--manifest")
    return parser.parse_args(argv[:split]), list(argv[split + 1 :])


def run(argv: Sequence[str]) -> int:
    """Run the command line and return its exit status: 0, or 2 after one line on stderr."""
    try:
        options, arguments = _read_options(argv)
        count = options.devices
        check(1 <= count <= _MOST_DEVICES, f"{count} devices; expected 1 to {_MOST_DEVICES:,}")
        leave_devices_alone()
        jax.config.update("jax_num_cpu_devices", count)
        if options.manifest:
            storage.check_reachable("--data", options.manifest)
        line = check_command(
            arguments,
            jax.devices(),
            elsewhere=options.elsewhere,
            brings_data=options.brings_data,
            manifest=options.manifest,
        )
    except Exception as error:
        message = report.failure_line(error)
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
