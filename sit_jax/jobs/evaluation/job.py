"""`--mode evaluate`: FID and its relatives of samples, of this or any project."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax.data import image_set
from sit_jax.data.image_set import ImageSet, open_images
from sit_jax.errors import check
from sit_jax.image_io import encode_png, sheet
from sit_jax.jobs.evaluation import recipe, scores
from sit_jax.jobs.evaluation.curves import training_curves
from sit_jax.jobs.evaluation.feature_sets import FeatureSet, Space, extract_features
from sit_jax.jobs.evaluation.published import published_for
from sit_jax.jobs.evaluation.references import (
    REFERENCE,
    Reference,
    digest,
    open_reference,
    open_spaces,
)
from sit_jax.jobs.evaluation.report import Section, as_html, as_markdown
from sit_jax.jobs.evaluation.scores import FEWEST, MEASURES, Score
from sit_jax.jobs.job import NETWORK, Flag, Job
from sit_jax.jobs.render import markdown_table
from sit_jax.jobs.results import OUT, Results, open_results, warn
from sit_jax.jobs.sample import Drawn, draw_samples
from sit_jax.jobs.sampler import check_decoder
from sit_jax.jobs.setup import Setup, check_sample_batch, set_up
from sit_jax.settings import Config

SAMPLES = Flag(
    "samples",
    "folder of images, or .npz with images [n, h, w, 3] as arr_0, of any project; default: draw "
    "sample.count from the workdir's run",
    "PATH",
    is_path=True,
)
_NOTES = (
    "The error is one standard error. Real halves: a random half of the reference's kept images "
    "against the other. Bias: the distance expected of as many draws from the reference's own "
    "Gaussian.",
)
_PUBLISHED_NOTE = (
    "FIDs of arXiv 2401.08740 for this network: 50,000 samples, 250 evaluations of the network, "
    "ADM's statistics. Compare them only with numbers that were computed in the same way.",
)
_SHEET_CLASSES = 10
_SHEET_OF_CLASS = 10
_BIAS_TO_WARN_OF = 0.1  # of the distance
_COPIES_TO_WARN_OF = 0.01  # of the samples


class Evaluation(NamedTuple):
    """The scores of a set of samples in one space."""

    space: Space
    scores: Mapping[str, Score]
    floor: Mapping[str, Score]  # of real images against real images
    biases: Mapping[str, float]
    samples: FeatureSet
    reference: FeatureSet


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write evaluations/NAME/{summary.json, report.md, report.html, ...} of the workdir or --out.

    Without --samples, the samples of the workdir's run are drawn first, as --mode sample does.
    """
    setup = set_up(config)
    if flags.samples is None:
        check_decoder(setup)
    reference = open_reference(setup, flags.reference)
    spaces = open_spaces(setup, reference)
    if flags.samples is None:
        drawn = draw_samples(config, workdir, flags)
        setup = dataclasses.replace(setup, config=drawn.config)
        count = config.sample.count  # an earlier command may have drawn more
        samples = open_images(os.fspath(drawn.images), are_samples=True, first=count)
        samples = dataclasses.replace(samples, labels=drawn.labels)
    else:
        drawn = None
        samples = open_images(flags.samples, are_samples=True)
    check(
        samples.count >= FEWEST,
        f"{samples.place!r} holds {samples.count} images; expected {FEWEST} samples or more: draw "
        "more, such as the usual 50,000",
    )
    print(f"{samples.count:,} samples of {samples.place}", flush=True)
    settings = {
        "samples": samples.place if drawn is None else drawn.settings,
        "reference": reference.place,
        **({"reference_images": _count_and_shape(reference.images)} if reference.images else {}),
        "spaces": [space.identity for space in spaces],
        "count": samples.count,
        "kept": config.evaluate.kept,
        "seed": config.data.subset_seed,
    }
    name = f"{drawn.name if drawn else epath.Path(samples.place).stem}-{samples.count}"
    with open_results(flags, workdir, "evaluations", name, settings) as results:
        evaluations = [evaluate(space, samples, reference) for space in spaces]
        made = _recipe(setup, results, flags, samples, reference, evaluations, drawn)
        curves = training_curves(workdir) if drawn else b""
        _write(setup, results, samples, evaluations, made, curves)


def _count_and_shape(images: ImageSet) -> list[int]:
    return [images.count, *images.shape]


def evaluate(space: Space, samples: ImageSet, reference: Reference) -> Evaluation:
    """Compute the features of samples and reference, and compare them. Warn of doubtful scores.

    Raises `UserError` if the samples are the reference itself.
    """
    real = reference.features(space)
    drawn = extract_features(space, samples.batches(), samples.count, None, "samples")
    _check_copies(samples, drawn, real)
    found = scores.scores(space, drawn, real)
    if real.count is not None and real.count <= space.widths["pool"]:
        warn(
            f"{real.count:,} reference images are few for {space.widths['pool']:,} features: "
            "distances to them are too large; give more, such as the complete training set"
        )
    biases = scores.biases(space, drawn.count or 0, real)
    for name, bias in biases.items():
        count = drawn.count or 0
        if count <= space.widths["pool"] or bias > _BIAS_TO_WARN_OF * found[name].value:
            warn(
                f"{drawn.count:,} samples are few for {space.widths['pool']:,} features: as many "
                f"perfect samples would have {MEASURES[name].label} {bias:.3g} (of "
                f"{found[name].value:.3g}); draw more, such as the usual 50,000"
            )
    return Evaluation(space, found, scores.floor(space, real), biases, drawn, real)


def _check_copies(samples: ImageSet, drawn: FeatureSet, real: FeatureSet) -> None:
    copies = int(np.isin(drawn.hashes, real.hashes).sum())
    check(
        copies < samples.count,
        f"all {samples.count:,} samples are images of the reference, so that nothing is measured; "
        "give other samples, or another reference",
    )
    if copies > _COPIES_TO_WARN_OF * samples.count:
        warn(f"{copies:,} of the {samples.count:,} samples are exact copies of reference images")
    repeats = samples.count - len(np.unique(drawn.hashes))
    if repeats:
        warn(f"{repeats:,} of the {samples.count:,} samples repeat another sample exactly")


def _recipe(
    setup: Setup,
    results: Results,
    flags: argparse.Namespace,
    samples: ImageSet,
    reference: Reference,
    evaluations: Sequence[Evaluation],
    drawn: Drawn | None,
) -> dict[str, Any]:
    """Return everything that the numbers depend on."""
    first = evaluations[0]
    height, width, channels = samples.shape
    return {
        "command": recipe.command(
            "evaluate",
            os.fspath(results.folder / "config.json"),
            flags,
            ("workdir", "samples", "reference", "out"),
        ),
        "samples": {
            "place": samples.place,
            "count": samples.count,
            "size": f"{width} x {height} x {channels}",
            "digest": image_set.digest(first.samples.hashes),
        },
        "reference": {
            "place": reference.place,
            "count": first.reference.count or "not known",
            "kept": len(first.reference.rows["pool"]),
            "digest": digest(reference, first.reference),
        },
        "features": recipe.describe_spaces([item.space for item in evaluations]),
        **({"run": {**drawn.settings, "evaluations": drawn.evaluations}} if drawn else {}),
        **recipe.environment(),
        "config": dataclasses.asdict(setup.config),
    }


def _write(
    setup: Setup,
    results: Results,
    samples: ImageSet,
    evaluations: Sequence[Evaluation],
    made: Mapping[str, Any],
    curves: bytes,
) -> None:
    """Write the numbers, the report and the config, and print a table."""
    results.write_text("config.json", config_lib.to_json(setup.config))
    results.write_summary({"scores": _as_json(evaluations), "recipe": made})
    picture = encode_png(_sheet(setup, samples))
    results.write_bytes("sheet.png", picture)
    header, rows = table(evaluations)
    sections = [
        Section("Numbers", _NOTES, header, rows),
        *_published(setup, made),
        Section("Command", ("It computes these numbers again.",), command=made["command"]),
        Section("Recipe", (), ("", ""), recipe.flat(dict(made, config={}))),
        Section("Samples", (_sheet_text(samples),), picture=picture),
        *(
            [Section("Training", ("Loss, and scores if any, by step.",), picture=curves)]
            * bool(curves)
        ),
    ]
    title = f"Evaluation of {made['samples']['place']}"
    results.write_text("report.md", as_markdown(title, sections))
    results.write_text("report.html", as_html(title, sections))
    print(markdown_table(header, rows))
    print(f"report: {results.folder / 'report.html'}")


def _published(setup: Setup, made: Mapping[str, Any]) -> list[Section]:
    rows = published_for(setup.config) if "run" in made else []
    cells = [(row.model, row.training, row.sampler, f"{row.fid:g}") for row in rows]
    header = ("model", "training", "sampler", "FID")
    return [Section("Published", _PUBLISHED_NOTE, header, cells)] if cells else []


def table(evaluations: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the numbers."""
    header = ["measure", "value", "error", "real halves", "bias", "better", "features"]
    rows = []
    for item in evaluations:
        for name, score in item.scores.items():
            measure = MEASURES[name]
            floor = item.floor.get(name)
            rows.append(
                [
                    measure.label,
                    _cell(score.value, measure.format),
                    _cell(score.error, "{:.2g}"),
                    _cell(floor.value if floor else None, measure.format),
                    _cell(item.biases.get(name), "{:.2g}"),
                    measure.better,
                    item.space.name,
                ]
            )
    return header, rows


def _cell(value: float | None, format_: str) -> str:
    return "" if value is None else format_.format(value)


def _as_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in evaluations:
        result[item.space.name] = {
            name: {
                "value": score.value,
                "standard_error": score.error,
                "real_halves": item.floor[name].value if name in item.floor else None,
                "bias": item.biases.get(name),
            }
            for name, score in item.scores.items()
        }
    return result


def _sheet(setup: Setup, samples: ImageSet) -> np.ndarray:
    """Return a grid of samples, uint8: a class a row, or without labels the first of all."""
    columns = setup.config.sample.columns
    if samples.labels is None:
        wanted = np.arange(min(samples.count, columns * columns))
    else:
        columns = _SHEET_OF_CLASS
        rows = [
            np.flatnonzero(samples.labels == label)[:columns]
            for label in np.unique(samples.labels)[:_SHEET_CLASSES]
        ]
        wanted = np.concatenate(rows)
    return sheet(_take(samples, wanted), columns, scale=setup.config.sample.scale)


def _sheet_text(samples: ImageSet) -> str:
    return "The first samples." if samples.labels is None else "The first samples of each class."


def _take(samples: ImageSet, indices: np.ndarray) -> np.ndarray:
    """Return the images at `indices`, in that order."""
    wanted, places = np.unique(indices, return_inverse=True)
    return np.concatenate(list(samples.read(wanted)))[places]


JOB = Job(
    run,
    "FID, sFID, Inception Score, precision, recall, KID of a run's samples, or of any images",
    memory="evaluate.batch, evaluate.kept or sample.batch",
    check_batches=check_sample_batch,
    uses=(*NETWORK, "data.", "sample.", "log.sheet_count", "evaluate.", "sweep.components"),
    flags=(OUT, REFERENCE, SAMPLES),
    instead_of_workdir=("samples",),
)
