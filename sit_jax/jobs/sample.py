"""`--mode sample`: images from a run's newest checkpoint, as single PNGs and one sheet."""

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, storage
from sit_jax.image_io import ImageWriter, encode_png, sheet
from sit_jax.jobs.sampler import (
    make_sampler,
    make_sheet,
    open_guide,
    sample_images,
    sampler_name,
    sampler_settings,
)
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import restore_weights, results_folder
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path) -> None:
    """Writes workdir/samples/NAME/{000000.png, ..., sheet.png, settings.json}; what is there is not made again.

    With sample.frames also NAME/frames/000000.png, ...: each sample's way from noise, left to right.
    """
    setup, options = set_up(config), config.sample
    step, params = restore_weights(setup, workdir, options.weights)
    weak = open_guide(config)
    folder = results_folder(
        workdir / "samples", sampler_name(options, step), sampler_settings(config, step, weak)
    )
    writer = ImageWriter(folder)
    frames = ImageWriter(folder / "frames") if options.frames else None
    missing = np.asarray(hosts.broadcast_from_first(lambda: writer.missing(options.count)))
    print(
        f"sampling {len(missing)} of {options.count} images from step {step} into {folder}",
        flush=True,
    )
    with tqdm(total=len(missing), unit="image", disable=hosts.tqdm_disabled()) as bar:
        for indices, images_bfhwc, evaluations in sample_images(
            setup, make_sampler(setup, weak), params, missing
        ):
            share = slice(
                jax.process_index(), None, jax.process_count()
            )  # every process has all, and writes some
            for index, images in zip(indices[share], images_bfhwc[share], strict=True):
                if frames:  # before the sample itself, which says that all of it is there
                    frames.write(int(index), sheet(images, len(images), scale=options.scale))
                writer.write(int(index), images[-1])
            bar.update(len(indices))
            bar.set_postfix(evaluations=evaluations)
    hosts.gather(None)  # now all are there
    if hosts.is_first():
        shown = [writer.read(index) for index in range(min(options.count, config.log.sheet_count))]
        storage.write_bytes(folder / "sheet.png", encode_png(make_sheet(setup, np.stack(shown))))
    if len(missing):
        print(
            f"{evaluations} evaluations of the velocity"
            + (", two networks each" if options.cfg_scale > 1 else "")
        )
    print(f"sheet: {folder / 'sheet.png'}")
