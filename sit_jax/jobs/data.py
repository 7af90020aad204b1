"""Opens the data source of a config, draws a part of it, and reads batches for the devices."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from sit_jax import hosts, sharding
from sit_jax.data import pipeline, readers, sources, subset
from sit_jax.data.latent_cache import Manifest
from sit_jax.data.latents import LatentSource
from sit_jax.data.source import Source, UnreadableImage, first_names, short_digest
from sit_jax.errors import UserError, check
from sit_jax.jobs.results import progress_bar
from sit_jax.jobs.setup import Setup
from sit_jax.record import Record
from sit_jax.settings import Data, Latents

_DIGEST_THREADS = 8
_DIGEST_CHUNK = 1024  # files that wait for these threads at a time
_MOST_READERS_OF_A_CORE = 32


def open_source(setup: Setup) -> Source:
    """Open the data source and print a line on what it holds.

    Raises `UserError` if it is missing or data.classes is wrong.
    """
    data = setup.config.data
    source = sources.SOURCES[data.source].open(data.options)
    classes = check_classes(data, source.class_names)
    _check_labels(source)
    if isinstance(source, LatentSource):
        check_autoencoder(setup.config.latents, source.manifest, source.folder)
    beside = f"; passed over: {source.passed_over}" if source.passed_over else ""
    kind = "latents" if isinstance(source, LatentSource) else "images"
    print(f"data: {len(source):,} {kind} in {classes} of {_place(data)}{beside}", flush=True)
    return source


def check_classes(data: Data, names: Sequence[str]) -> str:
    """Return the classes of a source in words. Raises `UserError` unless they are data.classes."""
    classes = f"{len(names)} class{'es' * (len(names) != 1)} ({first_names(names)})"
    check(
        len(names) == data.classes,
        f"data.classes is {data.classes}, but the {data.source} source has {classes}; set "
        f"data.classes={len(names)}",
    )
    return classes


def check_autoencoder(latents: Latents, manifest: Manifest, folder: str) -> None:
    """Raise `UserError` unless stored latents are those of the codec, in its scale."""
    plan = manifest.plan
    name = plan.autoencoder.get("name")
    if latents.codec == "stored":
        return
    check(
        name == latents.codec,
        f"the latents in {folder!r} are of the autoencoder {name!r}, but latents.codec is "
        f"{latents.codec!r}; set latents.codec=stored, or give other latents",
    )
    check(
        set(plan.scale) == {latents.scale} and not any(plan.shift),
        f"the latents in {folder!r} have the scale {_short(plan.scale)} and the shift "
        f"{_short(plan.shift)}, but latents.scale is {latents.scale:g}; set it to that scale, or "
        "latents.codec=stored",
    )


def _short(numbers: Sequence[float]) -> str:
    """Return the numbers as text, or only one if they are all equal."""
    return ", ".join(f"{number:g}" for number in dict.fromkeys(numbers))


def check_encoder(setup: Setup, source: Source) -> None:
    """Raise `UserError` if stored latents were encoded with other weights than the codec's.

    It reads the codec's weights. Latents of another project do not say which weights made them.
    """
    if isinstance(source, LatentSource):
        stored = source.manifest.plan.autoencoder.get("encoder")
        _check_same_encoder(setup, stored, f"the latents in {source.folder!r}")


def check_trained_encoder(setup: Setup, note: Mapping[str, Any]) -> None:
    """Raise `UserError` if a run's stored latents were encoded with other weights than the codec's.

    `note` is the checkpoint's. A decoder that was trained further for the same encoder is allowed.
    """
    latents = note.get("data", {}).get("latents") or {}
    _check_same_encoder(setup, latents.get("encoder"), "the latents that the run was trained on")


def _check_same_encoder(setup: Setup, stored: str | None, what: str) -> None:
    if stored is None or not setup.codec.has_decoder:
        return
    check(
        stored == setup.encoder_digest,
        f"{what} were encoded with other weights than those of the VAE that latents.path and "
        "latents.repo give; give the VAE that made them, or encode again",
    )


def _check_labels(source: Source) -> None:
    """Raise `UserError` unless every label is that of a class, and every class has its own name."""
    names = source.class_names
    label_of: dict[str, int] = {}
    for label, name in enumerate(names):
        first = label_of.setdefault(name, label)
        check(
            first == label,
            f"two classes are called {name!r}, labels {first} and {label}; rename one in the data "
            "set, or merge them",
        )
    labels = source.labels
    if labels is None:  # the source checks each label as it reads it
        return
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise UserError(
            f"record {outside[0]} has the label {labels[outside[0]]}, one of {len(outside):,} "
            f"outside of the classes among {len(labels):,}; expected 0 to {len(names) - 1}. Test "
            "splits often have no labels: choose another data.split, or repair the labels"
        )


def _place(data: Data) -> str:
    """Return the split, and where the data set is, in words."""
    split = f"split {data.split!r}"
    if not data.path:
        return split
    place = f"{data.name!r} in {data.path!r}" if data.name else f"{data.path!r}"
    return place if data.split == "all" else f"{split} of {place}"


def describe(source: Source) -> dict[str, Any]:
    """Return what a checkpoint records of the data: class names, number of images, latents."""
    description: dict[str, Any] = {
        "class_names": list(source.class_names),
        "images": len(source),
    }
    if isinstance(source, LatentSource):
        plan = source.manifest.plan
        description["latents"] = {
            "scale": list(plan.scale),
            "shift": list(plan.shift),
            "encoder": plan.autoencoder.get("encoder"),  # None: another project's, not known
        }
    return description


def check_same_latents(note: Mapping[str, Any], source: Source) -> None:
    """Raise `UserError` if stored latents are of another autoencoder than those trained on.

    Their scale or shift differs, or the weights that encoded them, where both are known.
    """
    trained = note.get("data", {}).get("latents")
    now = describe(source).get("latents")
    encoders = {latents.get("encoder") for latents in (trained, now) if latents} - {None}
    check(
        len(encoders) < 2,
        "these latents were encoded with other weights than those that the run was trained on; "
        "give the latents that it was trained on, or start a new run",
    )
    scales = [latents and (latents["scale"], latents["shift"]) for latents in (trained, now)]
    check(
        trained is None or scales[0] == scales[1],
        f"these latents are scaled by {_short(now['scale']) if now else 'nothing'}, and those that "
        f"the run was trained on by {_short(trained['scale']) if trained else 'nothing'} (or their "
        "shifts differ); give the latents that it was trained on, or start a new run",
    )


def changed_label(note: Mapping[str, Any], source: Source) -> str | None:
    """Return the first label that means another class than at a checkpoint, in words, or None.

    `note` is the checkpoint's. Earlier versions recorded no data.
    """
    trained = note.get("data", {}).get("class_names")
    if trained is None:
        return None
    for label, (before, now) in enumerate(itertools.zip_longest(trained, source.class_names)):
        if before != now:
            return f"label {label} was {before!r} and is now {now!r}"
    return None


def check_same_classes(note: Mapping[str, Any], source: Source) -> None:
    """Raise `UserError` if the labels of the data mean other classes than those trained on."""
    other = changed_label(note, source)
    check(
        other is None,
        f"these are other classes than the run was trained on: {other}; give the data set it was "
        "trained on (data.path), or start a new run",
    )


def draw(setup: Setup, source: Source, count: int | None) -> list[int]:
    """Return the indices of `count` images, a random draw; of all images, in order, if None.

    It is stratified by class, but uniform if the source does not know the labels before it reads
    the records. A larger count keeps the images of a smaller one.
    """
    if count is None:
        return list(range(len(source)))
    seed = setup.config.data.subset_seed
    if source.labels is None:
        order = subset.uniform_order(len(source), seed)
    else:
        order = subset.draw_order(source.labels, seed)
    return order[:count].tolist()


def kind_of_draw(source: Source) -> str:
    """Return how `draw` draws from a source, in words."""
    return "a uniform draw" if source.labels is None else "a stratified draw"


def record_settings(data: Data, source: Source) -> dict[str, Any]:
    """Return the settings of the data that decide which image a record holds, and how to draw."""
    settings = dataclasses.asdict(data)
    for key in ("workers", "read_ahead", "flip", "skip_unreadable", "max_pixels"):
        del settings[key]
    if data.name is None:  # as in results of earlier versions, which had no such setting
        del settings["name"]
    # Results are named by their settings, so those of a stratified draw keep the earlier names.
    return settings if source.labels is not None else settings | {"stratified": False}


def digests(source: Source, indices: Sequence[int], *, skip_unreadable: bool) -> list[str | None]:
    """Return the digest of each of these records, which changes with what is stored.

    It is None for an image that cannot be read, or without `skip_unreadable` raises `UserError`.
    """

    def digest(index: int) -> str | None:
        try:
            return source.digest(index)
        except UnreadableImage as error:
            if skip_unreadable:
                return None
            raise pipeline.with_remedy(error) from error

    def all_digests() -> list[str | None]:
        found: list[str | None] = []
        with (
            concurrent.futures.ThreadPoolExecutor(_DIGEST_THREADS) as threads,
            progress_bar(len(indices), "image", desc="checksums", leave=False, delay=1) as bar,
        ):
            for start in range(0, len(indices), _DIGEST_CHUNK):
                chunk = indices[start : start + _DIGEST_CHUNK]
                found += threads.map(digest, chunk)
                bar.update(len(chunk))
        return found

    return hosts.broadcast_from_first(all_digests)


def check_images(setup: Setup) -> None:
    """Raise `UserError` unless the records of the data source hold images."""
    check(
        "image" in setup.record_spec,
        f"data.source is {setup.config.data.source!r}, which holds no images to compare with; this "
        "mode works on runs that were trained on images",
    )


class RealImages(NamedTuple):
    """Images of the data set to compare samples with."""

    images: np.ndarray  # uint8 [n, h, w, c]
    labels: np.ndarray  # int32 [n]
    drawn: int  # n, and those that cannot be read
    settings: dict[str, Any]  # that they depend on


def read_real_images(setup: Setup, source: Source, count: int) -> RealImages:
    """Return those of `count` images, drawn from the source by `draw`, that can be read.

    They are in the order of the source. Raises `UserError` if none can be read, or if the source
    holds no images.
    """
    check_images(setup)
    indices = sorted(draw(setup, source, count))
    stored = digests(source, indices, skip_unreadable=True)
    batches = []
    with progress_bar(len(indices), "image", desc="real images", leave=False) as bar:
        for batch in read_in_order(setup, source, indices, 256, skip_unreadable=True):
            batches.append(batch)
            bar.update(len(batch["index"]))
    images, labels, skipped = (
        np.concatenate([batch[name] for batch in batches]) for name in ("image", "label", "skipped")
    )
    readable = skipped == 0
    check(readable.any(), f"none of the {len(indices)} images can be read; check data.path")
    settings = {
        "data": record_settings(setup.config.data, source),
        "real_images": {
            "drawn": len(indices),
            "of": len(source),
            "read": int(readable.sum()),
            "sha256": short_digest(" ".join(digest or "none" for digest in stored).encode()),
        },
    }
    return RealImages(images[readable], labels[readable], len(indices), settings)


@contextlib.contextmanager
def open_batches(
    setup: Setup, source: Source, start: int
) -> Iterator[Iterator[dict[str, jax.Array]]]:
    """Yield training batches start, start + 1, ... on the devices, fetched ahead.

    Leaving the context ends the readers.
    """
    data = setup.config.data
    size = setup.config.train.batch
    rows = sharding.own_rows(setup.mesh, size)
    dataset = pipeline.batches(
        source,
        seed=setup.config.seed,
        batch_size=size,
        flip=data.flip,
        skip_unreadable=data.skip_unreadable,
        rows=rows,
    )
    workers, lack = choose_workers(setup, len(rows))
    readers_text = f"{workers} reader process{'es' * (workers > 1)}" if workers else "threads"
    print(f"data: read by {readers_text}{f' ({lack})' if lack else ''}", flush=True)
    with contextlib.closing(_read_ahead(setup, dataset, start, len(rows), workers)) as batches:
        yield pipeline.prefetch_to_device(
            batches, lambda batch: sharding.put_batch(setup.mesh, batch, size)
        )


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, types and shardings of the batches of `open_batches`, without any data."""
    rows = setup.config.train.batch
    split = sharding.batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape), array.dtype, sharding=split)
        for name, array in pipeline.batch_spec(setup.record_spec).items()
    }


def read_in_order(
    setup: Setup,
    source: Source,
    indices: Sequence[int],
    batch_size: int,
    *,
    skip_unreadable: bool,
    mirrored: bool = False,
) -> Iterator[Record]:
    """Yield batches of the records at `indices`, in that order, on the host.

    With `mirrored`, they are the records of the mirror images. The last batch may be smaller.
    """
    dataset = pipeline.in_order(
        source,
        indices,
        batch_size=batch_size,
        skip_unreadable=skip_unreadable,
        mirrored=mirrored,
    )
    workers, _ = choose_workers(setup, batch_size)
    if setup.config.data.workers is None:  # more would have nothing to read
        workers = min(workers, len(dataset))
    with contextlib.closing(_read_ahead(setup, dataset, 0, batch_size, workers)) as batches:
        yield from batches


def choose_workers(setup: Setup, rows: int) -> tuple[int, str]:
    """Return the number of reader processes of this process, for batches of `rows` rows.

    It is data.workers, or else chosen: none where threads suffice, since records are in memory or
    need no decoding, and none where the network itself needs the cores. A text says why there are
    fewer than the cores allow.
    """
    data = setup.config.data
    if data.workers is not None:
        most = _MOST_READERS_OF_A_CORE * hosts.cores()
        check(
            data.workers <= most,
            f"data.workers is {data.workers}, but this machine has {hosts.cores()} cores, which "
            f"more than {most} processes would only wait for, each in some 150 MB; set it to none, "
            "so that it is chosen",
        )
        return data.workers, ""
    platform = setup.mesh.devices.flat[0].platform
    if platform == "cpu" or not sources.SOURCES[data.source].decodes:
        return 0, ""
    size = pipeline.batch_bytes(setup.record_spec, rows)
    return readers.choose_workers(hosts.cores(), setup.sharers, size)


def _read_ahead(
    setup: Setup, dataset: grain.MapDataset, start: int, rows: int, workers: int
) -> readers.Batches:
    """Return the batches of `dataset`, each of up to `rows` rows, from number `start`."""
    size = pipeline.batch_bytes(setup.record_spec, rows)
    read_ahead = setup.config.data.read_ahead
    if read_ahead is None:
        processes = max(1, workers) * setup.sharers
        read_ahead = readers.choose_read_ahead(hosts.memory(), processes, size)
    return readers.iterate(dataset, start, workers=workers, batch_bytes=size, read_ahead=read_ahead)
