"""The data sources by name."""

from collections.abc import Callable
from typing import NamedTuple

from sit_jax.data.digits import open_digits
from sit_jax.data.folder import open_folder
from sit_jax.data.source import Shape, Source, image_spec
from sit_jax.data.transforms import Decoding
from sit_jax.record import RecordSpec


class SourceKind(NamedTuple):
    """How to open a source, and its record spec, which must be known without any data."""

    # (data.path, image shape, data.split, how files are decoded)
    open: Callable[[str | None, Shape, str, Decoding], Source]
    spec: Callable[[Shape], RecordSpec]  # of the image shape


SOURCES = {
    "digits": SourceKind(open_digits, image_spec),
    "folder": SourceKind(open_folder, image_spec),
}
