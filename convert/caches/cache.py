"""What all layouts have in common: a cache as it is found, and its moments in our form.

Shape suffixes: v views (the image, its mirror image), h height, w width, c channels of a latent,
m moments (mean and log variance of each channel), n examples.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sit_jax.errors import UserError, check

SD_VAE = "sd-vae"  # the name that training compares with latents.codec
SD_VAE_CHANNELS = 4
SD_VAE_SCALE = 0.18215
SD_VAE_FACTOR = 8  # pixels along a side of a latent cell
STD, LOGVAR, NONE = "std", "logvar", "none"
# Autoencoders limit a log variance to this range before they draw.
_LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """The network's input is scale * (z - shift), for each channel of the latent z."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Cache:
    """Latents as another project has stored them. Example i is the same whenever it is opened."""

    layout: str
    shape: tuple[int, int, int]  # height, width and channels of a latent
    mirrored: bool  # with the latents of the mirror images
    variance: bool  # with the spread of the posterior
    labels: Sequence[Any]  # as they are stored: whole numbers, or names
    labels_file: str  # for messages
    # Yield moments_vhwm of these examples, float32.
    read: Callable[[range], Iterator[np.ndarray]]
    file_of: Callable[[int], str]  # the file that holds an example
    details: dict[str, Any]  # of the files, and how they were read
    normalisation: Normalisation | None = None  # if the layout gives it
    autoencoder: str = "other"
    beside: str = ""  # files that are not read


def to_views(name: str, views: Iterable[np.ndarray], spread: str) -> np.ndarray:
    """Return moments_vhwm, float32, of views [h, w, m] whose second half is `spread`.

    A standard deviation becomes a log variance, at least -30, which stands for 0.
    Raises UserError that names the file for a value that is not finite, and a negative deviation.
    """
    with np.errstate(over="ignore"):  # of float64; refused below
        moments = np.stack(list(views), dtype=np.float32, casting="unsafe")
    check(
        np.isfinite(moments.max() - moments.min()),
        f"{name} holds NaN or infinite values; get an intact copy of it",
    )
    if spread == NONE:
        return moments
    channels = moments.shape[-1] // 2
    second = moments[..., channels:]
    if spread == STD:
        lowest = second.min()
        check(
            lowest >= 0,
            f"{name} has the standard deviation {lowest:g}; expected mean and standard deviation; "
            f"if its second half is the log variance, give --layout moments --spread {LOGVAR}",
        )
        with np.errstate(divide="ignore"):
            second = 2 * np.log(second)
    moments[..., channels:] = np.clip(second, *_LOGVAR_RANGE)
    return moments


def find_axes(name: str, shape: Sequence[int], axes: str | None) -> str:
    """Return "chw" or "hwc": the axes of an array of this shape, whose h and w must be equal.

    Raises UserError if both or neither is possible and `axes` does not decide.
    """
    check(
        len(shape) == 3 and min(shape) > 0,
        f"{name} has the shape {list(shape)}; expected [channels, height, width], or [height, "
        "width, channels]",
    )
    sides = {"chw": shape[1:], "hwc": shape[:2]}
    square = [order for order, (height, width) in sides.items() if height == width]
    if axes:
        check(
            axes in square,
            f"--axes is {axes}, but {name} has the shape {list(shape)}, whose height and width "
            "would differ; give the other one",
        )
        return axes
    check(
        square,
        f"{name} has the shape {list(shape)}; expected square latents, [channels, height, width] "
        "or [height, width, channels]",
    )
    if len(square) > 1:
        raise UserError(
            f"{name} has the shape {list(shape)}, which does not tell its axes; give --axes chw or "
            "--axes hwc"
        )
    return square[0]
