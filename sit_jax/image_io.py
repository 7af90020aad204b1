"""Images as output: model range to uint8, PNG files, and sheets of many images.

Shapes: b images, h height, w width, c channels (1 or 3). All arrays are NumPy arrays, on the host.
"""

import io
import itertools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath
from PIL import Image

from sit_jax import storage
from sit_jax.errors import UserError

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NUMBERED = re.compile(r"\d{6,}\.png")
_THREADS = 16  # that read and write files


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


def is_intact_png(data: bytes, shape: tuple[int, int, int] | None = None) -> bool:
    """Return True if the bytes are a complete PNG whose checksums hold, as `encode_png` writes.

    `shape` (h, w, c) is that of the image, if it is known. Nothing is decoded.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return False
    start = len(_PNG_SIGNATURE)
    header = b""
    while start + 12 <= len(data):  # a chunk: length, kind, content, checksum of kind and content
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if len(data) < end + 4:
            return False
        if struct.unpack_from(">I", data, end) != (zlib.crc32(data[start + 4 : end]),):
            return False
        if kind == b"IHDR":
            header = data[start + 8 : end]
        if kind == b"IEND":
            return len(header) == 13 and (shape is None or _is_header_of(header, shape))
        start = end + 4
    return False


def _is_header_of(header: bytes, shape: tuple[int, int, int]) -> bool:
    width, height, bits, colour = struct.unpack_from(">IIBB", header)
    channels = {0: 1, 2: 3}.get(colour)  # grey or RGB
    return (height, width, channels, bits) == (*shape, 8)


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
    path: epath.PathLike, count: int, arrays: Iterable[np.ndarray], /, **others: np.ndarray
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

    A job that was killed needs to write only the `missing` ones.
    """

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, index: int, image_hwc: np.ndarray) -> None:
        """Write a uint8 image (c = 1 or 3) as the file of its index, replacing an older one."""
        storage.write_bytes(self.folder / _file_name(index), encode_png(image_hwc))

    def write_all(self, images: Iterable[tuple[int, np.ndarray]]) -> None:
        """Write images, given with their indices, several at a time."""
        for batch in _batched(images):
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda entry: self.write(*entry), batch))

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

    def read_all(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield the image of each index in this order, as `read`, several read at a time."""
        with ThreadPoolExecutor(_THREADS) as threads:
            for batch in _batched(indices):
                yield from threads.map(self.read, batch)

    def remove(self, index: int) -> None:
        """Delete the file of an index, if it exists, so that it counts as missing."""
        (self.folder / _file_name(index)).unlink(missing_ok=True)

    def missing(self, n: int) -> list[int]:
        """Return the indices in range(n) without an intact file, in ascending order."""
        absent, damaged = self.survey(n)
        return sorted([*absent, *damaged])

    def survey(
        self, n: int, shape: tuple[int, int, int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the indices in range(n) without a file, and those whose file is damaged.

        So is a file that is not an image of this shape (h, w, c), if one is given. The contents of
        all files are checked.
        """
        names = set(self.names())
        absent = [index for index in range(n) if _file_name(index) not in names]
        present = [index for index in range(n) if _file_name(index) in names]

        def is_intact(index: int) -> bool:
            try:
                return is_intact_png((self.folder / _file_name(index)).read_bytes(), shape)
            except OSError:
                return False

        with ThreadPoolExecutor(_THREADS) as threads:
            intact = list(threads.map(is_intact, present))
        return absent, [index for index, good in zip(present, intact, strict=True) if not good]

    def names(self) -> list[str]:
        """Return the names of the files of all indices, in no order."""
        return numbered_images(self.folder)


def numbered_images(folder: epath.Path) -> list[str]:
    """Return the names in a folder that an `ImageWriter` gives its files."""
    return [path.name for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)]


def _batched(items: Iterable) -> Iterator[Sequence]:
    """Yield the items a few at a time, so that they are not all in memory."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, 4 * _THREADS)):
        yield batch


def _file_name(index: int) -> str:
    return f"{index:06d}.png"
