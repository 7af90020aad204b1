"""The images on which losses are measured: those trained on, and a test split."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sit_jax import hosts
from sit_jax.data.source import Source
from sit_jax.errors import UserError
from sit_jax.jobs.data import draw, open_source
from sit_jax.jobs.excess.points import DataPoints, read_points
from sit_jax.jobs.results import warn
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.settings import Config

TRAIN = "train"
TEST = "test"


@dataclasses.dataclass(frozen=True)
class PointSet:
    """Images on which losses are measured: those trained on, or a test split."""

    name: str  # TRAIN or TEST
    split: str
    points: DataPoints
    order: np.ndarray  # the rows of the points, balanced over the classes
    images: int  # in the split


def open_split(config: Config, split: str) -> tuple[Setup, Source]:
    """Return the setup and the source of a split."""
    data = dataclasses.replace(config.data, split=split)
    setup = set_up(dataclasses.replace(config, data=data))
    return setup, hosts.run_on_all(lambda: open_source(setup))


def read_set(setup: Setup, source: Source, name: str) -> PointSet:
    """Read the complete training set, or as many images of a test split as are drawn."""
    options = setup.config.excess
    most = max(options.strata * options.draws, options.samples)
    count = len(source) if name == TRAIN else min(most, len(source))
    points = read_points(setup, source, draw(setup, source, count))
    # The points are in the order of the draw, mirror images last. Each image comes before its
    # mirror image here, so that every prefix is balanced.
    copies = 1 + setup.config.data.flip
    order = np.arange(len(points)).reshape(copies, -1).T.ravel()
    return PointSet(name, setup.config.data.split, points, order, len(source))


def warn_of_splits(note: Mapping[str, Any], split: str, test_split: str | None) -> None:
    """Warn if the run was trained on another split, or if the test split is the same one.

    `note` is the checkpoint's.
    """
    trained = note.get("config", {}).get("data.split", split)
    if trained != split:
        warn(
            f"the run was trained on split {trained!r}, not {split!r}, whose memoriser is another "
            f"one; set excess.split={trained}"
        )
    if test_split == split:
        warn(
            f"excess.test_split is {test_split!r}, which is the training split as well, so its "
            "images test nothing; set it to another split, or to none"
        )


def check_labels(setup: Setup, class_names: Sequence[str], sets: Sequence[PointSet]) -> None:
    """Warn about classes of one image.

    Raises `UserError` if a test image has a class that the training set lacks.
    """
    if setup.config.excess.labels == "null":
        return
    train, *tests = sets
    trained, counts = np.unique(train.points.labels_n, return_counts=True)
    single = trained[counts <= 1 + setup.config.data.flip]
    if len(single):
        warn(
            f"{len(single)} of {len(trained)} classes have only one image, such as "
            f"{class_names[single[0]]!r}: its label tells the memoriser which one it is; set "
            "excess.labels=null to compare without labels"
        )
    for images in tests:
        absent = np.setdiff1d(images.points.labels_n, trained)
        if len(absent):
            raise UserError(
                f"split {images.split!r} has images of class {class_names[absent[0]]!r}, of which "
                f"split {train.split!r} has none, so its memoriser does not know that label; set "
                "excess.labels=null, or another excess.test_split"
            )
