"""`--mode quality`: how many samples a classifier of the real images reads as their label.

The classifier sees pixels, so this is for small images such as digits, not for photographs.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sit_jax import hosts
from sit_jax.errors import UserError, check
from sit_jax.image_io import encode_png
from sit_jax.jobs.data import RealImages, check_same_classes, open_source, read_real_images
from sit_jax.jobs.job import NETWORK, SHEET, Flag, Job, Overrides
from sit_jax.jobs.results import OUT, make_sheet, open_results
from sit_jax.jobs.sampler import (
    Guide,
    check_label_count,
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_name,
    sampler_settings,
)
from sit_jax.jobs.setup import Setup, check_sample_batch, set_up
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.metrics.pixels import as_features, cross_validated_accuracy, fit_classifier
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Draw sample.count images with guidance and without; write workdir/quality/NAME.

    The folder holds summary.json, settings.json and sheet.png, the first images drawn. Raises
    `UserError` if fewer samples than --minimum are read as their label.
    """
    setup = set_up(config)
    check_sample_batch(setup)
    check_label_count(setup)
    # With the config's guidance first, then without, in order of decreasing scale.
    scales = sorted({config.sample.cfg_scale, 1.0}, reverse=True)
    minimums = _minimums(flags)
    check(
        len(minimums) <= len(scales),
        f"--minimum is {flags.minimum!r}, but samples are drawn at {len(scales)} guidance "
        f"scale{'s' * (len(scales) > 1)}; give as many fractions or fewer",
    )
    source = hosts.run_on_all(lambda: open_source(setup))
    sample = config.sample
    weights = restore_weights(setup, workdir, sample.weights, sample.checkpoint)
    check_same_classes(weights.note, source)
    guide = open_guide(config)
    real = read_real_images(setup, source, config.sweep.reference_count)
    absent = sorted(set(range(config.data.classes)) - set(real.labels.tolist()))
    check(
        not absent,
        f"classes {absent[:8]} have no image among the {len(real.images)} that were read; raise "
        "sweep.reference_count, or check data.path for images that cannot be read",
    )
    features = as_features(real.images)
    accuracy = cross_validated_accuracy(features, real.labels)
    print(f"the classifier reads {accuracy:.1%} of the real images it was not trained on")
    classifier = fit_classifier(features, real.labels)
    name = sampler_name(config.sample, weights.step)
    with open_results(
        flags, workdir, "quality", name, _results_settings(setup, weights, guide, real)
    ) as results:
        summary: dict[str, Any] = {
            "samples": config.sample.count,
            "real_images": len(real.images),
            "unreadable_images": real.drawn - len(real.images),
            "classifier_accuracy": accuracy,
            "agreement": {},
        }
        for scale in scales:
            drawn, drawn_labels, seconds = _draw(setup, weights.params, guide, scale)
            agreement = float(np.mean(classifier.predict(as_features(drawn)) == drawn_labels))
            summary["agreement"][f"cfg {scale:g}"] = agreement
            print(
                f"cfg {scale:g}: {agreement:.1%} of {len(drawn)} samples are read as their label, "
                f"{seconds:.1f} s",
                flush=True,
            )
            if scale == config.sample.cfg_scale:
                sheet = make_sheet(config, drawn[: config.log.sheet_count])
                results.write_bytes("sheet.png", encode_png(sheet))
        results.write_summary(summary)
        print(f"sheet: {results.folder / 'sheet.png'}")
    _check_minimums(minimums, summary["agreement"])


def _check_minimums(minimums: Sequence[float], agreements: Mapping[str, float]) -> None:
    for minimum, (scale, agreement) in zip(minimums, agreements.items(), strict=False):
        check(
            agreement >= minimum,
            f"{scale}: {agreement:.1%} of the samples are read as their label, below --minimum "
            f"{minimum:g}; train longer, or check the log for divergence",
        )


def _results_settings(
    setup: Setup, weights: Weights, guide: Guide | None, real: RealImages
) -> dict[str, Any]:
    """Return every setting that the summary depends on."""
    settings = sampler_settings(setup, weights, guide) | real.settings
    return settings | {"count": setup.config.sample.count}


def _draw(
    setup: Setup, params: Any, guide: Guide | None, cfg_scale: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return uint8 images [n, h, w, c], their labels [n], and the seconds that drawing took."""
    options = dataclasses.replace(
        setup.config.sample,
        cfg_scale=cfg_scale,
        frames=None,
        guide=setup.config.sample.guide if cfg_scale > 1 else None,
    )
    setup = set_up(dataclasses.replace(setup.config, sample=options))
    sampler = make_sampler(setup, guide if cfg_scale > 1 else None)
    indices = np.arange(options.count)
    began = time.perf_counter()
    batches = sample_images(setup, sampler, params, indices)
    images = np.concatenate([batch.images_bfhwc[:, -1] for batch in batches])
    return images, labels_of(setup, indices), time.perf_counter() - began


def _minimums(flags: argparse.Namespace) -> list[float]:
    """Return the fractions of --minimum."""
    if flags.minimum is None:
        return []
    try:
        fractions = [float(text) for text in flags.minimum.split(",")]
    except ValueError:
        fractions = []
    if not fractions or not all(0 <= fraction <= 1 for fraction in fractions):
        raise UserError(
            f"--minimum is {flags.minimum!r}; expected one or two fractions from 0 to 1, such as "
            "0.97,0.95"
        )
    return fractions


def _check_flags(flags: argparse.Namespace, overrides: Overrides) -> None:
    _minimums(flags)


JOB = Job(
    run,
    "share of samples that a classifier of the real images reads as their label (small images)",
    memory="sample.batch or sample.count",
    check_batches=check_sample_batch,
    flags=(
        OUT,
        Flag(
            "minimum",
            "fail if fewer samples are read as their label, with guidance and without: 0.97,0.95",
            "FRACTIONS",
        ),
    ),
    check=_check_flags,
    uses=(*NETWORK, *SHEET, "data.", "sample.", "sweep.reference_count"),
)
