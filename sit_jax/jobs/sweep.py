"""`--mode sweep`: compare checkpoints, guidance and samplers, quality against cost."""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
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
from sit_jax.jobs.evaluation import recipe
from sit_jax.jobs.evaluation.feature_sets import PIXELS, extract_features, open_space
from sit_jax.jobs.evaluation.references import REFERENCE, digest, open_reference
from sit_jax.jobs.evaluation.scores import FEWEST, measured_in, scores
from sit_jax.jobs.job import NETWORK, SAMPLER, Job
from sit_jax.jobs.results import OUT, Results, Row, open_results, progress_bar
from sit_jax.jobs.sampler import (
    Guide,
    Sampler,
    check_decoder,
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_settings,
)
from sit_jax.jobs.setup import Setup, check_sample_batch, set_up
from sit_jax.jobs.sweep_tables import KEY, as_csv, as_markdown, best_rows, label, plot
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.metrics.frechet import frechet_distance
from sit_jax.metrics.moments import feature_statistics
from sit_jax.metrics.pixels import as_features, fit_classifier, fit_components
from sit_jax.sampling import ode, sde
from sit_jax.settings import Config, Sample, Sweep

# (uint8 images, labels) -> {name of a measure: value}
Evaluator = Callable[[np.ndarray, np.ndarray], dict[str, float]]


class Real(NamedTuple):
    """What samples are compared with."""

    evaluate: Evaluator
    measures: tuple[str, ...]
    floor: Mapping[str, float]  # measures of real images
    text: str
    settings: Mapping[str, Any]


def sampler_grid(sweep: Sweep, sample: Sample) -> list[Sample]:
    """Return the samplers of a sweep: guidance intervals and scales x solvers x steps.

    SDE solvers are also combined with diffusion forms. Adaptive solvers take the tolerances, if
    any are given, instead of steps.
    """
    grid = []
    intervals = _pairs(sweep.cfg_intervals) or [sample.cfg_interval]
    for scale, interval, solver in itertools.product(sweep.cfg_scales, intervals, sweep.solvers):
        if scale == 1 and interval != intervals[0]:  # without guidance, intervals are all alike
            continue
        base = dataclasses.replace(
            sample,
            solver=solver,
            cfg_scale=scale,
            cfg_interval=interval,
            count=sweep.count,
            times=(),
            frames=None,
            labels=(),
            label_draw="balanced",
            labels_file=None,
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


def _pairs(times: Sequence[float]) -> list[tuple[float, ...]]:
    return [tuple(times[start : start + 2]) for start in range(0, len(times), 2)]


def row_key(options: Sample, step: int) -> Row:
    """Return the columns that identify a row; those that its solver does not use are None."""
    is_sde = options.solver in sde.SOLVERS
    is_guided = options.cfg_scale > 1
    return {
        "step": step,
        "weights": options.weights,
        "solver": options.solver,
        "steps": options.steps,
        "rtol": options.rtol if options.steps is None else None,
        "diffusion_form": options.diffusion_form if is_sde else None,
        "cfg_scale": options.cfg_scale,
        "cfg_first": options.cfg_interval[0] if is_guided else None,
        "cfg_last": options.cfg_interval[1] if is_guided else None,
    }


def open_real(setup: Setup, note: Mapping[str, Any], flags: argparse.Namespace) -> Real:
    """Return what samples are compared with: pixels of the data set, or features of a network."""
    name = setup.config.sweep.features
    if name == PIXELS:
        if setup.config.evaluate.reference is not None:
            print(
                "note: evaluate.reference is for a network's features; pixels are compared with "
                "the data set"
            )
        source = hosts.run_on_all(lambda: open_source(setup))
        check_same_classes(note, source)
        real = read_real_images(setup, source, setup.config.sweep.reference_count)
        evaluate, between_halves = make_evaluator(real, setup.config.sweep.components)
        text = (
            f"compared with {len(real.images):,} real images, {kind_of_draw(source)} of "
            f"{len(source):,}, whose halves are a Frechet distance of {between_halves:.3f} apart"
        )
        floor = {"frechet": between_halves}
        return Real(evaluate, ("frechet", "agreement"), floor, text, real.settings)
    check_decoder(setup)
    reference = open_reference(setup, flags.reference)
    space = open_space(name, setup.config.evaluate, setup.mesh)
    features = reference.features(space)

    def evaluate_features(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        drawn = extract_features(space, [images], len(images), None, "features")
        return {name: score.value for name, score in scores(space, drawn, features).items()}

    settings = {
        "features": recipe.describe_spaces([space]),
        "reference": {"place": reference.place, "digest": digest(reference, features)},
    }
    text = f"compared with {reference.place} in the space of {space.name} features"
    return Real(evaluate_features, measured_in(space, features), {}, text, settings)


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
    setup: Setup, sampler: Sampler, options: Sample, weights: Weights, evaluate: Evaluator
) -> Row:
    """Return the row of one sampler: draw its images, measure them and drop them."""
    indices = np.arange(options.count)
    next(sample_images(setup, sampler, weights.params, indices[:1]))  # compiles, outside the time
    began = time.perf_counter()
    batches = list(sample_images(setup, sampler, weights.params, indices))
    seconds = time.perf_counter() - began
    images = np.concatenate([batch.images_bfhwc[:, -1] for batch in batches])
    evaluations = float(np.mean([batch.evaluations for batch in batches]))
    return {
        **row_key(options, weights.step),
        "evaluations": evaluations,
        "networks": evaluations * (2 if options.cfg_scale > 1 else 1),
        **evaluate(images, labels_of(setup, indices)),
        "seconds": seconds,
    }


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/sweeps/NAME/{results.jsonl, table.csv, table.md, plot.png}.

    Rows that were measured before are kept.
    """
    sweep = config.sweep
    check(
        flags.reference is None or sweep.features != PIXELS,
        "--reference is for features of a network, and sweep.features=pixels compares with the "
        "data set; set sweep.features=inception, or leave out --reference",
    )
    check(
        sweep.features == PIXELS or sweep.count >= FEWEST,
        f"sweep.count is {sweep.count}; expected {FEWEST} or more for a network's features",
    )
    setup = set_up(config)
    check_sample_batch(setup)
    kinds = sweep.weights or (config.sample.weights,)
    steps = sweep.checkpoints or (config.sample.checkpoint,)

    @functools.lru_cache(maxsize=1)  # only one set of weights is in memory
    def restore(step: int | None, kind: str) -> Weights:
        return restore_weights(setup, workdir, kind, step)

    pairs = list(itertools.product(steps, kinds))
    notes = [dataclasses.replace(restore(*pair), params=None) for pair in pairs]
    guide = open_guide(config)
    real = open_real(setup, notes[0].note, flags)
    settings = _results_settings(setup, notes, kinds, guide, real)
    columns = (*KEY, "evaluations", "networks", *real.measures, "seconds")
    name = f"step{notes[0].step}-{kinds[0]}-count{sweep.count}"
    with open_results(flags, workdir, "sweeps", name, settings) as results:
        defaults = row_key(dataclasses.replace(config.sample, weights=kinds[0]), notes[0].step)
        rows = [_with_new_columns(row, defaults) for row in results.read_rows(real.measures)]
        measured = {_key(row) for row in rows}
        grid = sampler_grid(sweep, config.sample)
        combined = [
            (pair, dataclasses.replace(options, weights=pair[1]), found.step)
            for pair, found in zip(pairs, notes, strict=True)
            for options in grid
        ]
        # A value that is given twice is measured once.
        wanted = list({_key(row_key(*item[1:])): item for item in combined}.values())
        missing = [item for item in wanted if _key(row_key(*item[1:])) not in measured]
        print(
            f"{len(missing)} of {len(wanted)} samplers, {sweep.count} images each, from "
            f"{_in_words(notes, kinds)}, into {results.folder}"
        )
        print(real.text, flush=True)
        sampler_of = functools.cache(lambda options: _make_sampler(config, options, guide))
        with progress_bar(len(missing), "sampler") as bar:
            for pair, options, step in missing:
                shown = label(row_key(options, step))
                bar.set_postfix_str(shown)
                # The sampler takes weights as an argument: one is compiled for all of them.
                compiled = sampler_of(dataclasses.replace(options, weights="ema", checkpoint=None))
                try:
                    row = measure(*compiled, options, restore(*pair), real.evaluate)
                except UserError as error:  # this sampler's images are not finite; others may be
                    bar.write(f"warning: {shown}: {error}")
                else:
                    rows.append(row)
                    results.add_rows([row])
                bar.update()
        requested = {_key(row_key(*item[1:])) for item in wanted}
        rows = [row for row in rows if _key(row) in requested]
        rows.sort(key=lambda row: (row["cfg_scale"], row["networks"]))
        check(rows, "no sampler gave finite images; check whether training diverged")
        _write(results, rows, columns, real)


def _make_sampler(config: Config, options: Sample, guide: Guide | None) -> tuple[Setup, Sampler]:
    setup = set_up(dataclasses.replace(config, sample=options))
    return setup, make_sampler(setup, guide)


def _write(results: Results, rows: Sequence[Row], columns: Sequence[str], real: Real) -> None:
    results.write_text("table.csv", as_csv(rows, columns))
    text = as_markdown(rows, columns)
    results.write_text("table.md", text)
    if hosts.is_first():
        results.write_bytes("plot.png", plot(rows, real.measures, real.floor))
    print(text)
    for line in best_rows(rows, real.measures):
        print(line)
    print(f"plot: {results.folder / 'plot.png'}")


def _in_words(notes: Sequence[Weights], kinds: Sequence[str]) -> str:
    steps = ", ".join(dict.fromkeys(str(found.step) for found in notes))
    return f"{' and '.join(kinds)} weights of step {steps}"


def _with_new_columns(row: Row, defaults: Row) -> Row:
    """Return a row with the columns that an earlier version did not write."""
    if row["cfg_scale"] == 1:
        defaults = defaults | {"cfg_first": None, "cfg_last": None}
    return {name: row.get(name, defaults[name]) for name in KEY} | row


def _results_settings(
    setup: Setup,
    notes: Sequence[Weights],
    kinds: Sequence[str],
    guide: Guide | None,
    real: Real,
) -> dict[str, Any]:
    """Return every setting that the rows depend on, except those that identify a row."""
    sweep = setup.config.sweep
    settings = sampler_settings(setup, notes[0], guide) | dict(real.settings)
    settings["count"] = sweep.count
    if sweep.features == PIXELS:
        settings["components"] = sweep.components
    identify = ["solver", "steps", "rtol", "diffusion_form", "cfg_scale"]
    identify += ["cfg_interval"] * bool(sweep.cfg_intervals) + ["weights"] * bool(sweep.weights)
    for name in (*identify, "atol", "times", "frames", "labels"):
        del settings["sample"][name]
    if len(notes) > 1:  # otherwise as earlier versions
        settings["checkpoints"] = [[found.step, found.digest] for found in notes]
    return settings


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


JOB = Job(
    run,
    "compare checkpoints, guidance and samplers by quality and cost",
    flags=(OUT, REFERENCE),
    memory="sample.batch or sweep.count",
    check_batches=check_sample_batch,
    uses=(
        *NETWORK,
        *SAMPLER,
        "data.",
        "sweep.",
        "evaluate.",
        "sample.diffusion_norm",
        "sample.last_step",
        "sample.last_step_size",
    ),
)
