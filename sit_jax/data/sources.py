"""Data sources: data sets with a length, class names, a record spec and random access.

Record `i` never changes. `pipeline` handles order, mirroring and batches. Sources are
picklable, because each reader process gets a copy.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from sit_jax.data import transforms
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.record import ArraySpec, Record, RecordSpec
from sit_jax.storage import is_remote

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
Shape = tuple[int, int, int]


class Source(Protocol):
    """A data set as `pipeline` sees it. Label `k` belongs to `class_names[k]`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Return record 0 <= index < len. Raises `UnreadableImage` if it is broken."""

    def mirror(self, record: Record) -> Record:
        """Return the record of the same example mirrored left to right."""


class UnreadableImage(UserError):
    """One image is missing or broken. A separate type, so that a pipeline can skip only these."""


class ImageRecords:
    """Base of sources whose records are {"image": uint8 [h, w, c], "label": int32 scalar}."""

    def mirror(self, record: Record) -> Record:
        """Return the record with its image mirrored."""
        return {**record, "image": transforms.mirror(record["image"])}


def image_spec(image_shape: Shape) -> RecordSpec:
    """Return the spec of a record that holds an image and its label."""
    return {"image": ArraySpec(image_shape, np.uint8), "label": ArraySpec((), np.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(ImageRecords):
    """Records held in memory: images uint8 [n, h, w, c], labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""
        height, width, channels = self.images.shape[1:]
        return image_spec((height, width, channels))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(ImageRecords):
    """Image files, each cropped to [image_size, image_size, 3]; labels int32 [n]."""

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: int

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""
        return image_spec((self.image_size, self.image_size, 3))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path = self.files[index]
        try:
            with open(path, "rb") as file:
                image = transforms.center_crop(transforms.decode_rgb(file.read()), self.image_size)
        except Exception as error:  # Pillow's decoders raise a dozen types for broken data
            raise UnreadableImage(
                f"image {path!r} cannot be read ({type(error).__name__}: {error})"
            ) from error
        return {"image": image, "label": self.labels[index]}


_DIGITS_SPLITS = {"train": slice(0, None, 2), "test": slice(1, None, 2), "all": slice(None)}


def _open_digits(path: str | None, image_shape: Shape, split: str) -> ArraySource:
    """Open scikit-learn's 1,797 handwritten digits, 8x8 grey, which need no download.

    Even records are split "train", odd ones "test": fixed, with 86 to 93 of each class in both.
    """
    # Imported here because it takes a second and serves only this source.
    from sklearn.datasets import load_digits

    height, _, channels = image_shape
    check(
        not path,
        f"data.path={path!r}, but the digits come with scikit-learn; leave it empty, or set "
        "data.source",
    )
    check(height == 8, f"data.image_size={height}, but the digits are 8x8; set it to 8")
    check(channels == 1, f"data.channels={channels}, but the digits are grey; set it to 1")
    if split not in _DIGITS_SPLITS:
        raise unknown_name("data.split", split, _DIGITS_SPLITS)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    rows = _DIGITS_SPLITS[split]
    return ArraySource(images[rows], labels[rows], tuple(map(str, digits.target_names)))


def _open_folder(path: str | None, image_shape: Shape, split: str) -> FolderSource:
    """Open a folder with one sub-folder of JPEG, PNG or WebP images for each class.

    Classes and files are ordered as in torchvision's ImageFolder. The folder is one split, "all".
    """
    image_size, _, channels = image_shape
    check(
        channels == 3,
        f"data.channels={channels}, but the folder source reads RGB images; set it to 3. Stored "
        "latents cannot be read yet, as no command makes them: configs/imagenet.py encodes images "
        "in the training step instead",
    )
    if not path:
        raise UserError(
            "data.path is empty, but data.source='folder' needs a folder of class folders; set it"
        )
    check(
        not is_remote(path),
        f"data.path={path!r} is not on a local disk; copy it to one, or mount the bucket",
    )
    check(
        image_size > 0,
        f"data.image_size={image_size}, but it must be positive; set it to the side in pixels",
    )
    check(
        split == "all",
        f"data.split={split!r}, but a folder is one split; set it to 'all', and data.path to that "
        "split's folder",
    )
    check(
        os.path.isdir(path),
        f"data.path={path!r} is not a folder; give a folder with a sub-folder for each class",
    )
    class_names = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    check(
        class_names,
        f"data.path={path!r} has no sub-folders; put the images of each class into a sub-folder "
        "of it",
    )
    files_by_class = [list(_image_files(os.path.join(path, name))) for name in class_names]
    counts = [len(files) for files in files_by_class]
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    check(
        not empty,
        f"data.path={path!r} has {len(empty)} class folders without images "
        f"({', '.join(IMAGE_EXTENSIONS)}), the first is {empty[:1]}; fill or remove them",
    )
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    files = tuple(itertools.chain.from_iterable(files_by_class))
    return FolderSource(files, labels, class_names, image_size)


def _image_files(class_folder: str) -> Iterator[str]:
    """Yield the images at any depth below `class_folder`, in torchvision's order."""
    # torchvision sorts complete folder paths as strings, so "a-b" comes before "a/c". Any other
    # order would be another data order.
    for folder, _, names in sorted(os.walk(class_folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                yield os.path.join(folder, name)


class SourceKind(NamedTuple):
    """How to open a source, and its record spec, which must be known without any data."""

    open: Callable[[str | None, Shape, str], Source]  # (data.path, image shape, data.split)
    spec: Callable[[Shape], RecordSpec]  # of the image shape


SOURCES = {
    "digits": SourceKind(_open_digits, image_spec),
    "folder": SourceKind(_open_folder, image_spec),
}
