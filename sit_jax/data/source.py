"""Data sources: data sets with a length, labels, a record spec and random access.

Record `i` never changes. `pipeline` handles order, mirroring and batches. Sources are
picklable, because each reader process gets a copy.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sit_jax.data import transforms
from sit_jax.errors import UserError, check
from sit_jax.record import ArraySpec, Record, RecordSpec

Shape = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What to open: the settings of the data that a source may need."""

    path: str | None
    name: str | None  # of the data set, where the path may hold several
    split: str
    image_size: int
    channels: int
    decoding: transforms.Decoding

    @property
    def shape(self) -> Shape:
        """Height, width and channels of an image, or of a latent."""
        return self.image_size, self.image_size, self.channels


_LISTED_CLASSES = 5


class Source(Protocol):
    """A data set as `pipeline` sees it. Label `k` belongs to `class_names[k]`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""

    @property
    def labels(self) -> np.ndarray | None:
        """The label of each record, int32 [n]; None if only the records themselves tell."""

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""

    @property
    def passed_over(self) -> str:
        """The files beside the records that are not read, in a few words, or an empty text."""

    @property
    def can_mirror(self) -> bool:
        """Whether `read` can return mirrored records."""

    @property
    def details(self) -> dict[str, Any]:
        """What else a data card says of the source, as JSON values."""

    def __len__(self) -> int: ...

    def read(self, index: int, mirrored: bool = False) -> Record:
        """Return record 0 <= index < len, or that of its example mirrored left to right.

        Raises `UnreadableImage` if it is broken.
        """

    def digest(self, index: int) -> str:
        """Return 16 hex digits that change with the stored bytes of a record.

        Raises `UnreadableImage` if they cannot be read.
        """

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the list of records: their files and labels.

        It opens no files, and so stays the same when a broken one is repaired.
        """


class UnreadableImage(UserError):
    """One image is missing or broken. A separate type, so that a pipeline can skip only these."""


class ImageRecords:
    """Base of sources whose records are {"image": uint8 [h, w, c], "label": int32 scalar}."""

    passed_over = ""
    can_mirror = True

    @property
    def details(self) -> dict[str, Any]:
        """What else a data card says of the source: nothing."""
        return {}

    def example(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Return the image of a record, uint8 [h, w, c], and its label.

        Raises `UnreadableImage`.
        """
        raise NotImplementedError

    def read(self, index: int, mirrored: bool = False) -> Record:
        """Return record 0 <= index < len, or the same with its image mirrored."""
        image, label = self.example(index)
        return {"image": transforms.mirror(image) if mirrored else image, "label": label}


class EncodedImages(ImageRecords):
    """Base of sources of encoded images, each cropped to [image_size, image_size, 3]."""

    image_size: int
    decoding: transforms.Decoding

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""
        return image_spec((self.image_size, self.image_size, 3))

    @property
    def details(self) -> dict[str, Any]:
        """How files become records."""
        return transforms.describe(self.decoding, self.image_size)

    def encoded(self, index: int) -> tuple[bytes, np.int32]:
        """Return the encoded image of a record and its label. Raises `UnreadableImage`."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Return where a record is stored, in words."""
        raise NotImplementedError

    def unreadable(self, index: int, error: Exception) -> UnreadableImage:
        """Return the error for a record that cannot be read because of `error`."""
        reason = " ".join(str(error).split())
        return UnreadableImage(
            f"{self.place(index)} cannot be read ({type(error).__name__}: {reason})"
        )

    def example(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Return the image of a record, cropped, and its label. Raises `UnreadableImage`."""
        data, label = self.encoded(index)
        try:
            return transforms.decode_crop(data, self.image_size, self.decoding), label
        except Exception as error:  # Pillow's decoders raise a dozen types for broken data
            raise self.unreadable(index, error) from error

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image as it is stored. Raises `UnreadableImage`."""
        data, _ = self.encoded(index)
        try:
            return transforms.open_image(data, self.decoding).size
        except Exception as error:  # those of `example`
            raise self.unreadable(index, error) from error

    def digest(self, index: int) -> str:
        """Return 16 hex digits that change with the encoded image or the label of a record."""
        data, label = self.encoded(index)
        return short_digest(data + label.tobytes())


def check_rgb(options: SourceOptions, source: str) -> None:
    """Raise `UserError` unless data.channels suits a source that reads every image as RGB."""
    check(
        options.channels == 3,
        f"data.channels={options.channels}, but the {source} source reads RGB images; set it to 3, "
        "or data.source=latents to read stored latents",
    )


def image_spec(image_shape: Shape) -> RecordSpec:
    """Return the spec of a record that holds an image and its label."""
    return {"image": ArraySpec(image_shape, np.uint8), "label": ArraySpec((), np.int32)}


def short_digest(data: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()[:16]


def first_names(names: Sequence[str]) -> str:
    """Return the first names of a list in quotes, with dots if there are more."""
    listed = ", ".join(map(repr, names[:_LISTED_CLASSES]))
    return listed + (", ..." if len(names) > _LISTED_CLASSES else "")


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

    def example(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Return the image of a record, uint8 [h, w, c], and its label."""
        return self.images[index], self.labels[index]

    def digest(self, index: int) -> str:
        """Return 16 hex digits that change with the pixels or the label of a record."""
        return short_digest(self.images[index].tobytes() + self.labels[index].tobytes())

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the pixels or the label of any record."""
        return short_digest(self.images.tobytes() + self.labels.tobytes())
