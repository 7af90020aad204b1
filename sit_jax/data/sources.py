"""The data sources by name."""

from collections.abc import Callable
from typing import NamedTuple

from sit_jax.data.digits import open_digits
from sit_jax.data.folder import open_folder
from sit_jax.data.latents import latent_spec, open_latents
from sit_jax.data.source import Shape, Source, SourceOptions, image_spec
from sit_jax.data.tfds import open_tfds
from sit_jax.record import RecordSpec


class SourceKind(NamedTuple):
    """How to open a source, and what must be known without any data."""

    open: Callable[[SourceOptions], Source]
    spec: Callable[[Shape], RecordSpec]  # of the shape of an image, or of a latent
    needs_path: bool = True
    reads_buckets: bool = True
    decodes: bool = True  # whether a record takes long enough to read for processes to pay


SOURCES = {
    "digits": SourceKind(open_digits, image_spec, needs_path=False, decodes=False),
    "folder": SourceKind(open_folder, image_spec, reads_buckets=False),
    "tfds": SourceKind(open_tfds, image_spec),
    "latents": SourceKind(open_latents, latent_spec, decodes=False),
}
