"""The real images, or statistics of them, that samples are compared with."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from etils import epath

from sit_jax import hosts, storage
from sit_jax.data import image_set, subset
from sit_jax.data.image_set import ImageSet, open_images
from sit_jax.data.npz import NpzFile
from sit_jax.errors import UserError, check
from sit_jax.jobs.data import draw, open_source, read_in_order
from sit_jax.jobs.evaluation.feature_sets import (
    PIXELS,
    FeatureSet,
    Space,
    extract_features,
    fit_pixels,
    open_space,
)
from sit_jax.jobs.job import Flag
from sit_jax.jobs.setup import Setup
from sit_jax.metrics.moments import FeatureStatistics
from sit_jax.metrics.pixels import as_features

REFERENCE = Flag(
    "reference",
    "what to compare with: statistics (.npz with mu and sigma), a folder of images, or an .npz of "
    "images; default: evaluate.reference, or else the config's data source",
    "PATH",
    is_path=True,
)
_READ = 64  # records of the data source that are read at a time
# Names of mean and covariance in ADM's files, by the feature.
_STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_NO_HASHES = np.zeros(0, np.uint64)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    place: str
    images: ImageSet | None
    kept: np.ndarray  # indices of the images whose features are kept row by row, ascending
    statistics: NpzFile | None = None  # of images that may be many more than `images`

    def features(self, space: Space) -> FeatureSet:
        """Return the features in a space. Raises `UserError` for statistics of another space."""
        stored = read_statistics(self.statistics, space) if self.statistics else None
        found = FeatureSet(space.identity, None, {}, _no_rows(space), _NO_HASHES)
        if self.images is not None:
            found = extract_features(
                space, self.images.batches(), self.images.count, self.kept, "reference"
            )
        if stored is not None:
            count, statistics = stored
            found = dataclasses.replace(found, count=count, statistics=statistics)
        return found

    def fit_pixels(self, components: int) -> Space:
        """Return the space of the principal components of the kept images' pixels."""
        if self.images is None or self.statistics is not None:
            raise UserError(
                f"{self.place!r} holds statistics of a network's features, which pixels cannot be "
                "compared with; set evaluate.features=inception, or give images as the reference"
            )
        features_nd = np.concatenate([as_features(x) for x in self.images.read(self.kept)])
        height, width, channels = self.images.shape
        # Grey images count once, whether they are stored as grey or as colour.
        by_channel_ndc = features_nd.reshape(len(features_nd), -1, channels)
        if (by_channel_ndc == by_channel_ndc[..., :1]).all():
            features_nd, channels = by_channel_ndc[..., 0], 1
        return fit_pixels(features_nd, (height, width, channels), components)


def open_spaces(setup: Setup, reference: Reference) -> list[Space]:
    """Return the spaces of evaluate.features.

    Raises `UserError` if the reference has statistics of another space: before samples are drawn.
    """
    evaluate = setup.config.evaluate
    spaces = [
        reference.fit_pixels(setup.config.sweep.components)
        if name == PIXELS
        else open_space(name, evaluate, setup.mesh)
        for name in evaluate.features
    ]
    for space in spaces:
        if reference.statistics is not None:
            read_statistics(reference.statistics, space)
    return spaces


def open_reference(setup: Setup, path: str | None) -> Reference:
    """Open the reference at `path`, or at evaluate.reference, or else the data source.

    `path` is a file of statistics as ADM's, such as VIRTUAL_imagenet256_labeled.npz or one of
    --mode stats, or images. Raises `UserError` for anything else.
    """
    path = path or setup.config.evaluate.reference
    if path is None:
        return _open_source(setup)
    statistics = None
    if path.endswith(".npz") and not storage.is_remote(path):
        check(hosts.broadcast_from_first(lambda: _exists(path)), f"{path!r} does not exist")
        file = NpzFile(path)
        statistics = file if "mu" in file.names else None
    if statistics is not None and "arr_0" not in statistics.names:
        return Reference(path, None, np.zeros(0, np.int64), statistics)
    images = open_images(path, are_samples=False)
    check(
        images.count > 1 or statistics is not None,
        f"the reference {path!r} holds one image, which has no covariance; give two or more",
    )
    return Reference(path, images, _draw(setup, images.count), statistics)


def _exists(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def _draw(setup: Setup, count: int) -> np.ndarray:
    """Return the indices of the images to keep. The draw is uniform: folders are class by class."""
    order = subset.uniform_order(count, setup.config.data.subset_seed)
    return np.sort(order[: setup.config.evaluate.kept])


def _open_source(setup: Setup) -> Reference:
    check(
        "image" in setup.record_spec,
        "the data source holds stored latents, not images to compare with; give --reference, a "
        "file of --mode stats, or the images",
    )
    source = hosts.run_on_all(lambda: open_source(setup))
    indices = np.sort(draw(setup, source, setup.config.evaluate.count))
    # A part of the data is itself a draw of which every prefix is stratified.
    first = draw(setup, source, min(setup.config.evaluate.kept, len(indices)))
    kept = np.flatnonzero(np.isin(indices, first))
    data = setup.config.data
    place = f"{data.source} {data.path or ''} {data.split}".replace("  ", " ")

    def read(numbers: np.ndarray) -> Iterator[np.ndarray]:
        chosen = indices[numbers].tolist()
        for batch in read_in_order(setup, source, chosen, _READ, skip_unreadable=False):
            yield batch["image"]

    labels = None if source.labels is None else source.labels[indices]
    return Reference(place, ImageSet(place, len(indices), data.image_shape, read, labels), kept)


def read_statistics(file: NpzFile, space: Space) -> tuple[int | None, dict[str, FeatureStatistics]]:
    """Return the number of images, None if it is not known, and the statistics of a space.

    Raises `UserError` for statistics of another space.
    """
    if "space" in file.names:
        stored = str(file.array("space"))
        check(
            stored == space.identity,
            f"{file.path!r} holds statistics of the features {stored!r}, but the samples' are "
            f"{space.identity!r}; make them again with --mode stats, or change evaluate.features",
        )
    count = int(file.array("count")) if "count" in file.names else None
    statistics = {}
    for name, width in space.widths.items():
        mean, covariance = _STATISTICS.get(name, ("", ""))
        if mean not in file.names or covariance not in file.names:
            continue
        for key, shape in ((mean, (width,)), (covariance, (width, width))):
            found, _ = file.header(key)
            check(
                found == shape,
                f"{file.path!r}: {key} is {list(found)}, but {space.name} features need "
                f"{list(shape)}: they are of another space; give its name as evaluate.features, or "
                "other statistics",
            )
        mean_d = file.array(mean).astype(np.float64)
        covariance_dd = file.array(covariance).astype(np.float64)
        check(
            np.isfinite(mean_d).all() and np.isfinite(covariance_dd).all(),
            f"{file.path!r}: {mean} or {covariance} is not finite; make the statistics again",
        )
        check(
            np.allclose(covariance_dd, covariance_dd.T, rtol=1e-5, atol=1e-8),
            f"{file.path!r}: {covariance} is not symmetric, so it is not a covariance; make the "
            "statistics again",
        )
        statistics[name] = FeatureStatistics(mean_d, covariance_dd, count)
    check(
        statistics,
        f"{file.path!r} holds {', '.join(file.names)}; expected mu and sigma, as --mode stats "
        "writes them",
    )
    return count, statistics


def statistics_arrays(features: FeatureSet) -> dict[str, np.ndarray]:
    """Return the arrays of ADM's file of statistics, and what `read_statistics` checks."""
    arrays: dict[str, np.ndarray] = {
        "count": np.asarray(features.count),
        "space": np.asarray(features.space),
    }
    for name, statistics in features.statistics.items():
        mean, covariance = _STATISTICS[name]
        arrays[mean] = statistics.mean_d
        arrays[covariance] = statistics.covariance_dd
    return arrays


def digest(reference: Reference, features: FeatureSet) -> str:
    """Return 16 hex digits of what was compared with: the file of statistics, or the pixels."""
    if reference.statistics is not None:
        return storage.sha256(epath.Path(reference.statistics.path))[:16]
    return image_set.digest(features.hashes)


def _no_rows(space: Space) -> dict[str, np.ndarray]:
    return {name: np.zeros((0, width), np.float32) for name, width in space.widths.items()}
