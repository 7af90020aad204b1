"""Starts, watches and kills child processes that run the program on this machine."""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
_TIMEOUT_S = 180  # for each condition that wait_for waits for


def start(
    arguments: Sequence[str],
    log: pathlib.Path,
    cache: pathlib.Path,
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Start Python with these arguments, on the CPU unless the environment `variables` differ.

    It prints to LOG.out and LOG.err.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(variables or {}),
    }
    command = [sys.executable, *arguments]
    with open(f"{log}.out", "wb") as out, open(f"{log}.err", "wb") as err:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=err)


def printed(log: pathlib.Path, stream: str = "out") -> str:
    """Return the output of the last child so far."""
    return pathlib.Path(f"{log}.{stream}").read_text()


def wait_for(
    child: subprocess.Popen, condition: Callable[[], object], poll_s: float = 0.001
) -> bool:
    """Wait for the condition; return False if the child ended first."""
    end = time.monotonic() + _TIMEOUT_S
    while not condition():
        if child.poll() is not None:
            return False
        if time.monotonic() > end:
            child.kill()
            raise TimeoutError(f"{' '.join(child.args)} hangs")
        time.sleep(poll_s)
    return True


def end(child: subprocess.Popen) -> int:
    """Wait until the child ends; return its exit status."""
    wait_for(child, lambda: False, poll_s=0.02)
    return child.returncode


def succeed(child: subprocess.Popen, log: pathlib.Path) -> None:
    """Wait until the child ends. Raises RuntimeError with its messages unless it succeeds."""
    if end(child):
        raise RuntimeError(
            f"{' '.join(child.args)} ended with status {child.returncode}:\n{printed(log, 'err')}"
        )
