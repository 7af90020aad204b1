"""The numbers that compare samples with a reference, each with its sampling error."""

from typing import NamedTuple

import numpy as np

from sit_jax.jobs.evaluation.feature_sets import PIXELS, FeatureSet, Space, select_rows
from sit_jax.jobs.results import warn
from sit_jax.metrics.frechet import frechet_bias, frechet_distance, frechet_standard_error
from sit_jax.metrics.inception_score import inception_score
from sit_jax.metrics.kernel_distance import kernel_distance
from sit_jax.metrics.neighbours import precision_recall

_NEIGHBOURS = 3
FEWEST = _NEIGHBOURS + 1  # samples that every score can be computed of
_SPLITS = 10
_SUBSET = 1000  # of KID
_SORTED = 0.05  # relative change of the Inception Score that shows samples to be sorted


class Score(NamedTuple):
    """A number that compares samples with a reference."""

    value: float
    error: float | None  # one standard error; None: not known


class Measure(NamedTuple):
    """How tables show a score, and which values of it are better."""

    label: str
    format: str
    better: str  # lower or higher


MEASURES = {
    "fid": Measure("FID", "{:.4g}", "lower"),
    "sfid": Measure("sFID", "{:.4g}", "lower"),
    "inception_score": Measure("Inception Score", "{:.4g}", "higher"),
    "precision": Measure("precision", "{:.4f}", "higher"),
    "recall": Measure("recall", "{:.4f}", "higher"),
    "kid": Measure("kernel distance (KID)", "{:.3g}", "lower"),
    "fd_dinov2": Measure("FD-DINOv2", "{:.4g}", "lower"),
    "frechet": Measure("Frechet distance (principal components)", "{:.4g}", "lower"),
    "agreement": Measure("label agreement (SVC)", "{:.1%}", "higher"),  # only of --mode sweep
}
# {space: {feature: name of its Frechet distance}}; other spaces have those of Inception.
_FRECHET = {"dinov2": {"pool": "fd_dinov2"}, PIXELS: {"pool": "frechet"}}
_INCEPTION = {"pool": "fid", "spatial": "sfid"}


def scores(space: Space, samples: FeatureSet, reference: FeatureSet) -> dict[str, Score]:
    """Return every score of a space, by its name in MEASURES.

    Scores that compare single images are left out if the reference has only statistics.
    """
    result = {}
    for feature, name in _frechet_names(space, reference).items():
        result[name] = _frechet(samples, reference, feature)
    if "logits" in space.widths:
        mean, spread = _inception_score(samples.rows["logits"])
        parts = min(_SPLITS, len(samples.rows["logits"]))
        result["inception_score"] = Score(mean, spread / np.sqrt(parts))
    if len(reference.rows["pool"]) > _NEIGHBOURS:
        result |= _rows(samples.rows["pool"], reference.rows["pool"])
    return result


def _frechet_names(space: Space, reference: FeatureSet) -> dict[str, str]:
    """Return {feature: name of its Frechet distance} of those that the reference knows."""
    names = _FRECHET.get(space.name, _INCEPTION)
    return {feature: name for feature, name in names.items() if feature in reference.statistics}


def measured_in(space: Space, reference: FeatureSet) -> tuple[str, ...]:
    """Return the names of the scores that `scores` returns."""
    names = list(_frechet_names(space, reference).values())
    names += ["inception_score"] * ("logits" in space.widths)
    if len(reference.rows["pool"]) > _NEIGHBOURS:
        names += ["precision", "recall", "kid"]
    return tuple(names)


def _inception_score(logits_nk: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation over parts in the order of the samples, as ADM does.

    If samples are sorted by class, a part lacks most classes, and its score is far too low. The
    parts are then drawn at random, with a warning.
    """
    parts = min(_SPLITS, len(logits_nk))
    mean, spread = inception_score(logits_nk, parts)
    shuffled = inception_score(np.random.default_rng(0).permutation(logits_nk), parts)
    if shuffled[0] - mean <= _SORTED * mean:
        return mean, spread
    warn(
        f"the Inception Score over {parts} parts in order is {mean:.4g}, and over random parts "
        f"{shuffled[0]:.4g}: the samples are sorted by class, and the latter is given"
    )
    return shuffled


def _frechet(samples: FeatureSet, reference: FeatureSet, feature: str) -> Score:
    statistics = samples.statistics[feature]
    real = reference.statistics[feature]
    error = frechet_standard_error(samples.rows[feature], statistics, real)
    return Score(frechet_distance(statistics, real), error)


def _rows(fake_nd: np.ndarray, real_nd: np.ndarray) -> dict[str, Score]:
    precision, recall = precision_recall(real_nd, fake_nd, _NEIGHBOURS)
    # Subsets of all rows would be alike, and their spread 0.
    size = min(_SUBSET, len(fake_nd) // 2, len(real_nd) // 2)
    mean, spread = kernel_distance(fake_nd, real_nd, size=size)
    return {
        "precision": Score(precision, np.sqrt(precision * (1 - precision) / len(fake_nd))),
        "recall": Score(recall, np.sqrt(recall * (1 - recall) / len(real_nd))),
        "kid": Score(mean, spread),
    }


def biases(space: Space, count: int, reference: FeatureSet) -> dict[str, float]:
    """Return the Frechet distances expected of `count` draws from the reference's Gaussian."""
    return {
        name: frechet_bias(reference.statistics[feature], count)
        for feature, name in _frechet_names(space, reference).items()
    }


def floor(space: Space, reference: FeatureSet) -> dict[str, Score]:
    """Return the scores of a random half of the reference's kept images against the other half.

    {} if it has fewer than eight.
    """
    count = len(reference.rows["pool"])
    if count < 8:
        return {}
    order = np.random.default_rng(0).permutation(count)  # they may be sorted by class
    halves = [select_rows(reference, order[start::2]) for start in (0, 1)]
    return scores(space, *halves)
