"""Image transforms: encoded bytes -> PIL image -> uint8 crop -> mirrored crop, as [h, w, c].

NumPy and Pillow only: reader processes run this, and they must not claim a device.
"""

import contextlib
import dataclasses
import io
import math
import threading
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# No other decoder of Pillow is ever tried: some start a program, such as Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
# Pillow itself refuses larger images.
PIXEL_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
# Pillow warns at half of that; `Decoding.max_pixels` decides here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_LARGEST_SCALED = 2**26  # pixels of a scaled image
# The threads of a process decode images of more pixels than this one at a time: each takes up to
# 12 bytes a pixel while it is converted and scaled.
_LARGE = 2**24
_large_image = threading.Lock()

# Pillow converts these to RGB over their complete range. It clips any other at 255.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
# In these formats the mode "I" is grey in 16 bits; a TIFF of 32 bits does not say what is white.
_FORMATS_OF_16_BIT_I = ("PPM", "PNG")
_TIFF_BITS = 258
_TIFF_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a file becomes pixels, and how large it may be."""

    max_pixels: int
    exif_orientation: bool  # whether to turn and mirror an image as its EXIF data says

    @property
    def max_bytes(self) -> int:
        """The largest file: 16 bits and 4 channels without compression, and a MiB of the rest."""
        return 8 * self.max_pixels + 2**20


def decode_crop(data: bytes, size: int, decoding: Decoding) -> np.ndarray:
    """Return the centre crop of the image in `data`, an encoded file, as uint8 [size, size, 3].

    Raises what `open_image`, `to_rgb` and `center_crop` raise, for broken data a dozen types.
    """
    image = open_image(data, decoding)
    is_large = image.width * image.height > _LARGE
    with _large_image if is_large else contextlib.nullcontext():
        return center_crop(to_rgb(image, decoding), size)


def open_image(data: bytes, decoding: Decoding) -> Image.Image:
    """Return the image in `data`, an encoded file, without its pixels: they are not decoded yet.

    Raises ValueError for another format, or an image that is too large. For a broken header,
    Pillow raises its own errors, usually OSError.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow's message holds a memory address, so each one would count as a new message.
        raise ValueError(f"not an image of {', '.join(FORMATS)}") from None
    if image.width * image.height > decoding.max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than data.max_pixels="
            f"{decoding.max_pixels}; raise it, or scale the image down"
        )
    return image


def to_rgb(image: Image.Image, decoding: Decoding) -> Image.Image:
    """Return an image of `open_image`, or of several frames the first, decoded to RGB.

    An alpha channel is dropped, not blended, as the reference does. Grey values of 16 bits are
    scaled to 8. Raises ValueError for values whose range is not known. For broken data, Pillow's
    decoders raise their own errors: usually OSError, sometimes SyntaxError or ValueError.
    """
    rgb = _as_rgb(image)
    if decoding.exif_orientation:  # Pillow itself always obeys the orientation of a TIFF
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _as_rgb(image: Image.Image) -> Image.Image:
    white = _white(image)
    if white:
        return _scaled_to_8_bits(image, white).convert("RGB")
    if image.mode not in _MODES:
        raise ValueError(
            f"values of mode {image.mode!r} do not say which one is white; convert it to 8 or 16 "
            "bits per channel"
        )
    image.load()
    image.info.pop("transparency", None)  # dropped anyway; with it, Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _white(image: Image.Image) -> int | None:
    """Return the largest value of a grey image of more than 8 bits; None for other images."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))[0]
        return 2**bits - 1
    return 2**16 - 1 if image.mode == "I" and image.format in _FORMATS_OF_16_BIT_I else None


def _scaled_to_8_bits(image: Image.Image, white: int) -> Image.Image:
    """Return a grey image of 0 to `white` as one of 0 to 255, rounded."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + white // 2) // white).clip(0, 255).astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow inverts only 8 bits and fewer
    scaled = Image.fromarray(grey)
    scaled.info = image.info  # with the EXIF data
    return scaled


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Apply ADM's centre crop: scale the shorter side to `size`, keep the middle, uint8 [s, s, 3].

    Bicubic resampling alone would skip pixels of a much larger image. So the image is first halved
    with a box filter while its shorter side is at least twice `size`. Raises ValueError for an
    image so long and thin that it would be scaled to gigabytes.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled_size = round(image.width * scale), round(image.height * scale)
    if math.prod(scaled_size) > _LARGEST_SCALED:  # most of which the crop would throw away
        raise ValueError(
            f"{image.width} x {image.height} pixels are too long and thin to scale to {size}; crop "
            "the image"
        )
    image = image.resize(scaled_size, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def describe(decoding: Decoding, size: int) -> dict[str, Any]:
    """Return what this module does to a file, for a data card."""
    orientation = "obeyed" if decoding.exif_orientation else "ignored, except that of a TIFF"
    return {
        "crop": f"halved with a box filter while the shorter side is {2 * size} pixels or more, "
        f"then scaled to {size} (bicubic); the middle {size} x {size}",
        "decoding": {
            "formats": list(FORMATS),
            "largest": f"{decoding.max_pixels:,} pixels",
            "EXIF orientation": orientation,
            "alpha": "dropped, not blended",
            "grey, palette, CMYK, YCbCr, LAB": "converted to RGB by Pillow",
            "grey of 16 bits": "scaled to 8 bits",
            "32-bit integers and floats": "unreadable, as their white is not known",
            "several frames": "the first one",
        },
    }


def mirror(image_hwc: np.ndarray) -> np.ndarray:
    """Mirror an image left to right."""
    mirrored_hwc = np.empty_like(image_hwc)
    for channel in range(image_hwc.shape[-1]):  # 5 times as fast as all at once
        mirrored_hwc[..., channel] = image_hwc[:, ::-1, channel]
    return mirrored_hwc
