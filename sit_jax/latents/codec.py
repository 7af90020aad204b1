"""The seam between images and what the network sees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Codec:
    """What the network sees of an image, and the way back. Functions of their arguments, fit for `jit`.

    Weights are arguments: inside a compiled program they would be constants of it.
    """

    encode: Callable[
        [Any, jax.Array, jax.Array], jax.Array
    ]  # (params, keys_b, images_bhwc in [-1, 1]) -> x_bhwc
    decode: Callable[[Any, jax.Array], jax.Array]  # (params, x_bhwc) -> images_bhwc
    shape: Callable[
        [Shape], Shape
    ]  # of an image -> of x; `UserError` for an image that cannot be encoded
    abstract_params: Any  # shapes and types of params
    load: Callable[
        [], Any
    ]  # reads params, NumPy arrays; `UserError` if they are not there or are others
    scale: float = 1.0  # x is in units of the encoder's output times this


PIXELS = Codec(
    encode=lambda params, keys_b, images_bhwc: images_bhwc,
    decode=lambda params, x_bhwc: x_bhwc,
    shape=lambda image: image,
    abstract_params={},
    load=dict,
)
