"""`--mode excess`: the model's loss above the least that any network can reach, over time."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from sit_jax import hosts
from sit_jax.data.source import Source
from sit_jax.jobs.data import check_same_classes, record_settings
from sit_jax.jobs.excess import copies, report
from sit_jax.jobs.excess.measure import baselines, make_measure, stratum_row
from sit_jax.jobs.excess.sets import (
    TEST,
    TRAIN,
    PointSet,
    check_labels,
    open_split,
    read_set,
    warn_of_splits,
)
from sit_jax.jobs.job import NETWORK, SAMPLER, SHEET, Job
from sit_jax.jobs.results import OUT, Results, Row, open_results, progress_bar
from sit_jax.jobs.sampler import Guide, open_guide, sampler_settings
from sit_jax.jobs.setup import Setup, check_batch, check_sample_batch
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/excess/NAME/{results.jsonl, summary.json, table.md, plot.png, closest.png}.

    Parts of the times that already have a row are kept. Samples are drawn again.
    """
    options = config.excess
    sample = config.sample
    split = options.split or config.data.split
    setup, source = open_split(config, split)
    _check_batches(setup)
    weights = restore_weights(setup, workdir, sample.weights, sample.checkpoint)
    check_same_classes(weights.note, source)
    warn_of_splits(weights.note, split, options.test_split)
    guide = open_guide(config) if options.samples else None
    sets = [read_set(setup, source, TRAIN)]
    if options.test_split is not None:
        test_setup, test_source = open_split(config, options.test_split)
        check_same_classes(weights.note, test_source)
        sets.append(read_set(test_setup, test_source, TEST))
    check_labels(setup, source.class_names, sets)
    settings = _results_settings(setup, source, weights, guide, sets)
    name = f"step{weights.step}-{sample.weights}-{split}-{options.labels}-seed{options.seed}"
    with open_results(flags, workdir, "excess", name, settings) as results:
        rows = _measure_missing(setup, weights, sets, results)
        tables = {
            images.name: report.with_baselines(
                [row for row in rows if row["set"] == images.name],
                baselines(setup, images.points, is_train=images.name == TRAIN),
            )
            for images in sets
        }
        summary: dict[str, Any] = {
            images.name: {
                "split": images.split,
                "images": images.images,
                "read": len(images.points),
                "unreadable": images.points.unreadable,
                **report.totals(tables[images.name], is_train=images.name == TRAIN),
            }
            for images in sets
        }
        if options.samples:
            found = copies.compare(setup, weights, guide, sets)
            summary["nearest"] = found.summary
            results.write_bytes("closest.png", found.sheet)
        results.write_summary(summary | {"meaning": report.MEANING})
        results.write_text("table.md", report.as_markdown(tables, summary))
        if hosts.is_first():
            results.write_bytes("plot.png", report.plot(tables))
        print(report.as_text(summary))
        print(f"plot: {results.folder / 'plot.png'}")


def _measure_missing(
    setup: Setup, weights: Weights, sets: Sequence[PointSet], results: Results
) -> list[Row]:
    """Return the rows of all parts of the times; measure and store those that are missing."""
    rows = results.read_rows(("set", "stratum", "difference_error"))
    done = {(row["set"], row["stratum"]) for row in rows}
    missing = [
        (images, stratum)
        for images in sets
        for stratum in range(setup.config.excess.strata)
        if (images.name, stratum) not in done
    ]
    names = " and ".join(f"{images.name} split {images.split!r}" for images in sets)
    print(
        f"losses of step {weights.step} on the {names}: {len(missing)} parts of the times, into "
        f"{results.folder}",
        flush=True,
    )
    measure = make_measure(setup, weights.params, sets[0].points)
    with progress_bar(len(missing), "part") as bar:
        for images, stratum in missing:
            row = {
                "set": images.name,
                **stratum_row(setup, measure, images.points, images.order, stratum),
            }
            rows.append(row)
            results.add_rows([row])
            bar.update()
    return rows


def _results_settings(
    setup: Setup,
    source: Source,
    weights: Weights,
    guide: Guide | None,
    sets: Sequence[PointSet],
) -> dict[str, Any]:
    """Return everything that the losses and the samples depend on."""
    config = setup.config
    settings = sampler_settings(setup, weights, guide)
    settings["precision"]["losses"] = setup.matmul("measurement")  # matmul is that of the samples
    for key in ("labels", "frames"):  # the samples have all labels in turn
        settings["sample"].pop(key)
    options = dataclasses.asdict(config.excess)
    for key in ("batch", "split", "test_split"):  # the splits are among the sets
        del options[key]
    return settings | {
        "excess": options,
        "label_dropout": config.train.label_dropout,
        "data": record_settings(config.data, source) | {"flip": config.data.flip},
        "sets": {
            images.name: {"split": images.split, "sha256": images.points.digest} for images in sets
        },
    }


def _check_batches(setup: Setup) -> None:
    check_batch(setup.mesh, "excess.batch", setup.config.excess.batch)
    if setup.config.excess.samples:
        check_sample_batch(setup)


JOB = Job(
    run,
    "the loss above that of the best possible prediction, and how far samples are from copies",
    flags=(OUT,),
    memory="excess.batch or sample.batch",
    check_batches=_check_batches,
    uses=(
        *NETWORK,
        *SAMPLER,
        *SHEET,
        "data.",
        "excess.",
        "transport.",
        "train.label_dropout",
        "sample.solver",
        "sample.steps",
        "sample.times",
        "sample.atol",
        "sample.rtol",
        "sample.diffusion_form",
        "sample.diffusion_norm",
        "sample.last_step",
        "sample.last_step_size",
        "sample.cfg_scale",
    ),
)
