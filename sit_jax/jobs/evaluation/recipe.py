"""What a number depends on, so that it can be computed again."""

import argparse
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sit_jax import report, storage
from sit_jax.jobs.evaluation.feature_sets import Space

_PACKAGES = ("sit_jax", "jax", "jaxlib", "flax", "diffrax", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a clone without installing it
            found[name] = "not installed"
    return found


def describe_spaces(spaces: Sequence[Space]) -> list[dict[str, str]]:
    """Return name, digest and origin of the weights, and precision of each feature space."""
    return [
        {
            "name": space.name,
            "digest": space.digest,
            "weights": space.weights,
            "matmul": "highest",
        }
        for space in spaces
    ]


def environment() -> dict[str, Any]:
    """Return the devices, and the versions of the packages."""
    return {"devices": report.devices_line().removeprefix("devices: "), "versions": versions()}


def command(mode: str, config: str, flags: argparse.Namespace, names: Sequence[str]) -> str:
    """Return the command that runs `mode` again with the recorded config and these flags.

    Its paths do not depend on the folder that it is run in.
    """
    parts = ["python", "-m", "sit_jax.main", "--mode", mode, "--config", _absolute(config)]
    for name in names:
        if value := getattr(flags, name):
            parts += [f"--{name}", _absolute(value)]
    return shlex.join(parts)


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else os.path.abspath(path)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of every value of a nested recipe."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and value and isinstance(value[0], Mapping):
            for number, item in enumerate(value):
                rows += flat(item, f"{prefix}{key}[{number}].")
        else:
            rows.append((prefix + key, str(value)))
    return rows
