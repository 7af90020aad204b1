"""Runs programs in other processes on this machine, each with fake devices."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tests.commands import ROOT

MAIN = ("-m", "sit_jax.main")
# What else is on the path may hold the packages.
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
_GLOO = re.compile(r"Gloo|peer ranks|^[\d\s]*$")
TIMEOUT_S = 200  # enough for a run on a busy machine


def run_python(*arguments: str, devices: int) -> str:
    """Return the stdout of a Python program that sees this many CPU devices and must succeed."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


class Processes:
    """main, or another `program`, with `arguments` in `count` processes of `devices` devices each.

    Process I prints to folder/out.I and folder/err.I. With `folders` it runs in folders[I]; with
    `extra_arguments` it gets extra_arguments[I] too. With `joined` False, no variable tells the
    processes about each other. Each leads a process group, as if a shell or SLURM had started it.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        arguments: Sequence[object],
        *,
        count: int = 2,
        devices: int = 4,
        program: Sequence[str] = MAIN,
        folders: Sequence[pathlib.Path] = (),
        extra_arguments: Sequence[Sequence[str]] = (),
        platforms: str = "cpu",
        joined: bool = True,
    ):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.children = []
        for number in range(count):
            environment = {
                **os.environ,
                "PYTHONPATH": PYTHONPATH,
                "JAX_PLATFORMS": platforms,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            if joined:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(number),
                }
            command = [
                sys.executable,
                *program,
                *map(str, arguments),
                *(extra_arguments[number] if extra_arguments else ()),
            ]
            with (
                open(folder / f"out.{number}", "wb") as out,
                open(folder / f"err.{number}", "wb") as err,
            ):
                cwd = folders[number] if folders else ROOT
                self.children.append(
                    subprocess.Popen(
                        command, env=environment, cwd=cwd, stdout=out, stderr=err, process_group=0
                    )
                )

    def printed(self, number: int = 0, stream: str = "out") -> str:
        """Return what a process has written, without the lines of jax's CPU collectives."""
        text = (self.folder / f"{stream}.{number}").read_text()
        # Those come from several threads, which mix the parts of their lines.
        return "".join(line for line in text.splitlines(keepends=True) if not _GLOO.search(line))

    def wait(self) -> list[int]:
        """Return the exit statuses; kill processes that run too long."""
        end = time.monotonic() + TIMEOUT_S
        try:
            return [child.wait(max(end - time.monotonic(), 0)) for child in self.children]
        finally:
            for child in self.children:
                child.kill()

    def succeed(self) -> str:
        """Return what process 0 printed, once all have succeeded and no other has printed."""
        statuses = self.wait()
        errors = [self.printed(number, "err")[-3000:] for number in range(len(statuses))]
        assert statuses == [0] * len(statuses), "\n".join(errors)
        assert not any(self.printed(number) for number in range(1, len(statuses)))
        return self.printed()
