"""Image transforms: encoded bytes -> PIL image -> uint8 crop -> flip -> float in [-1, 1]. Arrays are [h, w, c].

NumPy and Pillow only: reader processes run this and must claim no device. `normalise` serves JAX arrays all the same.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

LEVELS = 256  # of a uint8 pixel
BIN = 2 / (LEVELS - 1)  # between neighbouring levels, as `normalise` gives them


def decode_rgb(data: bytes) -> Image.Image:
    """The RGB image in `data`, an encoded file. An alpha channel is dropped, not blended, as the reference does.

    Broken data raise whatever Pillow's decoder for them raises: OSError mostly, SyntaxError or ValueError at times.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (
        UnidentifiedImageError
    ):  # its message holds a memory address, so it would be news each time
        raise ValueError("not an image that Pillow knows") from None


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's centre crop: scales the shorter side to `size` pixels, keeps the middle; uint8 [size, size, 3].

    Halving with a box filter while the shorter side is at least twice `size`, then one bicubic step: bicubic alone
    would skip pixels of a much larger image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def flip(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """`image` [h, w, c], mirrored left to right with probability 1/2. May be a view of its argument."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def normalise(image):
    """uint8 in 0..255 -> float32 in [-1, 1], any shape, NumPy or JAX, inside `jit` too.

    The same function as torchvision's ToTensor and Normalize, (x/255 - 0.5) / 0.5, and within 2**-24 of their values.
    Here the levels are whole numbers until the one division, so that XLA, which multiplies by 1/255 instead, stays in
    [-1, 1]: in torchvision's order of operations it gives 1.0000001 for white.
    """
    return (image.astype(np.float32) * 2 - 255) / 255
