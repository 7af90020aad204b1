"""`--mode invert`: map images of the data set to noise along the sampler's ODE, and back."""

import argparse
import io

import numpy as np
from etils import epath

from sit_jax import hosts
from sit_jax.data import pipeline
from sit_jax.errors import check
from sit_jax.image_io import sheet, to_uint8
from sit_jax.jobs.data import check_same_classes, open_source, read_in_order
from sit_jax.jobs.job import NETWORK, SAMPLER, SHEET, Job
from sit_jax.jobs.results import Results, progress_bar
from sit_jax.jobs.sampler import make_inverter, open_guide, sampler_name, sampler_settings
from sit_jax.jobs.setup import check_sample_batch, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.sampling import sde
from sit_jax.settings import Config
from sit_jax.storage import write_bytes


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Invert the first sample.count images of data.split into workdir/inversions/NAME.

    For each image: 000000.npz with `noise` [h, w, c] as the network sees it, `label`, and the RMS
    `error` of the round trip; 000000.png, the image beside its reconstruction. For all: sheet.png,
    settings.json and summary.json. Images that already exist are kept.
    """
    setup = set_up(config)
    check_sample_batch(setup)
    options = config.sample
    check(
        options.solver not in sde.SOLVERS,
        f"sample.solver {options.solver!r} solves an SDE, which cannot be run backwards; give one "
        "of an ODE, such as dopri5",
    )
    source = hosts.run_on_all(lambda: open_source(setup))
    count = min(options.count, len(source))
    weights = restore_weights(setup, workdir, options.weights)
    check_same_classes(weights.note, source)
    guide = open_guide(config)
    settings = sampler_settings(setup, weights, guide)
    settings |= {"data_path": config.data.path, "split": config.data.split}
    results = Results(workdir / "inversions", sampler_name(options, weights.step), settings)
    missing = results.missing_images(count)
    print(
        f"inverting {len(missing)} of {count} images of split {config.data.split!r} under step "
        f"{weights.step}, into {results.folder}"
    )
    invert = make_inverter(setup, guide)
    batches = read_in_order(setup, source, missing, options.batch, skip_unreadable=False)
    with progress_bar(len(missing), "image") as bar:
        for batch in batches:
            size = len(batch["index"])
            padded = pipeline.pad(batch, options.batch)
            condition = setup.conditioning.from_records(padded)
            noise_bhwc, reconstructed_bhwc, error_b, evaluations = hosts.to_host(
                invert(weights.params, padded["index"], padded, condition)
            )
            bad = batch["index"][~np.isfinite(error_b[:size])]
            check(
                not len(bad),
                f"images {bad[:8].tolist()} cannot be inverted: their trajectory is not finite; "
                "use more steps or looser tolerances",
            )
            for row in results.own_rows(size):
                _write_noise(results, batch, row, noise_bhwc[row], error_b[row])
                pair = np.stack([batch["image"][row], to_uint8(reconstructed_bhwc[row])])
                results.write_image(int(batch["index"][row]), sheet(pair, 2))
            bar.update(size)
            bar.set_postfix(evaluations=int(evaluations))
    results.finish_images(count, config)
    if hosts.is_first():
        _write_summary(results, count)


def _write_noise(
    results: Results, batch: dict[str, np.ndarray], row: int, noise: np.ndarray, error: np.ndarray
) -> None:
    """Write the .npz file of one row of a batch."""
    file = io.BytesIO()
    np.savez(file, noise=noise, label=batch["label"][row], error=error)
    write_bytes(_noise_file(results, int(batch["index"][row])), file.getvalue())


def _noise_file(results: Results, index: int) -> epath.Path:
    return results.folder / f"{index:06d}.npz"


def _write_summary(results: Results, count: int) -> None:
    """Write summary.json and print it. Only process 0 calls this."""
    files = [_noise_file(results, index) for index in range(count)]
    entries = [np.load(io.BytesIO(file.read_bytes())) for file in files]
    errors = np.stack([entry["error"] for entry in entries])
    noise = np.stack([entry["noise"] for entry in entries])
    results.write_summary(
        {
            "images": count,
            "round_trip_rms": {"mean": float(errors.mean()), "largest": float(errors.max())},
            "noise": {"mean": float(noise.mean()), "standard_deviation": float(noise.std())},
        }
    )
    print(
        f"round trip: RMS error {errors.mean():.2e}, largest {errors.max():.2e}, where images span "
        "[-1, 1]"
    )
    print(f"noise: mean {noise.mean():.3f}, standard deviation {noise.std():.3f}")
    print(f"images beside their reconstructions: {results.folder / 'sheet.png'}")


JOB = Job(
    run,
    "map images of the data set to noise along the ODE, and back",
    memory="sample.batch or sample.count",
    uses=(
        *NETWORK,
        *SAMPLER,
        *SHEET,
        "data.",
        "sample.solver",
        "sample.steps",
        "sample.times",
        "sample.atol",
        "sample.rtol",
        "sample.cfg_scale",
        "sample.count",
    ),
)
