"""`--mode sample`: images from a checkpoint of a run, as PNGs or one .npz, and a sheet."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sit_jax.jobs.data import check_trained_encoder
from sit_jax.jobs.job import NETWORK, Job
from sit_jax.jobs.parts import JOINED
from sit_jax.jobs.results import OUT, SUMMARY, open_results, progress_bar
from sit_jax.jobs.sample_files import SampleFiles
from sit_jax.jobs.sampler import (
    check_label_count,
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_name,
    sampler_settings,
    whole_microbatches,
)
from sit_jax.jobs.setup import check_sample_batch, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.settings import Config


class Drawn(NamedTuple):
    """The samples of a run, on the disk."""

    images: epath.Path  # a folder of PNGs, or samples.npz
    name: str
    labels: np.ndarray  # int32 [sample.count]
    settings: Mapping[str, Any]  # that they depend on
    evaluations: int | None  # of the network, in the last batch drawn; None: not recorded
    config: Config  # with the step of the checkpoint


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/samples/NAME/{images/000000.png, ..., samples.npz, sheet.png, settings.json}.

    sample.format says which of PNGs and samples.npz. Samples that already exist are kept. With
    sample.frames, NAME/frames/000000.png, ... show each sample's trajectory from noise, left to
    right. A codec without a decoder gives images in false colours, and samples.npz with latents.
    """
    draw_samples(config, workdir, flags)


def draw_samples(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> Drawn:
    """Draw the samples that do not exist yet, as `run` does, and return where all of them are."""
    setup = set_up(config)
    check_sample_batch(setup)
    check_label_count(setup)
    options = config.sample
    weights = restore_weights(setup, workdir, options.weights, options.checkpoint)
    check_trained_encoder(setup, weights.note)
    guide = open_guide(config)
    settings = sampler_settings(setup, weights, guide)
    with open_results(
        flags, workdir, "samples", sampler_name(options, weights.step), settings
    ) as results:
        files = SampleFiles(setup, results, weights.note)
        missing = files.missing()
        print(
            f"sampling {len(missing)} of {options.count} images from step {weights.step} into "
            f"{results.folder}",
            flush=True,
        )
        sampler = make_sampler(setup, guide)
        indices, is_missing = whole_microbatches(setup, missing, options.count)
        evaluations = 0
        with progress_bar(len(missing), "image") as bar:
            done = 0
            for batch in sample_images(setup, sampler, weights.params, indices):
                is_missing_b = is_missing[done : done + len(batch.indices)]
                files.write(batch, is_missing_b)
                done += len(batch.indices)
                evaluations = batch.evaluations
                bar.update(int(is_missing_b.sum()))
                bar.set_postfix(evaluations=evaluations)
        files.finish(len(missing))
        if len(missing):
            results.write_summary({"evaluations": evaluations})
            networks = ", two networks each" if options.cfg_scale > 1 else ""
            print(f"{evaluations} evaluations of the velocity{networks}")
        print(f"sheet: {results.folder / 'sheet.png'}")
        if not setup.codec.has_decoder:
            print(f"latents: {results.folder / JOINED}; the sheet shows false colours")
        elif options.format != "png":
            print(f"images: {results.folder / JOINED}")
    return Drawn(
        results.folder / ("images" if options.format == "png" else JOINED),
        results.folder.name,
        labels_of(setup, np.arange(options.count)),
        settings,
        _recorded_evaluations(results.folder),
        dataclasses.replace(config, sample=dataclasses.replace(options, checkpoint=weights.step)),
    )


def _recorded_evaluations(folder: epath.Path) -> int | None:
    path = folder / SUMMARY
    return json.loads(path.read_text())["evaluations"] if path.exists() else None


JOB = Job(
    run,
    "draw images from a checkpoint of a run, as PNG files or one .npz, and a sheet",
    memory="sample.batch or sample.count",
    check_batches=check_sample_batch,
    uses=(*NETWORK, "sample.", "log.sheet_count"),
    flags=(OUT,),
)
