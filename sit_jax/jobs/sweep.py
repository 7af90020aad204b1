"""`--mode sweep`: compare many samplers on one checkpoint, quality against cost."""

import argparse
import csv
import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sit_jax import hosts
from sit_jax.errors import UserError, check
from sit_jax.jobs.data import (
    RealImages,
    check_same_classes,
    kind_of_draw,
    open_source,
    read_real_images,
)
from sit_jax.jobs.job import NETWORK, SAMPLER, Job
from sit_jax.jobs.results import OUT, Row, open_results, progress_bar
from sit_jax.jobs.sampler import (
    Guide,
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_settings,
)
from sit_jax.jobs.setup import Setup, check_sample_batch, set_up
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.metrics.frechet import feature_statistics, frechet_distance
from sit_jax.metrics.pixels import as_features, fit_classifier, fit_components
from sit_jax.sampling import ode, sde
from sit_jax.settings import Config, Sample, Sweep


class Measure(NamedTuple):
    """How a measure of quality is shown."""

    format: str  # in the table
    label: str  # of the plot's axis
    scale: str  # of the plot's axis


MEASURES = {
    "frechet": Measure("{:.3f}", "Frechet distance (principal components)", "log"),
    "agreement": Measure("{:.1%}", "label agreement (SVC)", "linear"),
}
KEY = ("solver", "steps", "rtol", "diffusion_form", "cfg_scale")  # these identify a sampler
COLUMNS = (*KEY, "evaluations", "networks", *MEASURES, "seconds")
_FORMATS = {"evaluations": "{:g}", "networks": "{:g}", "seconds": "{:.1f}"}
_FORMATS |= {name: measure.format for name, measure in MEASURES.items()}

# (uint8 images, labels) -> {name in MEASURES: value}
Evaluator = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def sampler_grid(sweep: Sweep, sample: Sample) -> list[Sample]:
    """Return the samplers of a sweep: solvers x steps x guidance scales.

    SDE solvers are also combined with diffusion forms. Adaptive solvers take the tolerances, if
    any are given, instead of steps.
    """
    grid = []
    for cfg_scale, solver in itertools.product(sweep.cfg_scales, sweep.solvers):
        base = dataclasses.replace(
            sample,
            solver=solver,
            cfg_scale=cfg_scale,
            count=sweep.count,
            times=(),
            frames=None,
            labels=(),
        )
        if solver in ode.ADAPTIVE and sweep.rtols:
            grid += [
                dataclasses.replace(base, steps=None, rtol=rtol, atol=rtol / 10)
                for rtol in sweep.rtols
            ]
            continue
        forms = sweep.forms if solver in sde.SOLVERS else (sample.diffusion_form,)
        for form, steps in itertools.product(forms, sweep.steps):
            grid.append(dataclasses.replace(base, diffusion_form=form, steps=steps))
    return grid


def row_key(options: Sample) -> Row:
    """Return the columns that identify a sampler; those that its solver does not use are None."""
    is_sde = options.solver in sde.SOLVERS
    return {
        "solver": options.solver,
        "steps": options.steps,
        "rtol": options.rtol if options.steps is None else None,
        "diffusion_form": options.diffusion_form if is_sde else None,
        "cfg_scale": options.cfg_scale,
    }


def make_evaluator(real: RealImages, components_kept: int) -> tuple[Evaluator, float]:
    """Return a function that compares samples with real images, and a distance for comparison.

    That is the Frechet distance between two halves of the real images. Raises `UserError` if there
    are fewer than four.
    """
    check(
        len(real.images) >= 4,
        f"{len(real.images)} real images were read; a sweep compares with 4 or more: raise "
        "sweep.reference_count, or add images to the data set",
    )
    features = as_features(real.images)
    components = fit_components(features, components_kept)
    statistics = feature_statistics(components.transform(features))
    classifier = fit_classifier(features, real.labels)

    def evaluate(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        features = as_features(images)
        drawn = feature_statistics(components.transform(features))
        return {
            "frechet": frechet_distance(drawn, statistics),
            "agreement": float(np.mean(classifier.predict(features) == labels)),
        }

    even, odd = (feature_statistics(components.transform(features[start::2])) for start in (0, 1))
    return evaluate, frechet_distance(even, odd)


def measure(
    config: Config, options: Sample, params: Any, guide: Guide | None, evaluate: Evaluator
) -> Row:
    """Return the row of one sampler: draw its images, measure them and drop them."""
    setup = set_up(dataclasses.replace(config, sample=options))
    sampler = make_sampler(setup, guide)
    indices = np.arange(options.count)
    next(sample_images(setup, sampler, params, indices[:1]))  # compiles, outside the time measured
    began = time.perf_counter()
    batches = list(sample_images(setup, sampler, params, indices))
    seconds = time.perf_counter() - began
    images = np.concatenate([batch.images_bfhwc[:, -1] for batch in batches])
    evaluations = float(np.mean([batch.evaluations for batch in batches]))
    return {
        **row_key(options),
        "evaluations": evaluations,
        "networks": evaluations * (2 if options.cfg_scale > 1 else 1),
        **evaluate(images, labels_of(setup, indices)),
        "seconds": seconds,
    }


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/sweeps/NAME/{results.jsonl, table.csv, table.md, plot.png}.

    Samplers that already have a row are kept.
    """
    setup = set_up(config)
    check_sample_batch(setup)
    sweep = config.sweep
    source = hosts.run_on_all(lambda: open_source(setup))
    weights = restore_weights(setup, workdir, config.sample.weights)
    check_same_classes(weights.note, source)
    guide = open_guide(config)
    real = read_real_images(setup, source, sweep.reference_count)
    evaluate, between_halves = make_evaluator(real, sweep.components)
    name = f"step{weights.step}-{config.sample.weights}-count{sweep.count}"
    with open_results(
        flags, workdir, "sweeps", name, _results_settings(setup, weights, guide, real)
    ) as results:
        rows = results.read_rows(COLUMNS)
        measured = {_key(row) for row in rows}
        grid = sampler_grid(sweep, config.sample)
        missing = [options for options in grid if _key(row_key(options)) not in measured]
        print(
            f"{len(missing)} of {len(grid)} samplers at step {weights.step}, {sweep.count} images "
            f"each, into {results.folder}"
        )
        print(
            f"compared with {len(real.images):,} real images, {kind_of_draw(source)} of "
            f"{len(source):,}, whose halves are a Frechet distance of {between_halves:.3f} apart",
            flush=True,
        )
        with progress_bar(len(missing), "sampler") as bar:
            for options in missing:
                bar.set_postfix_str(_label(row_key(options)))
                try:
                    row = measure(config, options, weights.params, guide, evaluate)
                except UserError as error:  # this sampler's images are not finite; others may be
                    bar.write(f"warning: {_label(row_key(options))}: {error}")
                else:
                    rows.append(row)
                    results.add_rows([row])
                bar.update()
        requested = {_key(row_key(options)) for options in grid}
        rows = [row for row in rows if _key(row) in requested]
        rows.sort(key=lambda row: (row["cfg_scale"], row["networks"]))
        check(rows, "no sampler gave finite images; check whether training diverged")
        results.write_text("table.csv", as_csv(rows))
        results.write_text("table.md", as_markdown(rows))
        if hosts.is_first():
            results.write_bytes("plot.png", plot(rows, between_halves))
        print(as_markdown(rows))
        print(f"plot: {results.folder / 'plot.png'}")


def _results_settings(
    setup: Setup, weights: Weights, guide: Guide | None, real: RealImages
) -> dict[str, Any]:
    """Return every setting that the rows depend on, except those that identify a row."""
    settings = sampler_settings(setup, weights, guide) | real.settings
    for name in ("count", "components"):
        settings[name] = getattr(setup.config.sweep, name)
    for name in (*KEY, "atol", "times", "frames", "labels"):
        del settings["sample"][name]
    return settings


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


def _label(row: Mapping[str, Any]) -> str:
    steps = f"rtol {row['rtol']:g}" if row["steps"] is None else f"{row['steps']} steps"
    return f"{_series(row)} cfg {row['cfg_scale']:g}, {steps}"


def _series(row: Mapping[str, Any]) -> str:
    """Return the name of the sampler's line in the plot."""
    parts = [row["solver"], row["diffusion_form"], "adaptive" if row["rtol"] else None]
    return " ".join(part for part in parts if part)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a header and one line per sampler. Columns that do not apply are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""

    def cell(name: str, value: Any) -> str:
        return "" if value is None else _FORMATS.get(name, "{}").format(value)

    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell(name, row[name]) for name in COLUMNS) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def plot(rows: Sequence[Mapping[str, Any]], real_frechet: float) -> bytes:
    """Return a PNG of each measure against network evaluations.

    Each solver has a line, each guidance scale a column.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scales = sorted({row["cfg_scale"] for row in rows})
    figure = Figure(figsize=(6 * len(scales), 4 * len(MEASURES)), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(scales), sharex=True, sharey="row", squeeze=False)
    for column, scale in enumerate(scales):
        for series, points in _lines(row for row in rows if row["cfg_scale"] == scale):
            networks = [point["networks"] for point in points]
            for axis, name in zip(axes[:, column], MEASURES, strict=True):
                values = [point[name] for point in points]
                axis.plot(networks, values, marker="o", ms=3, label=series)
        axes[0, column].axhline(
            real_frechet, color="grey", ls=":", label="halves of the real images"
        )
        axes[0, column].set(title=f"cfg scale {scale:g}", xscale="log")
        axes[-1, column].set(xlabel="network evaluations")
        axes[0, column].legend(fontsize="x-small")
    for axis, shown in zip(axes[:, 0], MEASURES.values(), strict=True):
        axis.set(ylabel=shown.label, yscale=shown.scale)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield (name, rows by network evaluations) of each line of the plot."""
    series: dict[str, list] = {}
    for row in rows:
        series.setdefault(_series(row), []).append(row)
    for name, points in series.items():
        yield name, sorted(points, key=lambda row: row["networks"])


JOB = Job(
    run,
    "compare solvers, steps, tolerances and guidance by quality and cost",
    flags=(OUT,),
    memory="sample.batch or sweep.count",
    check_batches=check_sample_batch,
    uses=(
        *NETWORK,
        *SAMPLER,
        "data.",
        "sweep.",
        "sample.diffusion_norm",
        "sample.last_step",
        "sample.last_step_size",
    ),
)
