"""`--mode invert`: images of the data set to their noise along the sampler's ODE, and back again."""

import contextlib
import io
import json

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, storage
from sit_jax.data import pipeline
from sit_jax.errors import check
from sit_jax.image_io import ImageWriter, encode_png, sheet, to_uint8
from sit_jax.jobs.sampler import make_inverter, open_guide, sampler_name, sampler_settings
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.train import open_source
from sit_jax.jobs.workdir import restore_weights, results_folder
from sit_jax.sampling import sde
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path) -> None:
    """The first sample.count images of data.split into workdir/inversions/NAME; what is there is not made again.

    For each: 000000.npz with `noise` [h, w, c] as the network sees it, `label`, and the RMS `error` of the round trip;
    000000.png, the image beside what came back. For all: sheet.png, settings.json, and summary.json.
    """
    setup, options = set_up(config), config.sample
    check(
        options.solver not in sde.SOLVERS,
        f"sample.solver {options.solver!r} solves an SDE, which cannot be run backwards; give one of an ODE, such as "
        "dopri5",
    )
    source = hosts.run_on_all(lambda: open_source(setup))
    count = min(options.count, len(source))
    step, params = restore_weights(setup, workdir, options.weights)
    weak = open_guide(config)
    settings = sampler_settings(config, step, weak) | {
        "data_path": config.data.path,
        "split": config.data.split,
    }
    folder = results_folder(workdir / "inversions", sampler_name(options, step), settings)
    writer = ImageWriter(folder)
    missing = hosts.broadcast_from_first(lambda: writer.missing(count))
    print(
        f"inverting {len(missing)} of {count} images of split {config.data.split!r} under step {step}, into {folder}"
    )
    size, shape = (
        options.batch,
        (config.data.image_size, config.data.image_size, config.data.channels),
    )
    dataset = pipeline.in_order(
        source, missing, batch_size=size, skip_unreadable=False, shape=shape
    )
    invert = make_inverter(setup, weak)
    with (
        contextlib.closing(pipeline.iterate(dataset, 0, workers=config.data.workers)) as batches,
        tqdm(total=len(missing), unit="image", disable=hosts.tqdm_disabled()) as bar,
    ):
        for batch in batches:
            padded = pipeline.pad(batch, size)
            made = hosts.to_host(invert(params, padded["index"], padded["image"], padded["label"]))
            for i, (index, image, label) in enumerate(
                zip(batch["index"], batch["image"], batch["label"], strict=True)
            ):
                noise, again, error = (array[i] for array in made[:3])
                check(
                    np.isfinite(error),
                    f"image {index} does not come back: the way is not finite; use more steps or looser tolerances",
                )
                if (
                    i % jax.process_count() != jax.process_index()
                ):  # every process has all, and writes some
                    continue
                file = io.BytesIO()
                np.savez(file, noise=noise, label=label, error=error)
                storage.write_bytes(folder / f"{index:06d}.npz", file.getvalue())
                writer.write(int(index), sheet(np.stack([image, to_uint8(again)]), 2))
            bar.update(len(batch["index"]))
            bar.set_postfix(evaluations=int(made[3]))
    hosts.gather(None)  # now all are there
    if hosts.is_first():
        _summarise(folder, writer, count, config)


def _summarise(folder: epath.Path, writer: ImageWriter, count: int, config: Config) -> None:
    found = [
        np.load(io.BytesIO((folder / f"{index:06d}.npz").read_bytes())) for index in range(count)
    ]
    errors, noise = (
        np.stack([entry["error"] for entry in found]),
        np.stack([entry["noise"] for entry in found]),
    )
    summary = {
        "images": count,
        "round_trip_rms": {"mean": float(errors.mean()), "largest": float(errors.max())},
        "noise": {"mean": float(noise.mean()), "standard_deviation": float(noise.std())},
    }
    storage.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    shown = [writer.read(index) for index in range(min(count, config.log.sheet_count))]
    image = sheet(np.stack(shown), config.sample.columns, scale=config.sample.scale)
    storage.write_bytes(folder / "sheet.png", encode_png(image))
    print(
        f"round trip: RMS error {errors.mean():.2e}, largest {errors.max():.2e}, where images span [-1, 1]"
    )
    print(f"noise: mean {noise.mean():.3f}, standard deviation {noise.std():.3f}")
    print(f"images beside what came back: {folder / 'sheet.png'}")
