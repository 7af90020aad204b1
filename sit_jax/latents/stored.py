"""Stored latents of any autoencoder as a codec, without a decoder."""

from typing import TypeVar

import jax
import numpy as np

from sit_jax.errors import check
from sit_jax.latents import posterior
from sit_jax.latents.codec import Codec, Shape
from sit_jax.record import RecordSpec

_SPREAD = 3.0  # x at which a colour is at its end, in standard deviations of a normalised latent
_COLOURS = 3

Array = TypeVar("Array", np.ndarray, jax.Array)


def open_stored() -> Codec:
    """Return the codec of stored latents. It has no weights.

    Instead of images, `decode` gives the first three channels as red, green and blue.
    """
    return Codec(
        encode=lambda params, keys_b, records: posterior.draw_stored(keys_b, records),
        decode=lambda params, x_bhwc: false_colours(x_bhwc),
        shape=_shape,
        abstract_params={},
        load=dict,
        quantised=False,
        has_decoder=False,
    )


def false_colours(x_bhwc: Array) -> Array:
    """Return the first three channels, or the first if there are fewer, as images in [-1, 1]."""
    shown = _COLOURS if x_bhwc.shape[-1] >= _COLOURS else 1
    return (x_bhwc[..., :shown] / _SPREAD).clip(-1.0, 1.0)


def _shape(spec: RecordSpec) -> Shape:
    check(
        "moments" in spec,
        "latents.codec is 'stored', but data.source gives images; set data.source=latents, or "
        "another latents.codec",
    )
    height, width, moments = spec["moments"].shape
    return height, width, moments // 2
