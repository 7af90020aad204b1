"""`--mode sample`: images from a run's newest checkpoint, as single PNGs and one sheet."""

import argparse

import numpy as np
from etils import epath

from sit_jax import hosts, storage
from sit_jax.image_io import ImageWriter, sheet
from sit_jax.jobs.data import check_trained_encoder
from sit_jax.jobs.job import NETWORK, Job
from sit_jax.jobs.results import OUT, open_results, progress_bar
from sit_jax.jobs.sampler import (
    labels_of,
    make_sampler,
    open_guide,
    sample_images,
    sampler_name,
    sampler_settings,
    to_latents,
)
from sit_jax.jobs.setup import check_sample_batch, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/samples/NAME/{000000.png, ..., sheet.png, settings.json}.

    Images that already exist are kept. With sample.frames, NAME/frames/000000.png, ... show each
    sample's trajectory from noise, left to right. A codec without a decoder gives images in false
    colours, and NAME/samples.npz with the latents `arr_0` [n, h, w, c] and their `labels`.
    """
    setup = set_up(config)
    check_sample_batch(setup)
    options = config.sample
    weights = restore_weights(setup, workdir, options.weights)
    check_trained_encoder(setup, weights.note)
    guide = open_guide(config)
    settings = sampler_settings(setup, weights, guide)
    with open_results(
        flags, workdir, "samples", sampler_name(options, weights.step), settings
    ) as results:
        frames = None
        if options.frames:
            frames = ImageWriter(results.folder / "frames")
            hosts.broadcast_from_first(lambda: storage.clean_up(results.folder / "frames"))
        missing = np.asarray(results.missing_images(options.count))
        print(
            f"sampling {len(missing)} of {options.count} images from step {weights.step} into "
            f"{results.folder}",
            flush=True,
        )
        sampler = make_sampler(setup, guide)
        batches = sample_images(setup, sampler, weights.params, missing)
        with progress_bar(len(missing), "image") as bar:
            for batch in batches:
                for row in results.own_rows(len(batch.indices)):
                    index = int(batch.indices[row])
                    strip_fhwc = batch.images_bfhwc[row]
                    # Both before the sample's own image, which marks it as complete.
                    if frames:
                        frames.write(index, sheet(strip_fhwc, len(strip_fhwc), scale=options.scale))
                    if batch.x_bfhwc is not None:
                        latent_hwc = to_latents(weights.note, batch.x_bfhwc[row, -1])
                        results.write_array(index, latent_hwc)
                    results.write_image(index, strip_fhwc[-1])
                bar.update(len(batch.indices))
                bar.set_postfix(evaluations=batch.evaluations)
        results.finish_images(options.count, config)
        if len(missing):
            networks = ", two networks each" if options.cfg_scale > 1 else ""
            print(f"{batch.evaluations} evaluations of the velocity{networks}")
        print(f"sheet: {results.folder / 'sheet.png'}")
        if not setup.codec.has_decoder:
            labels = labels_of(setup, np.arange(options.count))
            results.write_arrays("samples.npz", options.count, labels)
            print(f"latents: {results.folder / 'samples.npz'}; the sheet shows false colours")


JOB = Job(
    run,
    "draw images from a run's newest checkpoint, as PNG files and a sheet",
    memory="sample.batch or sample.count",
    check_batches=check_sample_batch,
    uses=(*NETWORK, "sample.", "log.sheet_count"),
    flags=(OUT,),
)
