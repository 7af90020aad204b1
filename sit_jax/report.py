"""What a run says about the machine it is on: its devices, and an accelerator left unused."""

import collections
import os
import platform
import shutil
import subprocess

import jax

_NVIDIA_DEVICE = "/dev/nvidia0"
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_CPU_INFO = "/proc/cpuinfo"


def devices_line() -> str:
    """All devices of the run: `devices: 1 x cpu (AMD EPYC 7B13)`, or `devices: 8 x TPU v5 lite, 2 processes`."""
    counts = collections.Counter(device.device_kind for device in jax.devices())
    kinds = [
        f"{count} x {kind}" + (f" ({_cpu_name()})" if kind == "cpu" else "")
        for kind, count in counts.items()
    ]
    processes = jax.process_count()
    return "devices: " + ", ".join(kinds) + (f", {processes} processes" if processes > 1 else "")


def unused_accelerator_warning() -> str | None:
    """One line that names the extra to install when jax runs on the CPU beside an accelerator; None when all is well.

    A CPU that was asked for (JAX_PLATFORMS=cpu) is no mistake.
    """
    if jax.default_backend() != "cpu" or jax.config.jax_platforms == "cpu":
        return None
    if _has_nvidia_gpu():
        found, extra = "an NVIDIA GPU", "cuda12"
    elif any(map(os.path.exists, _TPU_DEVICES)):
        found, extra = "a TPU", "tpu"
    else:
        return None
    return (
        f'warning: jax runs on the CPU although {found} seems to be here; pip install -e ".[{extra}]" '
        "lets it use it (JAX_PLATFORMS=cpu silences this)"
    )


def _has_nvidia_gpu() -> bool:
    if os.path.exists(_NVIDIA_DEVICE):
        return True
    # WSL has no device file, and an image may hold the tool without the card: ask the tool.
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
