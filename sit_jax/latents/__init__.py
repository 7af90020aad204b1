"""The seam between images and what the network sees: a codec encodes the one to the other and back."""

import dataclasses
from collections.abc import Callable

import jax

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Codec:
    """`encode(key, images_bhwc in [-1, 1]) -> x_bhwc`, `decode(x_bhwc) -> images_bhwc`, `shape(image hwc) -> x hwc`.

    x is the pixels themselves, or latents times `scale`.
    """

    encode: Callable[[jax.Array, jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    shape: Callable[[Shape], Shape]
    scale: float | None = None


CODECS = {"pixels": Codec(encode=lambda key, images: images, decode=lambda x: x, shape=lambda shape: shape)}
