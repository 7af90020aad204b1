"""Resize images as the feature networks expect it, each axis by one matrix product.

Libraries disagree about where a pixel lies, and features follow: each function names its model.
Shape suffixes: o pixels of the output, i of the input; b, h, w, c as usual, y, x resized h, w.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Weights = Callable[[int, int], np.ndarray]  # (input size, output size) -> [o, i], rows sum to 1


def tf1_bilinear(inputs: int, outputs: int) -> np.ndarray:
    """Return TensorFlow 1's weights: pixel o lies at o * inputs / outputs, its left edge."""
    places_o = np.arange(outputs, dtype=np.float32) * (np.float32(inputs) / np.float32(outputs))
    return _linear(places_o, inputs)


def half_pixel_bilinear(inputs: int, outputs: int) -> np.ndarray:
    """Return the weights of PyTorch with align_corners=False: pixels lie at their centres.

    There is no antialiasing: a smaller image takes two neighbours of each place, as a larger one.
    """
    scale = np.float32(inputs) / np.float32(outputs)
    places_o = (np.arange(outputs, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    return _linear(np.maximum(places_o, 0), inputs)


def _linear(places_o: np.ndarray, inputs: int) -> np.ndarray:
    """Return the weights of the two pixels around each place; the last one has no right one."""
    rows_o = np.arange(len(places_o))
    low_o = places_o.astype(int)
    high_o = np.minimum(low_o + 1, inputs - 1)
    weights_oi = np.zeros((len(places_o), inputs), np.float32)
    np.add.at(weights_oi, (rows_o, low_o), 1 - (places_o - low_o))
    np.add.at(weights_oi, (rows_o, high_o), places_o - low_o)
    return weights_oi


def pillow_bicubic(inputs: int, outputs: int) -> np.ndarray:
    """Return Pillow's bicubic weights (a = -1/2), whose kernel widens when the image shrinks."""
    scale = inputs / outputs
    width = max(scale, 1.0)
    centres_o = (np.arange(outputs) + 0.5) * scale
    distances_oi = np.abs(np.arange(inputs) + 0.5 - centres_o[:, None]) / width
    weights_oi = cubic(distances_oi, -0.5)
    return (weights_oi / weights_oi.sum(axis=1, keepdims=True)).astype(np.float32)


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Return the cubic convolution kernel at distances >= 0 (Keys 1981, eq. 15, with free a)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))


def resize(x_bhwc: jax.Array, size: int, weights: Weights) -> jax.Array:
    """Return float32 images [b, size, size, c] in the units of the input."""
    _, h, w, _ = x_bhwc.shape
    x_bhwc = x_bhwc.astype(jnp.float32)
    x_bhxc = _along("xw,bhwc->bhxc", weights(w, size), x_bhwc)
    return _along("yh,bhxc->byxc", weights(h, size), x_bhxc)


def resize_as_uint8(x_bhwc: jax.Array, size: int, weights: Weights) -> jax.Array:
    """Return what an 8-bit library gives: values are rounded and clipped after each axis.

    Rows are resized first, as in Pillow. (Pillow 13 begins with the columns if an image is much
    higher than wide. Its values differ by a few units there.)
    """

    def rounded(x: jax.Array) -> jax.Array:
        return jnp.clip(jnp.floor(x + 0.5), 0, 255)

    _, h, w, _ = x_bhwc.shape
    x_bhwc = x_bhwc.astype(jnp.float32)
    x_bhxc = rounded(_along("xw,bhwc->bhxc", weights(w, size), x_bhwc))
    return rounded(_along("yh,bhxc->byxc", weights(h, size), x_bhxc))


def _along(equation: str, weights_oi: np.ndarray, x: jax.Array) -> jax.Array:
    return jnp.einsum(equation, weights_oi, x, precision="highest")
