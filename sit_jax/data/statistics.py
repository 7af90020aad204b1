"""Mean and spread of each channel over a data set, summed batch by batch on any number of hosts.

Shape suffixes: b batch, h height, w width, c channels, m moments: c means, then c log variances.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

_LEVELS = np.arange(256, dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class ChannelSums:
    """The number of values of a channel, their sums and the sums of their squares, float64 [c].

    Those of pixels are whole numbers below 2**53 for up to 10**11 pixels, so that they are exact
    and do not depend on the order.
    """

    count: int
    sums_c: np.ndarray
    squares_c: np.ndarray

    def __add__(self, other: Self) -> "ChannelSums":
        return ChannelSums(
            self.count + other.count, self.sums_c + other.sums_c, self.squares_c + other.squares_c
        )

    @property
    def mean_c(self) -> np.ndarray:
        """The mean of each channel."""
        return self.sums_c / self.count

    @property
    def std_c(self) -> np.ndarray:
        """The standard deviation of each channel."""
        return np.sqrt(np.maximum(self.squares_c / self.count - self.mean_c**2, 0))

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """The mean and the standard deviation of all values, whatever their channel."""
        mean = self.mean_c.mean()
        return float(mean), float(np.sqrt((self.squares_c / self.count).mean() - mean**2))

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON values."""
        return {
            "count": self.count,
            "sums_c": self.sums_c.tolist(),
            "squares_c": self.squares_c.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return what `to_json` returned."""
        return cls(value["count"], np.array(value["sums_c"]), np.array(value["squares_c"]))


def total(parts: Sequence[ChannelSums]) -> ChannelSums:
    """Return the sum of one or more parts."""
    return functools.reduce(operator.add, parts)


def of_pixels(image_bhwc: np.ndarray) -> ChannelSums:
    """Return the sums of uint8 images."""
    channels = image_bhwc.shape[-1]
    counts_cl = [
        np.bincount(image_bhwc[..., channel].ravel(), minlength=256) for channel in range(channels)
    ]
    return ChannelSums(
        image_bhwc.size // channels,
        np.array([counts @ _LEVELS for counts in counts_cl], np.float64),
        np.array([counts @ _LEVELS**2 for counts in counts_cl], np.float64),
    )


def of_latents(moments_bhwm: np.ndarray, scale_c: np.ndarray, shift_c: np.ndarray) -> ChannelSums:
    """Return the expected sums of x = scale * (z - shift) for a draw z from each posterior."""
    mean, logvar = np.split(moments_bhwm.astype(np.float64), 2, axis=-1)
    x = scale_c * (mean - shift_c)
    variance = scale_c**2 * np.exp(logvar)
    return ChannelSums(x[..., 0].size, x.sum(axis=(0, 1, 2)), (x**2 + variance).sum(axis=(0, 1, 2)))
