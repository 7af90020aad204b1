"""The lines that a run prints about its devices, an unused accelerator, and how it failed."""

import collections
import os
import platform
import re
import shutil
import subprocess

import jax

from sit_jax.errors import UserError
from sit_jax.runtime import INSTALL_CUDA

_LONGEST_REASON = 160  # characters: XLA goes on with a list of buffers
_NVIDIA_DEVICE = "/dev/nvidia0"
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_CPU_INFO = "/proc/cpuinfo"


def devices_line() -> str:
    """Return the run's devices in one line, such as `devices: 8 x TPU v5 lite, 2 processes`.

    A CPU is named: `devices: 1 x cpu (AMD EPYC 7B13)`.
    """
    counts = collections.Counter(device.device_kind for device in jax.devices())
    parts = []
    for kind, count in counts.items():
        name = f" ({_cpu_name()})" if kind == "cpu" else ""
        parts.append(f"{count} x {kind}{name}")
    if jax.process_count() > 1:
        parts.append(f"{jax.process_count()} processes")
    return "devices: " + ", ".join(parts)


def unused_accelerator_warning() -> str | None:
    """Return a warning if jax runs on the CPU of a machine with an accelerator, otherwise None.

    The line names what to install. JAX_PLATFORMS=cpu asks for the CPU, and gets no warning.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # defined at run time
    if jax.default_backend() != "cpu" or platforms == "cpu":
        return None
    if _has_nvidia_gpu():
        accelerator = "an NVIDIA GPU"
        install = INSTALL_CUDA
    elif any(map(os.path.exists, _TPU_DEVICES)):
        accelerator = "a TPU"
        install = 'pip install -e ".[tpu]"'
    else:
        return None
    return (
        f"warning: jax runs on the CPU although this machine seems to have {accelerator}; to use "
        f"it, {install}; to silence this, set JAX_PLATFORMS=cpu"
    )


def failure_line(error: Exception) -> str | None:
    """Return an error in one line if the user or the machine caused it; None if it is a bug."""
    if isinstance(error, UserError):
        return r"\n".join(str(error).splitlines())  # a value that was given may hold line breaks
    if not isinstance(error, OSError):
        return None
    place = f"{os.fsdecode(error.filename)!r}: " if error.filename else ""
    reason = error.strerror or f"{type(error).__name__}: {error}"
    return f"{place}{' '.join(reason.split())}; repair this, and give the same command again"


def bug_line(error: Exception) -> str:
    """Return the line below the traceback of an error that should not happen."""
    reason = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {reason}; this is a bug in sit_jax: please report it, with the "
        "command and the lines above"
    )


def lack_of_memory(error: Exception) -> str | None:
    """Return what could not be allocated if that is the error, otherwise None."""
    text = " ".join(str(error).split()) or "MemoryError"
    is_lack = isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError)
        and re.search("RESOURCE_EXHAUSTED|out of memory", text, re.IGNORECASE)
    )
    return text[:_LONGEST_REASON] if is_lack else None


def _has_nvidia_gpu() -> bool:
    if os.path.exists(_NVIDIA_DEVICE):
        return True
    # WSL has no device file, and an image may hold nvidia-smi without a GPU: run it.
    if not shutil.which("nvidia-smi"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0


def _cpu_name() -> str:
    try:
        with open(_CPU_INFO, encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:  # not Linux
        names = []
    return (names[0] if names else "") or platform.processor() or platform.machine()
