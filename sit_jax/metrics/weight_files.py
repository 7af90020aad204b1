"""The published weights of the feature networks, and the converted files that are read here.

Converted files are safetensors with the names of the published file, written by `convert`. Their
metadata holds the SHA-256 of the file that they were made from.
"""

import dataclasses
import math
import os
from collections.abc import Mapping

import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sit_jax import runtime, storage
from sit_jax.errors import UserError, check, check_tensors

SOURCE = "source_sha256"  # the entry in the metadata


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file of weights, and the module that converts it."""

    url: str
    bytes: int
    sha256: str
    converter: str  # python -m CONVERTER
    cached: str  # name of the converted file in the user's cache folder

    @property
    def remedy(self) -> str:
        """Return how to get the converted file, with a network and without."""
        return (
            f"run `python -m {self.converter}`, or download {self.url} (sha256 {self.sha256}) "
            f"and run `python -m {self.converter} FILE`"
        )


INCEPTION = Published(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    "convert.inception",
    "inception.safetensors",
)
DINOV2 = Published(
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    1_217_586_395,
    # As recorded by several independent projects that use this file.
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "convert.dinov2",
    "dinov2_vitl14.safetensors",
)


def cached_path(published: Published) -> str:
    """Return where the user's cache folder has the converted file, which need not exist."""
    return os.path.join(runtime.cache_folder(), published.cached)


def read(
    published: Published, path: str | None, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return {name: float32 array} of a converted file; None is the one in the cache folder.

    Raises `UserError` if the file is missing or damaged, or its tensors are not those of `shapes`.
    """
    path = _locate(published, path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a readable .safetensors file ({storage.reason(error)}); "
            f"{published.remedy}"
        ) from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(path, found, shapes, f"; {published.remedy}")
    bad = [name for name, array in tensors.items() if not math.isfinite(array.sum())]
    check(not bad, f"{path}: {', '.join(bad[:4])} holds NaN or infinite values; {published.remedy}")
    return {name: np.asarray(tensors[name], np.float32) for name in shapes}


def is_published(published: Published, path: str | None) -> bool:
    """Return whether a converted file says that it was made from the published one."""
    with safetensors.safe_open(_locate(published, path), "numpy") as file:
        return (file.metadata() or {}).get(SOURCE) == published.sha256


def _locate(published: Published, path: str | None) -> str:
    """Return the path of the converted file. Raises `UserError` if it does not exist."""
    if path is None:
        path = cached_path(published)
    check(
        os.path.isfile(path), f"the weights {path!r} do not exist; to get them, {published.remedy}"
    )
    return path
