"""Scores of EMA samples while a run trains, and which checkpoint had the best one."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from sit_jax import hosts, storage
from sit_jax.jobs.evaluation.feature_sets import (
    PIXELS,
    FeatureSet,
    Space,
    extract_features,
    open_space,
    weights_path,
)
from sit_jax.jobs.evaluation.references import Reference, digest, open_reference
from sit_jax.jobs.evaluation.scores import MEASURES, scores
from sit_jax.jobs.results import as_named
from sit_jax.jobs.sampler import (
    Sampler,
    check_decoder,
    check_label_count,
    drawing_settings,
    sample_images,
)
from sit_jax.jobs.setup import Setup
from sit_jax.metrics import weight_files
from sit_jax.metrics.features import EXTRACTORS

_FILE = "best.json"


@dataclasses.dataclass(frozen=True)
class Best:
    """The step whose samples had the best score so far. A value is only comparable in its space."""

    step: int
    measure: str
    value: float
    space: str  # the features, the reference, the number of samples and the sampler


class TrainingScores:
    """Computes the scores of a step, and remembers the best step."""

    def __init__(self, setup: Setup, carried: Mapping[str, Any]):
        """Read the reference and compute its features; continue from `carried` of a checkpoint.

        Raises `UserError` if there is nothing to compare with.
        """
        check_decoder(setup)
        self._setup = setup
        self._count = setup.config.log.scores_count
        check_label_count(setup, "log.scores_count")
        reference = _open_reference(setup)
        self._space = _open_space(setup, reference)
        if self._space.name == PIXELS:  # refuses images of another size now, not at the first score
            self._space.extract(np.zeros((1, *setup.config.data.image_shape), np.uint8))
        self._real: FeatureSet = reference.features(self._space)
        self._name = (
            f"{self._space.identity}, {digest(reference, self._real)}, {self._count}, "
            f"{_sampler_digest(setup)}"
        )
        self.scored: int = carried.get("scored", 0)  # the last step that has scores
        best = carried.get("best")
        self.best = Best(**best) if best and best["space"] == self._name else None
        print(
            f"scores every {setup.config.log.scores_every} steps: {self._count} EMA samples "
            f"against {self._real.count or 'unknown'} images of {reference.place}, by "
            f"{self._space.name} features",
            flush=True,
        )

    def is_due(self, step: int) -> bool:
        """Return True if the step is to have scores."""
        every = self._setup.config.log.scores_every
        return step > self.scored and (step % every == 0 or step == self._setup.steps)

    def compute(self, step: int, sampler: Sampler, ema: Any) -> dict[str, float]:
        """Return the scores of a step by names such as inception/fid.

        Raises `UserError` if a sample is not finite.
        """
        self.scored = step
        indices = np.arange(self._count)
        batches = sample_images(self._setup, sampler, ema, indices)
        images = (batch.images_bfhwc[:, -1] for batch in batches)
        drawn = extract_features(self._space, images, self._count, None, "scores")
        found = scores(self._space, drawn, self._real)
        first = next(iter(found))
        value = found[first].value
        assert MEASURES[first].better == "lower"
        if self.best is None or value < self.best.value:
            self.best = Best(step, first, value, self._name)
        return {f"{self._space.name}/{name}": score.value for name, score in found.items()}

    def to_carry(self) -> dict[str, Any]:
        """Return the state that a continued run needs."""
        best = dataclasses.asdict(self.best) if self.best else None
        return {"scored": self.scored, "best": best}

    def write_best(self, workdir: epath.Path) -> None:
        """Write workdir/best.json."""
        if self.best and hosts.is_first():
            text = json.dumps(dataclasses.asdict(self.best), indent=2)
            storage.write_text(workdir / _FILE, text + "\n")


def _sampler_digest(setup: Setup) -> str:
    """Return 16 hex digits of the settings that samples depend on beside the weights."""
    settings = as_named(drawing_settings(setup))
    del settings["sample"]["weights"]  # scores are of the EMA
    if guide := setup.config.sample.guide:
        settings["guide"] = guide
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _open_reference(setup: Setup) -> Reference:
    """Open the reference. Without a file of statistics, it is a draw of at most evaluate.kept."""
    evaluate = setup.config.evaluate
    drawn = dataclasses.replace(evaluate, count=evaluate.count or evaluate.kept)
    config = dataclasses.replace(setup.config, evaluate=drawn)
    return open_reference(dataclasses.replace(setup, config=config), None)


def _open_space(setup: Setup, reference: Reference) -> Space:
    """Return the first space of evaluate.features, or pixels without the network's weights."""
    evaluate = setup.config.evaluate
    name = evaluate.features[0]
    components = setup.config.sweep.components
    if name == PIXELS:
        return reference.fit_pixels(components)
    weights = EXTRACTORS[name].weights
    has_weights = weights_path(name, evaluate) or os.path.exists(weight_files.cached_path(weights))
    if hosts.broadcast_from_first(lambda: bool(has_weights)):
        return open_space(name, evaluate, setup.mesh)
    print(
        f"the weights of {name} are not in the cache folder, so scores in training compare pixels; "
        f"to get the weights, {weights.remedy}",
        flush=True,
    )
    return reference.fit_pixels(components)
