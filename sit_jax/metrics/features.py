"""The networks whose features the metrics compare, by name."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.metrics import dinov2, inception, resize, weight_files
from sit_jax.metrics.weight_files import Published


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network, its weights, and how it takes an image.

    `widths` names the features and their lengths. `load` reads a converted weights file (None: the
    one in the user's cache folder) into a tree of NumPy arrays, and raises `UserError` if it is
    missing or not a file of this network. `apply` maps (params, uint8 images [b, h, w, c] of any
    size, c 1 or 3) to float32 features {name: [b, width]}; it is pure, and full float32 on any
    chip.
    """

    name: str
    widths: Mapping[str, int]
    weights: Published
    load: Callable[[str | None], Any]
    apply: Callable[[Any, jax.Array], dict[str, jax.Array]]


def _as_adm(x_bhwc: jax.Array) -> jax.Array:
    """Scale as ADM's TensorFlow graph does."""
    return (resize.resize(x_bhwc, inception.SIDE, resize.tf1_bilinear) - 128) / 128


def _as_pytorch_fid(x_bhwc: jax.Array) -> jax.Array:
    """Scale as pytorch-fid does."""
    return resize.resize(x_bhwc, inception.SIDE, resize.half_pixel_bilinear) / 127.5 - 1


def _apply_inception(
    prepare: Callable[[jax.Array], jax.Array], params: Any, x_bhwc: jax.Array
) -> dict[str, jax.Array]:
    return inception.features(params, prepare(_in_colour(x_bhwc)))


def _in_colour(x_bhwc: jax.Array) -> jax.Array:
    """Repeat a single channel three times."""
    return jnp.broadcast_to(x_bhwc, (*x_bhwc.shape[:3], 3))


def _inception(name: str, prepare: Callable[[jax.Array], jax.Array]) -> Extractor:
    return Extractor(
        name,
        inception.WIDTHS,
        weight_files.INCEPTION,
        load=lambda path: inception.fold(
            weight_files.read(weight_files.INCEPTION, path, inception.file_shapes())
        ),
        apply=functools.partial(_apply_inception, prepare),
    )


EXTRACTORS: dict[str, Extractor] = {
    extractor.name: extractor
    for extractor in (
        _inception("inception", _as_adm),
        _inception("inception-pytorch-fid", _as_pytorch_fid),
        Extractor(
            "dinov2",
            dinov2.WIDTHS,
            weight_files.DINOV2,
            load=lambda path: dinov2.params_from_file(
                weight_files.read(weight_files.DINOV2, path, dinov2.file_shapes())
            ),
            apply=lambda params, x: dinov2.features(params, dinov2.prepare(_in_colour(x))),
        ),
    )
}


def weights_digest(params: Any) -> str:
    """Return 16 hexadecimal digits that tell the weights in a tree of arrays apart from others."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]
