"""Images as output: model range to uint8, PNG files, and sheets of many images.

Shapes: b images, h height, w width, c channels (1 or 3). All arrays are NumPy arrays, on the host.
"""

import io
import itertools
import os
import zipfile
from collections.abc import Iterable

import numpy as np
from etils import epath
from PIL import Image

from sit_jax import storage
from sit_jax.errors import UserError


def to_uint8(x_bhwc: np.ndarray) -> np.ndarray:
    """Convert floats in [-1, 1], of any shape, to uint8: `clamp(127.5 x + 128, 0, 255)`, truncated.

    This is the rule of the reference's sample_ddp. Values outside the range become 0 or 255.
    """
    return np.clip(127.5 * np.asarray(x_bhwc, np.float32) + 128, 0, 255).astype(np.uint8)


def encode_png(image_hwc: np.ndarray) -> bytes:
    """Encode a uint8 image (h, w, 1) or (h, w, 3) as PNG. Raises ValueError for any other array."""
    if image_hwc.dtype != np.uint8 or image_hwc.ndim != 3 or image_hwc.shape[-1] not in (1, 3):
        raise ValueError(
            f"got {image_hwc.dtype} of shape {image_hwc.shape}; a PNG takes uint8 (h, w, 1 or 3)"
        )
    file = io.BytesIO()
    Image.fromarray(image_hwc[..., 0] if image_hwc.shape[-1] == 1 else image_hwc).save(file, "PNG")
    return file.getvalue()


def sheet(images_bhwc: np.ndarray, columns: int, *, scale: int = 1, pad: int = 2) -> np.ndarray:
    """Arrange uint8 images row by row in one uint8 image (H, W, c); empty cells are white.

    Each pixel is repeated `scale` x `scale` times, which keeps tiny images sharp. Every image has a
    border of `pad` white pixels.
    """
    images_bhwc = np.repeat(np.repeat(images_bhwc, scale, axis=1), scale, axis=2)
    b, h, w, c = images_bhwc.shape
    rows = -(-b // columns)
    cells = np.full((rows * columns, h + pad, w + pad, c), 255, np.uint8)
    cells[:b, :h, :w] = images_bhwc
    grid = cells.reshape(rows, columns, h + pad, w + pad, c).swapaxes(1, 2)
    grid = grid.reshape(rows * (h + pad), columns * (w + pad), c)
    return np.pad(grid, ((pad, 0), (pad, 0), (0, 0)), constant_values=255)


def write_npz(
    path: epath.PathLike, count: int, arrays: Iterable[np.ndarray], **others: np.ndarray
) -> None:
    """Write `count` arrays of one shape and type as `arr_0` [count, ...] of an .npz file.

    Only one of them is in memory at a time. `others` are further arrays by name. The file is as
    that of np.savez. Raises `UserError` if it cannot be written.
    """
    with storage.writing(path), storage.large_file(path) as new, zipfile.ZipFile(new, "w") as file:
        arrays = iter(arrays)
        first = next(arrays)
        header = {
            "descr": np.lib.format.dtype_to_descr(first.dtype),
            "fortran_order": False,
            "shape": (count, *first.shape),
        }
        with file.open(_zip_entry("arr_0"), "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for array in itertools.chain([first], arrays):
                assert (array.shape, array.dtype) == (first.shape, first.dtype)
                entry.write(np.ascontiguousarray(array).tobytes())
        for name, array in others.items():
            with file.open(_zip_entry(name), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _zip_entry(name: str) -> zipfile.ZipInfo:
    """Return an entry with a fixed date, so that equal arrays give equal files."""
    return zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))


class ImageWriter:
    """Writes one PNG per index to `folder` (local or gs://): `000123.png`, longer past 999,999.

    Every file in it is complete, so a job that was killed only needs to write the `missing` ones.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, index: int, image_hwc: np.ndarray) -> None:
        """Write a uint8 image (c = 1 or 3) as the file of its index, replacing an older one."""
        storage.write_bytes(self.folder / _file_name(index), encode_png(image_hwc))

    def read(self, index: int) -> np.ndarray:
        """Return the uint8 image (h, w, c) that was written for the index.

        Raises `UserError` if its file is damaged.
        """
        path = self.folder / _file_name(index)
        try:
            image = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
        except (OSError, SyntaxError, ValueError) as error:  # those of Pillow for broken data
            raise UserError(
                f"{os.fspath(path)} is damaged; delete it, and give the same command again"
            ) from error
        return image[..., None] if image.ndim == 2 else image

    def remove(self, index: int) -> None:
        """Delete the file of an index, if it exists, so that it counts as missing."""
        (self.folder / _file_name(index)).unlink(missing_ok=True)

    def missing(self, n: int) -> list[int]:
        """Return the indices in range(n) without a file, in ascending order."""
        names = {path.name for path in self.folder.iterdir()}
        return [index for index in range(n) if _file_name(index) not in names]


def _file_name(index: int) -> str:
    return f"{index:06d}.png"
