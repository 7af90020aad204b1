"""Pixels as a codec: the network sees the image itself, scaled to [-1, 1]."""

from typing import TypeVar

import jax
import numpy as np

from sit_jax.errors import check
from sit_jax.latents.codec import Codec, Shape
from sit_jax.record import RecordSpec

LEVELS = 256  # of a uint8 pixel
BIN = 2 / (LEVELS - 1)  # distance between neighbouring levels after `normalise`

Array = TypeVar("Array", np.ndarray, jax.Array)


def normalise(image: Array) -> Array:
    """Map uint8 0..255 to float32 [-1, 1]: any shape, NumPy or JAX, also inside `jit`.

    Equal to torchvision's ToTensor and Normalize, (x/255 - 0.5) / 0.5, within 2**-24. The levels
    stay whole numbers until the only division. XLA multiplies by 1/255 instead of dividing, which
    in torchvision's order of operations gives 1.0000001 for white; in this order it stays in [-1,
    1].
    """
    return (image.astype(np.float32) * 2 - 255) / 255


def open_pixels() -> Codec:
    """Return the codec of pixels. It has no weights."""
    return Codec(
        encode=lambda params, keys_b, records: normalise(records["image"]),
        decode=lambda params, x_bhwc: x_bhwc,
        shape=_shape,
        abstract_params={},
        load=dict,
        quantised=True,
    )


def _shape(spec: RecordSpec) -> Shape:
    check(
        "image" in spec,
        "latents.codec is 'pixels', but data.source gives latents; set latents.codec=sd-vae, or "
        "stored for those of another autoencoder",
    )
    height, width, channels = spec["image"].shape
    return height, width, channels
