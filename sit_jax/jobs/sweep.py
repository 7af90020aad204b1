"""`--mode sweep`: many samplers on one checkpoint, with their quality against what they cost."""

import csv
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, storage
from sit_jax.data import pipeline
from sit_jax.data.sources import Source
from sit_jax.errors import UserError, check
from sit_jax.jobs.sampler import (
    Guide,
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_settings,
)
from sit_jax.jobs.setup import Setup, set_up
from sit_jax.jobs.train import open_source
from sit_jax.jobs.workdir import read_rows, restore_weights, results_folder
from sit_jax.metrics.frechet import frechet_distance, moments
from sit_jax.metrics.pixels import as_features, fit_classifier, fit_components
from sit_jax.sampling import ode, sde
from sit_jax.settings import Config, Sample, Sweep

POINT = (
    "solver",
    "steps",
    "rtol",
    "diffusion_form",
    "cfg_scale",
)  # what a sampler is known by in the table
COLUMNS = (*POINT, "evaluations", "networks", "frechet", "agreement", "seconds")
Judge = Callable[
    [np.ndarray, np.ndarray], dict[str, float]
]  # (uint8 images, labels) -> its measures


def points(sweep: Sweep, sample: Sample) -> list[Sample]:
    """The samplers of a sweep: solvers x steps x guidance, SDEs x forms; adaptive solvers x tolerances, if given."""
    found = []
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
            found += [
                dataclasses.replace(base, steps=None, rtol=rtol, atol=rtol / 10)
                for rtol in sweep.rtols
            ]
            continue
        forms = sweep.forms if solver in sde.SOLVERS else (sample.diffusion_form,)
        for form, steps in itertools.product(forms, sweep.steps):
            found.append(dataclasses.replace(base, diffusion_form=form, steps=steps))
    return found


def known_by(point: Sample) -> dict[str, Any]:
    """The columns that name a point; those that mean nothing to its solver are None."""
    is_sde = point.solver in sde.SOLVERS
    return {
        "solver": point.solver,
        "steps": point.steps,
        "rtol": point.rtol if point.steps is None else None,
        "diffusion_form": point.diffusion_form if is_sde else None,
        "cfg_scale": point.cfg_scale,
    }


def make_evaluator(setup: Setup, source: Source, sweep: Sweep) -> tuple[Judge, dict[str, Any]]:
    """How samples are measured against the real images of `source`; and the same of those real images' own halves."""
    images, labels = _read_all(setup, source, sweep.reference_count)
    features = as_features(images)
    components = fit_components(features, sweep.components)
    real, classifier = moments(components.transform(features)), fit_classifier(features, labels)

    def judge(images, labels):
        features = as_features(images)
        return {
            "frechet": frechet_distance(moments(components.transform(features)), real),
            "agreement": float(np.mean(classifier.predict(features) == labels)),
        }

    halves = [moments(components.transform(features[start::2])) for start in (0, 1)]
    return judge, {"images": len(images), "frechet_between_halves": frechet_distance(*halves)}


def _read_all(setup: Setup, source: Source, count: int) -> tuple[np.ndarray, np.ndarray]:
    data, indices = setup.config.data, range(min(count, len(source)))
    dataset = pipeline.in_order(
        source,
        indices,
        batch_size=256,
        skip_unreadable=True,
        shape=(data.image_size, data.image_size, data.channels),
    )
    batches = list(
        tqdm(
            pipeline.iterate(dataset, 0, workers=data.workers),
            "real images",
            leave=False,
            disable=hosts.tqdm_disabled(),
        )
    )
    images, labels, skipped = (
        np.concatenate([b[name] for b in batches]) for name in ("image", "label", "skipped")
    )
    return images[skipped == 0], labels[skipped == 0]


def measure(
    config: Config, point: Sample, params: Any, weak: Guide | None, judge: Judge
) -> dict[str, Any]:
    """The row of one sampler: its images are drawn, and judged, and forgotten."""
    setup = set_up(dataclasses.replace(config, sample=point))
    sampler, indices = make_sampler(setup, weak), np.arange(point.count)
    next(sample_images(setup, sampler, params, indices[:1]))  # compiles: not a part of its time
    began = time.perf_counter()
    drawn = [
        (images[:, -1], evaluations)
        for _, images, evaluations in sample_images(setup, sampler, params, indices)
    ]
    seconds = time.perf_counter() - began
    evaluations = float(np.mean([evaluations for _, evaluations in drawn]))
    found = judge(np.concatenate([images for images, _ in drawn]), labels_of(setup, indices))
    networks = evaluations * (2 if point.cfg_scale > 1 else 1)
    return (
        known_by(point)
        | {"evaluations": evaluations, "networks": networks}
        | found
        | {"seconds": seconds}
    )


def run(config: Config, workdir: epath.Path) -> None:
    """Writes workdir/sweeps/NAME/{results.jsonl, table.csv, table.md, plot.png}; points that are there are kept."""
    setup, sweep = set_up(config), config.sweep
    source = hosts.run_on_all(lambda: open_source(setup))
    step, params = restore_weights(setup, workdir, config.sample.weights)
    weak = open_guide(config)
    settings = sampler_settings(config, step, weak) | {"data": dataclasses.asdict(config.data)}
    settings |= {name: getattr(sweep, name) for name in ("count", "reference_count", "components")}
    for name in (
        *POINT,
        "atol",
        "times",
        "frames",
        "labels",
    ):  # these are of a point, not of the folder
        del settings[name]
    folder = results_folder(
        workdir / "sweeps", f"step{step}-{config.sample.weights}-count{sweep.count}", settings
    )
    results = folder / "results.jsonl"
    rows = hosts.broadcast_from_first(lambda: read_rows(results))
    done = {_key(row) for row in rows}
    wanted = points(sweep, config.sample)
    missing = [point for point in wanted if _key(known_by(point)) not in done]
    judge, real = make_evaluator(setup, source, sweep)
    print(
        f"{len(missing)} of {len(wanted)} samplers at step {step}, {sweep.count} images each, into {folder}"
    )
    print(f"compared with {real['images']} real images of split {config.data.split!r}, whose halves are a Frechet "
          f"distance of {real['frechet_between_halves']:.3f} apart", flush=True)  # fmt: skip
    with tqdm(missing, unit="sampler", disable=hosts.tqdm_disabled()) as bar:
        for point in bar:
            bar.set_postfix_str(_label(known_by(point)))
            try:
                row = measure(config, point, params, weak, judge)
            except UserError as error:  # one sampler's images are not finite: the others' may be
                bar.write(f"warning: {_label(known_by(point))}: {error}")
                continue
            rows.append(row)
            if hosts.is_first():
                storage.append_text(results, json.dumps(row) + "\n")
    asked = {_key(known_by(point)) for point in wanted}
    rows = sorted(
        (row for row in rows if _key(row) in asked),
        key=lambda row: (row["cfg_scale"], row["networks"]),
    )
    check(rows, "no sampler gave finite images; look whether training diverged")
    if hosts.is_first():
        storage.write_text(folder / "table.csv", as_csv(rows))
        storage.write_text(folder / "table.md", as_markdown(rows))
        storage.write_bytes(folder / "plot.png", plot(rows, real["frechet_between_halves"]))
    print(as_markdown(rows))
    print(f"plot: {folder / 'plot.png'}")


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in POINT)


def _label(row: Mapping[str, Any]) -> str:
    steps = f"rtol {row['rtol']:g}" if row["steps"] is None else f"{row['steps']} steps"
    return f"{_series(row)}, {steps}"


def _series(row: Mapping[str, Any]) -> str:
    parts = [
        row["solver"],
        row["diffusion_form"],
        "adaptive" if row["rtol"] else None,
        f"cfg {row['cfg_scale']:g}",
    ]
    return " ".join(part for part in parts if part)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a sampler, under a header; what does not apply is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as a table for people."""
    shown = {
        "evaluations": "{:g}",
        "networks": "{:g}",
        "frechet": "{:.3f}",
        "agreement": "{:.1%}",
        "seconds": "{:.1f}",
    }

    def cell(name, value):
        return "" if value is None else shown.get(name, "{}").format(value)

    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell(name, row[name]) for name in COLUMNS) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def plot(rows: Sequence[Mapping[str, Any]], real_frechet: float) -> bytes:
    """A PNG: Frechet distance and label agreement against network evaluations; a line a solver, a column a guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scales = sorted({row["cfg_scale"] for row in rows})
    figure = Figure(figsize=(6 * len(scales), 8), layout="constrained")
    axes = figure.subplots(2, len(scales), sharex=True, sharey="row", squeeze=False)
    for column, scale in enumerate(scales):
        for series, own in _lines(row for row in rows if row["cfg_scale"] == scale):
            for axis, measure in zip(axes[:, column], ("frechet", "agreement"), strict=True):
                axis.plot(
                    [r["networks"] for r in own],
                    [r[measure] for r in own],
                    marker="o",
                    ms=3,
                    label=series,
                )
        axes[0, column].axhline(
            real_frechet, color="grey", ls=":", label="halves of the real images"
        )
        axes[0, column].set(title=f"cfg scale {scale:g}", xscale="log", yscale="log")
        axes[1, column].set(xlabel="network evaluations")
        axes[0, column].legend(fontsize="x-small")
    axes[0, 0].set(ylabel="Frechet distance (principal components)")
    axes[1, 0].set(ylabel="label agreement (SVC)")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _lines(rows: Iterator[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    series: dict[str, list] = {}
    for row in rows:
        series.setdefault(_series(row).rpartition(" cfg")[0], []).append(row)
    for name, own in series.items():
        yield name, sorted(own, key=lambda row: row["networks"])
