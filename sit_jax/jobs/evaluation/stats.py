"""`--mode stats`: statistics of real images, in the .npz form of ADM's evaluation suite."""

import argparse
import itertools

from etils import epath

from sit_jax import hosts
from sit_jax.errors import check
from sit_jax.image_io import write_npz
from sit_jax.jobs.evaluation import recipe
from sit_jax.jobs.evaluation.feature_sets import PIXELS
from sit_jax.jobs.evaluation.references import (
    REFERENCE,
    open_reference,
    open_spaces,
    statistics_arrays,
)
from sit_jax.jobs.job import Job
from sit_jax.jobs.results import OUT, open_results
from sit_jax.jobs.setup import set_up
from sit_jax.settings import Config


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write stats/NAME/{inception.npz, ..., settings.json} below the workdir or --out.

    Each .npz file holds the mean `mu` and the covariance `sigma` of all images' features, and the
    kept images as `arr_0`. That of Inception also has `mu_s` and `sigma_s` of the spatial features.
    """
    setup = set_up(config)
    check(
        PIXELS not in config.evaluate.features,
        "evaluate.features holds pixels, whose components are fitted to the reference each time; "
        "name a network, such as inception",
    )
    reference = open_reference(setup, flags.reference)
    check(
        reference.statistics is None,
        f"{reference.place!r} already holds statistics; give the images",
    )
    spaces = open_spaces(setup, reference)
    assert reference.images is not None
    settings = {
        "images": reference.place,
        "shape": list(reference.images.shape),
        "count": reference.images.count,
        "kept": config.evaluate.kept,
        "seed": config.data.subset_seed,
        "spaces": recipe.describe_spaces(spaces),
    }
    name = config.data.source if flags.reference is None else epath.Path(reference.place).stem
    with open_results(flags, workdir, "stats", name, settings) as results:
        for space in spaces:
            features = reference.features(space)
            path = results.folder / f"{space.name}.npz"
            if hosts.is_first():
                arrays = statistics_arrays(features)
                # Read again: all of them at once could fill the memory.
                kept = itertools.chain.from_iterable(reference.images.read(reference.kept))
                write_npz(path, len(reference.kept), kept, **arrays)
            print(f"{features.count:,} images: {path}", flush=True)


JOB = Job(
    run,
    "statistics of real images, for --reference of evaluate, as ADM's .npz files",
    memory="evaluate.batch",
    uses=("data.", "mesh.", "evaluate."),
    flags=(OUT, REFERENCE),
    instead_of_workdir=("reference",),
)
