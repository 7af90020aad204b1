"""Images to evaluate, of any project: a folder of image files, or the `arr_0` of an .npz file.

An image set is read in order, a batch at a time, as uint8 [b, h, w, c] with c = 1 or 3. Nothing is
cropped, scaled or skipped: what does not fit is refused, by name.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from sit_jax import storage
from sit_jax.data.folder import IMAGE_EXTENSIONS
from sit_jax.data.npz import LABELS, NpzFile
from sit_jax.data.source import short_digest
from sit_jax.errors import UserError, check

_THREADS = 8
_NPZ_CHUNK = 2**26  # bytes of an .npz file that are read at a time
# Pillow's modes of one and of three channels of 8 bits, with the number of channels.
_CHANNELS = {"L": 1, "RGB": 3}
_NUMBERED = re.compile(r"\d+")
_BATCH = 64  # files that are decoded at a time
_LISTED = 4  # missing numbers in a message


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one shape, in a fixed order."""

    place: str
    count: int
    shape: tuple[int, int, int]  # height, width, channels
    # ascending indices -> these images in order, uint8 [b, h, w, c]; each call reads them again
    read: Callable[[np.ndarray], Iterator[np.ndarray]]
    labels: np.ndarray | None = None  # integers [count], if they are known

    def batches(self) -> Iterator[np.ndarray]:
        """Yield all images."""
        return self.read(np.arange(self.count))


def open_images(path: str, *, are_samples: bool, first: int | None = None) -> ImageSet:
    """Open the images of a folder, or only the `first` of them, or those of an .npz file.

    Raises `UserError` for anything else, and for images that are damaged, have different sizes, or
    are not uint8; among numbered samples also for missing numbers and for other images, such as a
    sheet of samples.
    """
    check(
        not storage.is_remote(path),
        f"{path!r} is not on a local disk; copy it to one, or mount the bucket",
    )
    check(os.path.exists(path), f"{path!r} does not exist; give a folder of images or an .npz file")
    if os.path.isdir(path):
        if joined := _joined_samples(path):
            return _open_npz(joined)
        return _open_folder(path, are_samples, first)
    check(
        path.endswith(".npz"),
        f"{path!r} is a file, but not an .npz file; give a folder of images, or an .npz file with "
        "uint8 images [n, h, w, 3] as arr_0",
    )
    return _open_npz(path)


def hashes(images_bhwc: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each image, uint64 [b]: equal pixels have equal hashes.

    A colour image of grey pixels has the hash of the grey image.
    """
    digests = []
    for image in images_bhwc:
        pixels = image[..., :1] if (image == image[..., :1]).all() else image
        digests.append(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest())
    return np.frombuffer(b"".join(digests), np.uint64)


def with_channels(images_bhwc: np.ndarray, channels: int) -> np.ndarray | None:
    """Convert images to 1 or 3 channels. Return None if that would lose their colours."""
    if images_bhwc.shape[-1] == channels:
        return images_bhwc
    grey_bhwc = images_bhwc[..., :1]
    if not (images_bhwc == grey_bhwc).all():
        return None
    return np.broadcast_to(grey_bhwc, (*grey_bhwc.shape[:3], channels))


def digest(hashes_n: np.ndarray) -> str:
    """Return 16 hex digits for images in their order, wherever they are stored."""
    return short_digest(hashes_n.tobytes())


def _joined_samples(folder: str) -> str | None:
    """Return samples.npz of a folder of --mode sample without PNGs, or None for other folders."""
    if os.path.isdir(os.path.join(folder, "images")):
        return None
    paths = [os.path.join(folder, name) for name in ("settings.json", "samples.npz")]
    return paths[1] if all(map(os.path.isfile, paths)) else None


def _open_folder(path: str, are_samples: bool, first: int | None) -> ImageSet:
    """Open the image files of a folder, in the order of their numbers, or else of their names.

    A folder that holds only sub-folders with images is read with all of them.
    """
    images = os.path.join(path, "images")
    if os.path.exists(os.path.join(path, "settings.json")) and os.path.isdir(images):
        path = images  # a folder of --mode sample
    files = _image_files(path, are_samples)[:first]
    shape = _read_file(files[0]).shape

    def read_one(number: int) -> np.ndarray:
        file = files[number]
        image = _read_file(file)
        check(
            image.shape == shape,
            f"{file!r} is {_size(image.shape)}, but {files[0]!r} is {_size(shape)}; scale and crop "
            "all images alike. Those of a data set are cropped by its data source: give --config, "
            "such as configs/folder.py, instead of the folder",
        )
        return image

    def read(numbers: np.ndarray) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(numbers), _BATCH):
                yield np.stack(list(threads.map(read_one, numbers[start : start + _BATCH])))

    return ImageSet(path, len(files), shape, read)


def _image_files(path: str, are_samples: bool) -> list[str]:
    here = sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
    # A link to nothing counts as a file, so that it is named when it is read.
    files = [name for name in here if not os.path.isdir(os.path.join(path, name))]
    images = [name for name in files if _is_image(name)]
    below = [
        os.path.join(sub_folder, name)
        for sub_folder in here
        if os.path.isdir(os.path.join(path, sub_folder))
        for name in _images_below(os.path.join(path, sub_folder), (os.path.realpath(path),))
    ]
    check(
        images or below,
        f"{path!r} holds no images ({', '.join(IMAGE_EXTENSIONS)}); give the folder of samples",
    )
    check(
        not (images and below),
        f"{path!r} holds {len(images):,} images, and {len(below):,} more in sub-folders, such as "
        f"{(below or [''])[0]!r}; give one of the folders, or move them apart",
    )
    others = sorted(set(files) - set(images))
    if others:
        print(f"{path}: {len(others)} files are not images: {', '.join(others[:5])}", flush=True)
    ordered = images or below
    if images and are_samples:
        ordered = _in_order(path, images)
    return [os.path.join(path, name) for name in ordered]


def _images_below(folder: str, above: tuple[str, ...]) -> list[str]:
    """Return the images of a folder and its sub-folders, links to folders included, sorted.

    What is hidden is left out. `above` are the folders on the way here: a link to one of them
    would never end.
    """
    real = os.path.realpath(folder)
    check(real not in above, f"{folder!r} links to a folder that holds it; remove the link")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    is_folder = {name: os.path.isdir(os.path.join(folder, name)) for name in names}
    found = [name for name in names if not is_folder[name] and _is_image(name)]
    for name in names:
        if is_folder[name]:
            below = _images_below(os.path.join(folder, name), (*above, real))
            found += [os.path.join(name, image) for image in below]
    return found


def _in_order(path: str, names: Sequence[str]) -> list[str]:
    """Return the names in the order of their numbers, if most of them are numbers."""
    numbers = {
        name: int(stem) for name in names if _NUMBERED.fullmatch(stem := os.path.splitext(name)[0])
    }
    if len(numbers) <= len(names) / 2:
        return list(names)
    foreign = [name for name in names if name not in numbers]
    check(
        not foreign,
        f"{path!r} holds {', '.join(map(repr, foreign[:4]))} among {len(numbers):,} numbered "
        "images; move what is not a sample elsewhere",
    )
    ordered = sorted(names, key=lambda name: (numbers[name], name))
    expected = min(1, numbers[ordered[0]])
    missing: list[int] = []
    for before, name in zip(["", *ordered], ordered, strict=False):
        check(
            numbers[name] >= expected,
            f"{path!r} holds both {before!r} and {name!r}; remove one of them",
        )
        missing += range(expected, min(numbers[name], expected + _LISTED))
        expected = numbers[name] + 1
    check(
        not missing,
        f"{path!r} holds {len(names):,} images up to the number {expected - 1:,}, but "
        f"{', '.join(map(str, missing[:_LISTED]))}{', ...' if len(missing) > _LISTED else ''} "
        f"{'are' if len(missing) > 1 else 'is'} missing; add them, or rename the files",
    )
    return ordered


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _read_file(path: str) -> np.ndarray:
    """Return the uint8 image [h, w, c] of a file."""
    try:
        with Image.open(path) as image:
            image.load()
            converted = image.convert("RGB") if image.mode in ("P", "1", "CMYK") else image
            mode = converted.mode
            array = np.asarray(converted)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path!r} cannot be read as an image ({storage.reason(error)}); write it again, or "
            "move it elsewhere"
        ) from error
    check(
        mode in _CHANNELS,
        f"{path!r} has the mode {mode!r}; expected 8 bits of grey or RGB, without transparency: "
        "convert all images alike",
    )
    return array.reshape(*array.shape[:2], _CHANNELS[mode])


def _size(shape: Sequence[int]) -> str:
    height, width, channels = shape
    return f"{width} x {height} in {'grey' if channels == 1 else 'colour'}"


def _open_npz(path: str) -> ImageSet:
    file = NpzFile(path)
    check(
        "arr_0" in file.names,
        f"{path!r} holds {', '.join(file.names) or 'nothing'}, but no arr_0; expected uint8 images "
        "[n, h, w, 3] under that name, as np.savez(path, images) writes them",
    )
    shape, dtype = file.header("arr_0")
    _check_image_array(file, shape, dtype)
    count, height, width, channels = shape
    size = max(1, _NPZ_CHUNK // (height * width * channels))
    names = [name for name in LABELS if name in file.names]
    labels = file.array(names[0]) if names else None
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        labels = None  # something else, which another project stores there

    def read(numbers: np.ndarray) -> Iterator[np.ndarray]:
        start = 0
        for images in file.rows("arr_0", size):
            first, last = np.searchsorted(numbers, (start, start + len(images)))
            if first < last:
                yield images[numbers[first:last] - start]
            start += len(images)
            if last == len(numbers) and start < count:  # at the end, the checksum is compared
                return

    return ImageSet(path, count, (height, width, channels), read, labels)


def _check_image_array(file: NpzFile, shape: Sequence[int], dtype: np.dtype) -> None:
    """Raise `UserError` unless arr_0 holds uint8 images [n, h, w, 1 or 3].

    The error says which values other images hold, and which of them are not finite.
    """
    place = f"{file.path!r}: arr_0"
    remedy = ""
    if len(shape) == 4 and shape[1] in (1, 3):
        remedy = "; np.moveaxis(x, 1, -1) turns [n, 3, h, w] into it"
    check(
        len(shape) == 4 and min(shape) > 0 and shape[3] in (1, 3),
        f"{place} is {list(shape)}; expected images [n, h, w, 3]{remedy}",
    )
    if dtype == np.uint8:
        return
    check(dtype.kind in "iuf", f"{place} is {dtype}; expected uint8, from 0 to 255")
    low, high, bad = np.inf, -np.inf, []
    for number, row in enumerate(file.rows("arr_0", 1)):
        if not np.isfinite(row).all():
            bad.append(number)
            continue
        low, high = min(low, float(row.min())), max(high, float(row.max()))
    check(
        not bad,
        f"{place}: images {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''} hold NaN "
        "or infinite values; draw them again with more steps or less guidance",
    )
    raise UserError(
        f"{place} is {dtype}, from {low:g} to {high:g}; expected uint8, from 0 to 255: values in "
        "[-1, 1] become that by (127.5 * x + 128).clip(0, 255).astype(np.uint8)"
    )
