"""Stored latents as a source: an autoencoder's posteriors, read from ArrayRecord shards."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from sit_jax import storage
from sit_jax.data import latent_cache
from sit_jax.data.latent_cache import DTYPES, Manifest, Shard
from sit_jax.data.shards import check_shards
from sit_jax.data.source import Shape, SourceOptions, UnreadableImage, short_digest
from sit_jax.errors import UserError, check
from sit_jax.record import ArraySpec, Record, RecordSpec


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A file and its records, as ArrayRecordDataSource takes them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """Records {"moments": [h, w, 2c], "scale", "shift": float32 [c], "label": int32 scalar}.

    The moments are the mean and the log variance of the posterior of an image, or of its mirror
    image, in the storage dtype. A log variance that was not stored is -inf.
    """

    folder: str
    manifest: Manifest
    labels: np.ndarray

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label."""
        return self.manifest.plan.class_names

    @property
    def spec(self) -> RecordSpec:
        """Shape and type of each array of a record."""
        moments = self.manifest.plan.moments
        return latent_spec(moments.shape, DTYPES[moments.dtype])

    @property
    def passed_over(self) -> str:
        """The images that could not be read when the latents were stored."""
        count = len(self.manifest.left_out)
        return f"{count:,} images that could not be read" if count else ""

    @property
    def can_mirror(self) -> bool:
        """Whether the latents of the mirror images are stored."""
        return self.manifest.plan.moments.mirrored

    @property
    def details(self) -> dict[str, Any]:
        """What the manifest says of the latents."""
        plan = self.manifest.plan
        return {
            "autoencoder": plan.autoencoder,
            "image_size": plan.image_size,
            "dtype": plan.moments.dtype,
            "of_mirror_images": plan.moments.mirrored,
            "with_variance": plan.moments.variance,
            "scale": list(plan.scale),
            "shift": list(plan.shift),
            "shards": len(self.manifest.shards),
            "made_from": plan.source,
            "left_out": list(self.manifest.left_out),
        }

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def _records(self) -> ArrayRecordDataSource:
        # Instructions, since it would open every file to count the records.
        return ArrayRecordDataSource(
            [
                _Instruction(_path(self.folder, shard), 0, shard.records, shard.records)
                for shard in self.manifest.shards
            ]
        )

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """The index of the first record of each shard."""
        counts = [shard.records for shard in self.manifest.shards]
        return np.cumsum([0, *counts[:-1]])

    @functools.cached_property
    def _normalisation(self) -> Record:
        plan = self.manifest.plan
        return {
            "scale": np.array(plan.scale, np.float32),
            "shift": np.array(plan.shift, np.float32),
        }

    def _shard(self, index: int) -> Shard:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.manifest.shards[number]

    def _bytes(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError as error:
            path = _path(self.folder, self._shard(index))
            raise UnreadableImage(
                f"latent {index} in {path} cannot be read ({storage.reason(error)})"
            ) from error

    def read(self, index: int, mirrored: bool = False) -> Record:
        """Return record 0 <= index < len, of the image or of its mirror image."""
        moments = self.manifest.plan.moments
        record = self._bytes(index)
        shard = self._shard(index)
        # Not `check`, which would format the message for every record.
        if len(record) != moments.record_bytes:
            raise UserError(
                f"{_path(self.folder, shard)} is another shard: it holds records of {len(record)} "
                f"bytes instead of {moments.record_bytes}; copy it again"
            )
        number, label, stored_vhwm = latent_cache.unpack(record, moments)
        if not shard.first <= number < shard.stop or label != self.labels[index]:
            raise UserError(
                f"{_path(self.folder, shard)} is another shard: it holds example {number} with "
                f"label {label}, where its manifest has examples {shard.first} to "
                f"{shard.stop - 1} and label {self.labels[index]}; copy it again"
            )
        moments_hwm = stored_vhwm[1 if mirrored else 0]
        if not moments.variance:
            none = np.full(moments.shape, -np.inf, moments_hwm.dtype)
            moments_hwm = np.concatenate([moments_hwm, none], axis=-1)
        return {"moments": moments_hwm, "label": self.labels[index], **self._normalisation}

    def digest(self, index: int) -> str:
        """Return 16 hex digits that change with the stored bytes of a record."""
        return short_digest(self._bytes(index))

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the bytes of a shard, or the labels."""
        parts = [self.manifest.labels_sha256, *(shard.sha256 for shard in self.manifest.shards)]
        return short_digest(" ".join(parts).encode())


def latent_spec(shape: Shape, dtype: type[np.generic] = np.float16) -> RecordSpec:
    """Return the spec of a record of latents of this height, width and number of channels."""
    height, width, channels = shape
    return {
        "moments": ArraySpec((height, width, 2 * channels), dtype),
        "scale": ArraySpec((channels,), np.float32),
        "shift": ArraySpec((channels,), np.float32),
        "label": ArraySpec((), np.int32),
    }


def open_latents(options: SourceOptions) -> LatentSource:
    """Open a folder of stored latents: one split, "all". All shards must exist and be complete."""
    if not options.path:
        raise UserError(
            "data.path is empty, but data.source='latents' needs a folder of stored latents, made "
            "by --mode encode or python -m convert.latents; set it"
        )
    storage.check_reachable("data.path", options.path)
    check(
        options.split == "all",
        f"data.split={options.split!r}, but stored latents are one split; set it to 'all', and "
        "data.path to that split's folder",
    )
    manifest = latent_cache.read_manifest(options.path)
    check_fit(manifest, options)
    latent_cache.check_files(options.path, manifest)
    labels = latent_cache.read_labels(options.path, manifest)
    check(
        labels.shape == (manifest.records,)
        and labels.min() >= 0
        and labels.max() < len(manifest.plan.class_names),
        f"{options.path!r} has labels that do not belong to its {manifest.records} records of "
        f"{len(manifest.plan.class_names)} classes; store the latents again",
    )
    check_shards((_path(options.path, shard), shard.records) for shard in manifest.shards)
    return LatentSource(options.path, manifest, labels)


def check_fit(manifest: Manifest, options: SourceOptions) -> None:
    """Raise `UserError` unless the latents are of the size and channels of the settings."""
    plan = manifest.plan
    height, width, channels = plan.moments.shape
    check(
        (height, width) == (options.image_size,) * 2,
        f"data.image_size={options.image_size}, but the latents in {options.path!r} are {height}x"
        f"{width}{_of_images(plan.image_size)}; set it to {height}, or give other latents",
    )
    check(
        channels == options.channels,
        f"data.channels={options.channels}, but the latents in {options.path!r} have {channels}; "
        f"set it to {channels}, or give other latents",
    )


def _of_images(image_size: int | None) -> str:
    return f" (of images of {image_size} pixels)" if image_size else ""


def _path(folder: str, shard: Shard) -> str:
    return os.path.join(folder, shard.name)
