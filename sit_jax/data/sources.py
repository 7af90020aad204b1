"""Data sources: data sets with a length, class names and random access, opened by name.

Record `i` is {"image": uint8 [h, w, c], "label": int32 scalar} and never changes; order, flips and batches belong to
`pipeline`. Sources are picklable, because reader processes get a copy.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from sit_jax.data import transforms
from sit_jax.errors import UserError, check, unknown_name
from sit_jax.storage import is_remote

Record = dict[str, np.ndarray]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """What `pipeline` asks of a data set; label `k` belongs to `class_names[k]`."""

    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record at 0 <= index < len; `UnreadableImage` if its bytes are no image."""


class UnreadableImage(UserError):
    """One image is missing or broken. Its own type, so that a pipeline may pass over it, and it alone."""


def open_source(name: str, *, path: str, image_size: int, channels: int, split: str) -> Source:
    """The source called `name` (`data.source`), its images [image_size, image_size, channels].

    Raises `UserError` for an unknown name, and for a path, size, channel count or split that the source cannot give.
    """
    if name not in SOURCES:
        raise unknown_name("data.source", name, SOURCES)
    return SOURCES[name](path=path, image_size=image_size, channels=channels, split=split)


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """Records held in memory: images uint8 [n, h, w, c], labels int32 [n]."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files, each cropped to [image_size, image_size, 3]; labels int32 [n]."""

    files: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: int

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


def _digits(*, path: str, image_size: int, channels: int, split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; needs no download.

    Even records are "train", odd ones "test": fixed, with 86 to 93 of each class in both.
    """
    from sklearn.datasets import (
        load_digits,
    )  # here, as it takes a second to import and serves this source alone

    check(
        not path,
        f"data.path={path!r}, but the digits come with scikit-learn; leave it empty, or set data.source",
    )
    check(image_size == 8, f"data.image_size={image_size}, but the digits are 8x8; set it to 8")
    check(channels == 1, f"data.channels={channels}, but the digits are grey; set it to 1")
    if split not in _DIGITS_SPLITS:
        raise unknown_name("data.split", split, _DIGITS_SPLITS)
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    rows = _DIGITS_SPLITS[split]
    return ArraySource(
        images[rows], digits.target.astype(np.int32)[rows], tuple(map(str, digits.target_names))
    )


def _folder(*, path: str, image_size: int, channels: int, split: str) -> FolderSource:
    """A folder with one sub-folder of JPEG, PNG or WebP images for each class, ordered as torchvision's ImageFolder.

    The folder is the split: there is "all" of it and nothing else.
    """
    check(
        path, "data.path is empty, but data.source='folder' needs a folder of class folders; set it"
    )
    check(
        not is_remote(path),
        f"data.path={path!r} is not on a local disk; copy it to one, or mount the bucket",
    )
    check(
        channels == 3,
        f"data.channels={channels}, but images of a folder are read as RGB; set it to 3",
    )
    check(
        image_size > 0,
        f"data.image_size={image_size}, but it must be positive; set it to the side in pixels",
    )
    check(
        split == "all",
        f"data.split={split!r}, but a folder is one split; set it to 'all', and data.path to that split's folder",
    )
    check(
        os.path.isdir(path),
        f"data.path={path!r} is no folder; give a folder with a sub-folder for each class",
    )
    class_names = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    check(
        class_names,
        f"data.path={path!r} has no sub-folders; put the images of each class into a sub-folder of it",
    )
    by_class = [list(_image_files(os.path.join(path, name))) for name in class_names]
    empty = [name for name, files in zip(class_names, by_class) if not files]
    check(
        not empty,
        f"data.path={path!r} has {len(empty)} class folders without images ({', '.join(IMAGE_EXTENSIONS)}), "
        f"the first is {empty[:1]}; fill or remove them",
    )
    labels = np.repeat(
        np.arange(len(class_names), dtype=np.int32), [len(files) for files in by_class]
    )
    return FolderSource(tuple(itertools.chain(*by_class)), labels, class_names, image_size)


def _image_files(class_folder: str) -> Iterator[str]:
    """Paths of the images at any depth below `class_folder`, in torchvision's order."""
    # torchvision sorts whole folder paths as strings, so "a-b" comes before "a/c": another walk, another data order.
    for folder, _, names in sorted(os.walk(class_folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_EXTENSIONS):
                yield os.path.join(folder, name)


SOURCES = {"digits": _digits, "folder": _folder}
