"""Features of many images, computed on the devices, and what metrics need of them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from sit_jax import hosts, sharding
from sit_jax.data import image_set
from sit_jax.data.source import short_digest
from sit_jax.errors import UserError, check
from sit_jax.jobs.results import progress_bar, warn
from sit_jax.jobs.setup import in_precision
from sit_jax.metrics.features import EXTRACTORS, weights_digest
from sit_jax.metrics.moments import FeatureStatistics, Moments, feature_statistics
from sit_jax.metrics.pixels import as_features, fit_components
from sit_jax.metrics.weight_files import cached_path, is_published
from sit_jax.settings import Evaluate

PIXELS = "pixels"
_MOMENTS = ("pool", "spatial")  # features whose mean and covariance metrics use
_PUBLISHED = "published"
_OTHERS = "others, not the published file"
_FITTED = "none, components are fitted to the reference"


@dataclasses.dataclass(frozen=True)
class Space:
    """A space of features in which images are compared."""

    name: str
    digest: str  # of the network's weights, or of the images that it was fitted to
    weights: str  # where those come from, in words
    widths: Mapping[str, int]
    batch: int
    extract: Callable[[np.ndarray], dict[str, np.ndarray]]  # uint8 images [batch, h, w, c]

    @property
    def identity(self) -> str:
        """Name and digest, which are equal only for features that may be compared."""
        return f"{self.name} {self.digest}"


def weights_path(name: str, options: Evaluate) -> str | None:
    """Return the settings' file of a network's weights; None: that in the user's cache folder."""
    return options.dinov2 if name == "dinov2" else options.inception


def choose_batch(mesh: Mesh) -> int:
    """Return how many images a device computes the features of at a time.

    A CPU's caches hold the activations of few images: 8 at a time are 1.1 times as fast as 50.
    """
    return 8 if mesh.devices.flat[0].platform == "cpu" else 64


def open_space(name: str, options: Evaluate, mesh: Mesh) -> Space:
    """Return the space of a network, whose weights are read here and put on the devices.

    Warn if they are not the published ones.
    """
    extractor = EXTRACTORS[name]
    path = weights_path(name, options)
    params = hosts.run_on_all(lambda: extractor.load(path))
    published = hosts.broadcast_from_first(lambda: is_published(extractor.weights, path))
    if not published:
        warn(
            f"the {name} weights {path or cached_path(extractor.weights)!r} were not made from the "
            "published file, so that their numbers compare only with each other; to get it, "
            f"{extractor.weights.remedy}"
        )
    on_devices = sharding.put_replicated(mesh, params)
    split = sharding.batch_sharding(mesh)
    apply = jax.jit(in_precision(extractor.apply, "highest"), out_shardings=split)

    def extract(images_bhwc: np.ndarray) -> dict[str, np.ndarray]:
        return hosts.to_host(apply(on_devices, sharding.shard_global_batch(mesh, images_bhwc)))

    batch = (options.batch or choose_batch(mesh)) * sharding.batch_shards(mesh)
    weights = _PUBLISHED if published else _OTHERS
    return Space(name, weights_digest(params), weights, extractor.widths, batch, extract)


def fit_pixels(features_nd: np.ndarray, shape: tuple[int, int, int], components_kept: int) -> Space:
    """Return the space of the principal components of `as_features` of real images.

    `shape` is height, width and channels of these images.
    """
    components = fit_components(features_nd, components_kept)

    def extract(images_bhwc: np.ndarray) -> dict[str, np.ndarray]:
        converted = image_set.with_channels(images_bhwc, shape[-1])
        if converted is None or converted.shape[1:] != shape:
            height, width, channels = images_bhwc.shape[1:]
            raise UserError(
                f"the samples are {width} x {height} pixels in {channels} channels, but the "
                f"reference is {shape[1]} x {shape[0]} in {shape[2]}; pixels compare only images "
                "of one size: give such images, or set evaluate.features to a network"
            )
        features_bd = components.transform(as_features(converted))
        return {"pool": features_bd.astype(np.float32)}

    digest = short_digest(features_nd.tobytes())
    widths = {"pool": int(components.n_components_)}
    return Space(PIXELS, digest, _FITTED, widths, 1024, extract)


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of some images in one space."""

    space: str  # `Space.identity`
    count: int | None  # of the images that the statistics describe; None: not known
    statistics: Mapping[str, FeatureStatistics]  # by the name of the feature
    rows: Mapping[str, np.ndarray]  # float32 [n, d], of the images that were kept
    hashes: np.ndarray  # uint64, of all images; empty if they are not known


def extract_features(
    space: Space, batches: Iterable[np.ndarray], count: int, kept: np.ndarray | None, text: str
) -> FeatureSet:
    """Compute the features of `count` images in order, and keep the rows of `kept`; None: of all.

    Raises `UserError` that names the images whose features are not finite.
    """
    moments = {name: Moments() for name in _MOMENTS if name in space.widths}
    keep = np.ones(count, bool)
    if kept is not None:
        keep = np.isin(np.arange(count), kept)
    # Allocated at once: joining parts would need the memory twice, and 50,000 rows are 1 GB.
    rows = {
        name: np.empty((int(keep.sum()), width), np.float32) for name, width in space.widths.items()
    }
    hashes = []
    start = filled = 0
    with progress_bar(count, "image", desc=text) as bar:
        for images in _rebatch(batches, space.batch):
            size = len(images)
            padded = np.pad(images, ((0, space.batch - size), (0, 0), (0, 0), (0, 0)), mode="edge")
            features = {name: x[:size] for name, x in space.extract(padded).items()}
            hashes.append(image_set.hashes(images))
            keep_b = keep[start : start + size]
            kept_before, filled = filled, filled + int(keep_b.sum())
            for name, x in features.items():
                if name in moments:
                    moments[name].add(x)
                rows[name][kept_before:filled] = x[keep_b]
            start += size
            bar.update(size)
    check(start == count, f"{start:,} images were read; expected {count:,}")
    return FeatureSet(
        space.identity,
        count,
        {name: sums.statistics() for name, sums in moments.items()},
        rows,
        np.concatenate(hashes),
    )


def select_rows(features: FeatureSet, rows: np.ndarray) -> FeatureSet:
    """Return the feature set of some of the kept images, by their numbers."""
    selected = {name: x[rows] for name, x in features.rows.items()}
    return FeatureSet(
        features.space,
        len(selected["pool"]),
        {name: feature_statistics(selected[name]) for name in features.statistics},
        selected,
        features.hashes[:0],
    )


def _rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the images of `batches` in batches of `size`, of which the last may be smaller."""
    parts: list[np.ndarray] = []
    waiting = 0
    for batch in batches:
        while len(batch):
            take = batch[: size - waiting]
            parts.append(take)
            waiting += len(take)
            batch = batch[len(take) :]
            if waiting == size:
                yield np.concatenate(parts)
                parts, waiting = [], 0
    if parts:
        yield np.concatenate(parts)
