"""Image transforms: encoded bytes -> PIL image -> uint8 crop -> mirrored crop, as [h, w, c].

NumPy and Pillow only: reader processes run this, and they must not claim a device.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError


def decode_rgb(data: bytes) -> Image.Image:
    """Return the RGB image in `data`, an encoded file.

    An alpha channel is dropped, not blended, as the reference does. For broken data,
    Pillow's decoder raises its own errors: usually OSError, sometimes SyntaxError or ValueError.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError:
        # Pillow's message holds a memory address, so each one would count as a new message.
        raise ValueError("not an image that Pillow knows") from None


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Apply ADM's centre crop: scale the shorter side to `size`, keep the middle, uint8 [s, s, 3].

    Bicubic resampling alone would skip pixels of a much larger image. So the image is first halved
    with a box filter while its shorter side is at least twice `size`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled_size = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled_size, Image.Resampling.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def mirror(image_hwc: np.ndarray) -> np.ndarray:
    """Mirror an image left to right. Returns a view of its argument."""
    return image_hwc[:, ::-1]
