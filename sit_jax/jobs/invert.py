"""`--mode invert`: map images of the data set to noise along the sampler's ODE, and back."""

import argparse
import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sit_jax import hosts
from sit_jax.data import pipeline
from sit_jax.errors import check
from sit_jax.image_io import sheet, to_uint8
from sit_jax.jobs.data import (
    check_images,
    check_same_classes,
    digests,
    draw,
    kind_of_draw,
    open_source,
    read_in_order,
    record_settings,
)
from sit_jax.jobs.job import NETWORK, SAMPLER, SHEET, Job, Overrides
from sit_jax.jobs.results import OUT, Results, open_results, progress_bar
from sit_jax.jobs.sampler import make_inverter, open_guide, sampler_name, sampler_settings
from sit_jax.jobs.setup import Setup, check_sample_batch, set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.record import Record
from sit_jax.sampling import sde
from sit_jax.settings import Config
from sit_jax.storage import write_bytes


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Invert sample.count images of data.split, a random draw, into workdir/inversions/NAME.

    For each image, numbered in the order of the draw: 000000.npz with `noise` [h, w, c] as the
    network sees it, `label`, the RMS `error` of the round trip, and `index` and `sha256` of the
    image in the source; images/000000.png, the image beside its reconstruction. For all: sheet.png,
    settings.json and summary.json. Images that already exist are kept, unless they have changed.
    """
    setup = set_up(config)
    check_images(setup)
    check_sample_batch(setup)
    options = config.sample
    check(
        options.solver not in sde.SOLVERS,
        f"sample.solver {options.solver!r} solves an SDE, which cannot be run backwards; give one "
        "of an ODE, such as dopri5",
    )
    source = hosts.run_on_all(lambda: open_source(setup))
    drawn = draw(setup, source, options.count)
    count = len(drawn)
    weights = restore_weights(setup, workdir, options.weights, options.checkpoint)
    check_same_classes(weights.note, source)
    guide = open_guide(config)
    settings = sampler_settings(setup, weights, guide)
    settings["data"] = record_settings(config.data, source)
    with open_results(
        flags, workdir, "inversions", sampler_name(options, weights.step), settings
    ) as results:
        stored = digests(source, drawn, skip_unreadable=False)
        missing = _missing(results, drawn, stored)
        print(
            f"inverting {len(missing)} of {count} images of split {config.data.split!r} under step "
            f"{weights.step}, into {results.folder}"
        )
        if count < options.count:
            print(f"sample.count is {options.count}, but these are all that there are")
        else:
            print(f"they are {kind_of_draw(source)} of {len(source):,}")
        position_of = {index: position for position, index in enumerate(drawn)}
        indices = [drawn[position] for position in missing]
        batches = read_in_order(setup, source, indices, setup.sample_batch, skip_unreadable=False)
        invert = make_inverter(setup, guide)
        with progress_bar(len(missing), "image") as bar:
            for batch in batches:
                size = len(batch["index"])
                noise_bhwc, images_bhwc, error_b, evaluations = _invert(
                    setup, invert, weights.params, batch
                )
                for row in results.own_rows(size):
                    position = position_of[int(batch["index"][row])]
                    entry = {name: batch[name][row] for name in ("label", "index")}
                    entry |= {"noise": noise_bhwc[row], "error": error_b[row]}
                    entry["sha256"] = stored[position]
                    pair = np.stack([batch["image"][row], to_uint8(images_bhwc[row])])
                    _write(results, position, entry, pair)
                bar.update(size)
                bar.set_postfix(evaluations=evaluations)
        results.finish_images(count, config)
        if hosts.is_first():
            _write_summary(results, count, len(source))


def _invert(
    setup: Setup, invert: Callable, params: Any, batch: Record
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Return noise, reconstructions, errors and evaluations of a batch, which may be short.

    Raises `UserError` if a trajectory is not finite.
    """
    size = len(batch["index"])
    padded = pipeline.pad(batch, setup.sample_batch)
    condition = setup.conditioning.from_records(padded)
    noise_bhwc, images_bhwc, error_b, evaluations = hosts.to_host(
        invert(params, padded["index"], padded, condition)
    )
    bad = batch["index"][~np.isfinite(error_b[:size])]
    check(
        not len(bad),
        f"images {bad[:8].tolist()} cannot be inverted: their trajectory is not finite; "
        "use more steps or looser tolerances",
    )
    return noise_bhwc[:size], images_bhwc[:size], error_b[:size], int(evaluations)


def _missing(results: Results, drawn: Sequence[int], stored: Sequence[str | None]) -> list[int]:
    """Return the positions in the draw that have no result, or one of another image."""

    def remove_outdated() -> None:
        for position in set(range(len(drawn))) - absent:
            if _image_of(results, position) != (drawn[position], stored[position]):
                results.remove_image(position)

    absent = set(results.missing_images(len(drawn)))
    hosts.broadcast_from_first(remove_outdated)
    return results.missing_images(len(drawn))


def _write(
    results: Results, position: int, entry: Mapping[str, Any], pair_bhwc: np.ndarray
) -> None:
    """Write the .npz file of a position in the draw, then the image and its reconstruction."""
    file = io.BytesIO()
    np.savez(file, **entry)
    write_bytes(_entry_file(results, position), file.getvalue())
    results.write_image(position, sheet(pair_bhwc, 2))


def _read_entry(results: Results, position: int) -> Mapping[str, np.ndarray]:
    return np.load(io.BytesIO(_entry_file(results, position).read_bytes()))


def _image_of(results: Results, position: int) -> tuple[int, str] | None:
    """Return the index and digest of the image that was inverted; None if its file is damaged."""
    try:
        entry = _read_entry(results, position)
        return int(entry["index"]), str(entry["sha256"])
    # A damaged file of NumPy's may raise any of these, or EOFError.
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile):
        return None


def _entry_file(results: Results, position: int) -> epath.Path:
    return results.folder / f"{position:06d}.npz"


def _write_summary(results: Results, count: int, of: int) -> None:
    """Write summary.json and print it. Only process 0 calls this."""
    entries = [_read_entry(results, position) for position in range(count)]
    errors = np.stack([entry["error"] for entry in entries])
    noise = np.stack([entry["noise"] for entry in entries])
    results.write_summary(
        {
            "images": count,
            "of": of,
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


def _refuse_unused_settings(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Raise `UserError` for settings of samples that mean nothing for images of the data set."""
    own_labels = "which inverts images of the data set under their own labels"
    reasons = {
        "sample.labels": own_labels,
        "sample.label_draw": own_labels,
        "sample.labels_file": own_labels,
        "sample.frames": "which writes only the noise and the reconstruction",
    }
    for key, _ in overrides:
        check(
            key not in reasons,
            f"--config.{key} has no effect on --mode invert, {reasons.get(key)}; leave it out",
        )


JOB = Job(
    run,
    "map images of the data set to noise along the ODE, and back",
    flags=(OUT,),
    memory="sample.batch or sample.count",
    check_batches=check_sample_batch,
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
    check=_refuse_unused_settings,
)
