"""The interface between records and the network's input."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sit_jax.record import RecordSpec

Shape = tuple[int, int, int]
Records = Mapping[str, jax.Array]  # a batch of records


@dataclasses.dataclass(frozen=True)
class Codec:
    """Turns a batch of records into the network's input x, and x back into images.

    `encode` and `decode` are pure functions, fit for `jit`. Weights are arguments: if they were
    captured, they would become constants of the compiled program.
    """

    encode: Callable[[Any, jax.Array, Records], jax.Array]  # (params, keys_b, records) -> x_bhwc
    decode: Callable[[Any, jax.Array], jax.Array]  # (params, x_bhwc) -> images_bhwc in [-1, 1]
    shape: Callable[[RecordSpec], Shape]  # of x; raises UserError for records it cannot encode
    abstract_params: Any  # shapes and types of params; {} if there are none
    load: Callable[[], Any]  # reads params as NumPy arrays; raises UserError if it cannot
    quantised: bool  # x takes the 256 levels of an 8-bit image, so its density needs dequantisation
    scale: float = 1.0  # x is in units of the encoder's output times this
    # (params, records of images) -> moments_bhwm of the posteriors, for codecs that have them.
    moments: Callable[[Any, Records], jax.Array] | None = None
    # The part of the params that the moments depend on.
    encoder: Callable[[Any], Any] = dict
    # Whether `decode` gives images; otherwise they are x in false colours.
    has_decoder: bool = True
