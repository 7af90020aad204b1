"""The files of stored latents: shards of records, their labels, and the manifest.

A folder holds

    manifest.json                        what the records are and where they come from; written last
    labels.npy                           the label of each record, int32
    latents-00000-of-00313.array_record  records, each of which can be read by its number
    plan.json, *.array_record.json       only until the manifest is written: what is done so far

A record is the number of its example in the source, its label, and the mean and log variance of the
autoencoder's posterior for the image, then for its mirror image. Shape suffixes: v views (the
image, its mirror image), h height, w width, m moments (mean and log variance of each channel).
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python import array_record_module
from etils import epath

from sit_jax import storage
from sit_jax.errors import UserError, check

MANIFEST = "manifest.json"
LABELS = "labels.npy"
PLAN = "plan.json"
_SHARD_SUFFIX = ".array_record"
_FORMAT = "sit_jax latents 1"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# Without groups a record is read by itself: 17,900 a second, against 464 with the default groups.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_HEADER = struct.Struct("<qi")  # number in the source, label
_LARGEST_JSON = 2**28  # bytes
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
_SHARD_OVERHEAD = 2**17  # bytes of a shard beside its records, and 41 of each record
_RECORD_OVERHEAD = 64


@dataclasses.dataclass(frozen=True)
class Moments:
    """What is stored of each example."""

    shape: tuple[int, int, int]  # height, width and channels of a latent
    dtype: str
    mirrored: bool  # with those of the mirror image
    variance: bool  # with the log variance; otherwise only the mean

    @functools.cached_property
    def shape_vhwm(self) -> tuple[int, int, int, int]:
        """The shape of a record's moments."""
        height, width, channels = self.shape
        return 1 + self.mirrored, height, width, channels * (1 + self.variance)

    @functools.cached_property
    def record_bytes(self) -> int:
        """The size of a record."""
        return _HEADER.size + math.prod(self.shape_vhwm) * np.dtype(DTYPES[self.dtype]).itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records: examples first, ..., stop - 1 of the source, without those left out."""

    name: str
    first: int
    stop: int
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder of latents is to hold."""

    moments: Moments
    # The network's input is scale * (z - shift), for each channel of the latent z.
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    autoencoder: dict[str, Any]  # its "name", and what else is known of it
    image_size: int | None  # side of the images in pixels, if known
    class_names: tuple[str, ...]
    examples: int  # of the source
    shard_records: int
    source: dict[str, Any]  # the settings that decide which image an example is

    @property
    def shards(self) -> list[tuple[str, range]]:
        """The name of each shard and the numbers of its examples."""
        count = -(-self.examples // self.shard_records)
        return [
            (
                f"latents-{number:05d}-of-{count:05d}{_SHARD_SUFFIX}",
                range(first, min(first + self.shard_records, self.examples)),
            )
            for number, first in enumerate(range(0, self.examples, self.shard_records))
        ]

    @property
    def total_bytes(self) -> int:
        """The size of all files, slightly overestimated."""
        a_record = self.moments.record_bytes + _RECORD_OVERHEAD
        return self.examples * a_record + len(self.shards) * _SHARD_OVERHEAD


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a complete folder of latents holds."""

    plan: Plan
    left_out: tuple[int, ...]  # the source's examples that could not be read
    labels_sha256: str
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """The number of records."""
        return sum(shard.records for shard in self.shards)


def read_manifest(folder: epath.PathLike) -> Manifest:
    """Return the manifest of a folder. Raises `UserError` if it is missing or damaged."""
    folder = epath.Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        check(
            not (folder / PLAN).exists(),
            f"{str(folder)!r} is not complete: the command that stores these latents was stopped; "
            "give the same command again, which continues it",
        )
        raise UserError(
            f"{str(folder)!r} holds no stored latents ({MANIFEST} is missing); make them with "
            "--mode encode or python -m convert.latents"
        )
    try:
        content = _read_json(path)
        check(
            content["format"] == _FORMAT,
            f"{path} has the format {content['format']!r}; this version reads {_FORMAT!r}",
        )
        manifest = Manifest(
            plan=_plan_from_json(content),
            left_out=tuple(map(int, content["left_out"])),
            labels_sha256=str(content["labels_sha256"]),
            shards=tuple(Shard(**shard) for shard in content["shards"]),
        )
        _check_consistent(manifest)
    except UserError:
        raise
    except _UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {storage.reason(error)}); get an "
            "undamaged copy, or store the latents again"
        ) from error
    return manifest


def _check_consistent(manifest: Manifest) -> None:
    """Raise ValueError unless the numbers of a manifest agree with each other."""
    plan = manifest.plan
    channels = plan.moments.shape[2]
    spans = [(shard.name, range(shard.first, shard.stop)) for shard in manifest.shards]
    if spans != plan.shards:
        raise ValueError(f"the shards are not those of {plan.examples} examples")
    if manifest.records + len(manifest.left_out) != plan.examples:
        raise ValueError(f"{manifest.records} records are not the {plan.examples} examples")
    if not len(plan.scale) == len(plan.shift) == channels:
        raise ValueError(f"scale and shift are not {channels} numbers each")
    if not np.isfinite([*plan.scale, *plan.shift]).all() or min(plan.scale) <= 0:
        raise ValueError("scale and shift are not finite, or a scale is not positive")


def holds_latents(folder: epath.PathLike) -> bool:
    """Return True if a folder holds stored latents, complete or not."""
    return any((epath.Path(folder) / name).exists() for name in (MANIFEST, PLAN))


def read_labels(folder: epath.PathLike, manifest: Manifest) -> np.ndarray:
    """Return the label of each record, int32 [n]. Raises `UserError` if the file is damaged."""
    path = epath.Path(folder) / LABELS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({storage.reason(error)}); get an undamaged copy"
        ) from error
    check(
        hashlib.sha256(data).hexdigest() == manifest.labels_sha256,
        f"{path} has changed since the latents were stored; get an undamaged copy",
    )
    return np.load(io.BytesIO(data), allow_pickle=False)


def check_files(folder: epath.PathLike, manifest: Manifest) -> None:
    """Raise `UserError` that names the first shard that is missing or has another size."""
    for shard in manifest.shards:
        path = epath.Path(folder) / shard.name
        check(
            path.exists(),
            f"{path} is missing: {len(manifest.shards)} shards belong to {MANIFEST}; copy all of "
            "them",
        )
        size = path.stat().length
        check(
            size == shard.bytes,
            f"{path} has {size:,} bytes instead of {shard.bytes:,}; copy it again",
        )


def pack(number: int, label: int, moments_vhwm: np.ndarray, moments: Moments) -> bytes:
    """Return a record. Raises `UserError` if a moment is not finite in the storage dtype."""
    with np.errstate(over="ignore"):  # checked below
        stored = moments_vhwm.astype(DTYPES[moments.dtype])
    assert stored.shape == moments.shape_vhwm, (stored.shape, moments.shape_vhwm)
    check(
        np.isfinite(stored.astype(np.float32)).all(),
        f"the moments of example {number} are not finite in {moments.dtype} (the largest is "
        f"{np.abs(moments_vhwm).max():g}); store them in another dtype, or check the autoencoder",
    )
    return _HEADER.pack(number, label) + stored.tobytes()


def unpack(record: bytes, moments: Moments) -> tuple[int, int, np.ndarray]:
    """Return (number in the source, label, moments [v, h, w, m]) of a record, without a copy."""
    number, label = _HEADER.unpack_from(record)
    stored = np.frombuffer(record, DTYPES[moments.dtype], offset=_HEADER.size)
    return number, label, stored.reshape(moments.shape_vhwm)


@dataclasses.dataclass(frozen=True)
class Example:
    """What is stored of one example of the source."""

    number: int
    label: int
    moments_vhwm: np.ndarray


class CacheWriter:
    """Fills a folder with the latents of a plan, shard by shard, and continues after a kill.

    A shard is complete once the JSON file beside it exists. Several processes may each write
    shards of their own.
    """

    def __init__(self, folder: epath.PathLike, plan: Plan):
        self.folder = epath.Path(folder)
        self.plan = plan

    def begin(self) -> None:
        """Write the plan, unless the folder is already complete. Only one process calls this.

        Raises `UserError` if the folder belongs to another plan, or the disk is too small.
        """
        self._check_same_plan()
        if self.is_complete():
            return
        left = sum(len(numbers) for _, numbers in self.missing())
        needed = left * (self.plan.moments.record_bytes + _RECORD_OVERHEAD)
        if not storage.is_remote(self.folder):
            free = shutil.disk_usage(self.folder).free
            check(
                needed < free,
                f"{needed / 1e9:,.1f} GB are needed in {str(self.folder)!r}, which has "
                f"{free / 1e9:,.1f} GB free; make room, or give a folder on another disk",
            )
        storage.write_text(self.folder / PLAN, json.dumps(_plan_to_json(self.plan), indent=1))

    def _check_same_plan(self) -> None:
        for name in (MANIFEST, PLAN):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                before = _plan_to_json(_plan_from_json(_read_json(path)))
            except _UNREADABLE as error:
                raise UserError(
                    f"{path} cannot be read ({storage.reason(error)}); delete the folder, or give "
                    "another one"
                ) from error
            changed = _changes(_plan_to_json(self.plan), before)
            check(
                not changed,
                f"{str(self.folder)!r} holds other latents: {'; '.join(changed)[:400]}; give "
                "another folder",
            )

    def withdraw(self) -> None:
        """Remove the plan if there are no shards yet, so that the folder may get another one."""
        if not any(path.name.endswith(_SHARD_SUFFIX) for path in self.folder.iterdir()):
            (self.folder / PLAN).unlink(missing_ok=True)

    def is_complete(self) -> bool:
        """Return True if the manifest has been written."""
        return (self.folder / MANIFEST).exists()

    def missing(self) -> list[tuple[str, range]]:
        """Return the shards that are still to be written: names and numbers of their examples."""
        if self.is_complete():
            return []
        names = {path.name for path in self.folder.iterdir()}
        return [
            (name, numbers)
            for name, numbers in self.plan.shards
            if not {name, f"{name}.json"} <= names
        ]

    def write_shard(self, name: str, numbers: range, examples: Iterable[Example]) -> None:
        """Write the shard of these numbers. Numbers that `examples` lacks count as left out."""
        path = self.folder / name
        labels = []
        written = []
        with storage.writing(path), storage.large_file(path) as new:
            writer = array_record_module.ArrayRecordWriter(str(new), _WRITER_OPTIONS)
            try:
                for example in examples:
                    label = int(example.label)
                    data = pack(example.number, label, example.moments_vhwm, self.plan.moments)
                    writer.write(data)
                    written.append(example.number)
                    labels.append(label)
                # On a full disk `close` raises RuntimeError.
                writer.close()
            except RuntimeError as error:
                raise OSError(storage.reason(error)) from error
            size = new.stat().length
            sha256 = storage.sha256(new)
        assert set(written) <= set(numbers), "examples of another shard"
        shard = Shard(name, numbers.start, numbers.stop, len(written), size, sha256)
        left_out = sorted(set(numbers) - set(written))
        note = {"shard": dataclasses.asdict(shard), "labels": labels, "left_out": left_out}
        storage.write_text(self.folder / f"{name}.json", json.dumps(note))

    def finish(self) -> Manifest:
        """Write labels and manifest once all shards are complete. Only one process calls this."""
        notes = [self.folder / f"{name}.json" for name, _ in self.plan.shards]
        if not self.is_complete():
            self._write_manifest(notes)
        for path in (*notes, self.folder / PLAN):
            path.unlink(missing_ok=True)
        return read_manifest(self.folder)

    def _write_manifest(self, notes: Sequence[epath.Path]) -> None:
        contents = [_read_json(note) for note in notes]
        labels = np.array([label for content in contents for label in content["labels"]], np.int32)
        file = io.BytesIO()
        np.save(file, labels)
        storage.write_bytes(self.folder / LABELS, file.getvalue())
        manifest = Manifest(
            plan=self.plan,
            left_out=tuple(number for content in contents for number in content["left_out"]),
            labels_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
            shards=tuple(Shard(**content["shard"]) for content in contents),
        )
        check(
            manifest.records,
            "none of the examples could be read, so there is nothing to store; check the data set",
        )
        storage.write_text(self.folder / MANIFEST, json.dumps(_to_json(manifest), indent=1))


def _changes(now: Mapping[str, Any], before: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two plans in words, setting by setting."""
    changed = []
    for key in dict.fromkeys([*now, *before]):
        new, old = now.get(key), before.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            changed += _changes(new, old, f"{prefix}{key}.")
        elif new != old:
            changed.append(f"{prefix}{key} is {new!r} and was {old!r}")
    return changed


def check_sha256(path: epath.Path, expected: str) -> None:
    """Raise `UserError` unless a file has this SHA-256."""
    check(
        storage.sha256(path) == expected,
        f"{path} has changed since the latents were stored; copy it again",
    )


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return _plan_to_json(manifest.plan) | {
        "format": _FORMAT,
        "records": manifest.records,
        "left_out": manifest.left_out,
        "labels_sha256": manifest.labels_sha256,
        "shards": [dataclasses.asdict(shard) for shard in manifest.shards],
    }


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    # Through JSON, so that tuples become lists, as in the plan that is read again.
    return json.loads(json.dumps(dataclasses.asdict(plan)))


def _plan_from_json(content: Mapping[str, Any]) -> Plan:
    moments = content["moments"]
    height, width, channels = map(int, moments["shape"])
    if moments["dtype"] not in DTYPES or min(height, width, channels) < 1:
        raise ValueError(f"moments of {moments!r}")
    return Plan(
        moments=Moments(
            (height, width, channels),
            moments["dtype"],
            bool(moments["mirrored"]),
            bool(moments["variance"]),
        ),
        scale=tuple(map(float, content["scale"])),
        shift=tuple(map(float, content["shift"])),
        autoencoder=dict(content["autoencoder"]),
        image_size=content["image_size"],
        class_names=tuple(map(str, content["class_names"])),
        examples=int(content["examples"]),
        shard_records=int(content["shard_records"]),
        source=dict(content["source"]),
    )


def _read_json(path: epath.Path) -> dict[str, Any]:
    size = path.stat().length
    if size > _LARGEST_JSON:
        raise ValueError(f"it has {size:,} bytes")
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no settings")
    return content
