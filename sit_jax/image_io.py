"""Pictures at the edge: model range to uint8, PNG files, and grids for people to look at.

Shapes: b images, h height, w width, c channels (1 or 3). Arrays are numpy; nothing here runs on a device.
"""

import io

import numpy as np
from etils import epath
from PIL import Image

from sit_jax import storage


def to_uint8(x_bhwc: np.ndarray) -> np.ndarray:
    """Floats in [-1, 1] -> uint8, `clamp(127.5 x + 128, 0, 255)` truncated: the rule of the reference's sample_ddp.

    Any shape is taken; values outside the range end at 0 or 255.
    """
    return np.clip(127.5 * np.asarray(x_bhwc, np.float32) + 128, 0, 255).astype(np.uint8)


def encode_png(image_hwc: np.ndarray) -> bytes:
    """uint8 (h, w, 1) or (h, w, 3) -> the bytes of a PNG file; `ValueError` for any other array."""
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] not in (1, 3):
        raise ValueError(
            f"got {image_hwc.dtype} of shape {image_hwc.shape}; a PNG takes uint8 (h, w, 1 or 3)"
        )
    file = io.BytesIO()
    Image.fromarray(image_hwc[..., 0] if image_hwc.shape[-1] == 1 else image_hwc).save(file, "PNG")
    return file.getvalue()


def sheet(images_bhwc: np.ndarray, columns: int, *, scale: int = 1, pad: int = 2) -> np.ndarray:
    """uint8 images -> one uint8 (H, W, c) grid, filled row by row; cells of the last row without an image stay white.

    Each pixel becomes `scale` x `scale` (nearest: tiny images stay sharp); `pad` white pixels lie around every image.
    """
    images_bhwc = np.repeat(np.repeat(images_bhwc, scale, axis=1), scale, axis=2)
    b, h, w, c = images_bhwc.shape
    rows = -(-b // columns)
    cells = np.full((rows * columns, h + pad, w + pad, c), 255, np.uint8)
    cells[:b, :h, :w] = images_bhwc
    grid = cells.reshape(rows, columns, h + pad, w + pad, c).swapaxes(1, 2)
    grid = grid.reshape(rows * (h + pad), columns * (w + pad), c)
    return np.pad(grid, ((pad, 0), (pad, 0), (0, 0)), constant_values=255)


class ImageWriter:
    """One PNG per index in `folder` (local or gs://, made if need be): `000123.png`, longer names past 999,999.

    A file that is there is whole, so a job that was killed asks what is `missing` and makes only that.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, index: int, image_hwc: np.ndarray) -> None:
        """Writes a uint8 image (c = 1 or 3) under its index, over whatever was there."""
        storage.write_bytes(self.folder / _file_name(index), encode_png(image_hwc))

    def read(self, index: int) -> np.ndarray:
        """The uint8 image (h, w, c) that was written under the index."""
        image = np.asarray(Image.open(io.BytesIO((self.folder / _file_name(index)).read_bytes())))
        return image[..., None] if image.ndim == 2 else image

    def missing(self, n: int) -> list[int]:
        """The indices of range(n) that have no file yet, in order."""
        there = {path.name for path in self.folder.iterdir()}
        return [index for index in range(n) if _file_name(index) not in there]


def _file_name(index: int) -> str:
    return f"{index:06d}.png"
