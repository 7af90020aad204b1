"""How many samples of a digits run look like their label to a classifier trained on the real training half.

    python tests/benchmarks/digits_quality.py --workdir runs/digits

Draws 200 samples with balanced labels from the newest checkpoint's EMA, with the config's guidance and without, and
asks a scikit-learn SVC. Writes WORKDIR/digits.png, the sheet of the guided ones. Exits with 1 below 97 % guided or 95
% unguided.
"""

import argparse
import dataclasses
import sys
import time

import numpy as np
from etils import epath

from sit_jax import config as config_lib
from sit_jax import main, storage
from sit_jax.data.sources import open_source
from sit_jax.errors import UserError
from sit_jax.image_io import encode_png, sheet
from sit_jax.jobs import sampler
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import restore_weights
from sit_jax.metrics.pixels import as_features, fit_classifier
from sit_jax.settings import Config

COUNT = 200


def real_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(features, labels) of a half of the data set."""
    source = open_source("digits", path=None, image_size=8, channels=1, split=split)
    records = [source[i] for i in range(len(source))]
    return as_features(np.stack([r["image"] for r in records])), np.stack(
        [r["label"] for r in records]
    )


def draw(
    config: Config, workdir: epath.Path, cfg_scale: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(uint8 images, labels, seconds) of COUNT samples."""
    options = dataclasses.replace(config.sample, cfg_scale=cfg_scale, labels=())
    setup = set_up(dataclasses.replace(config, sample=options))
    _, params = restore_weights(setup, workdir, "ema")
    began, indices = time.perf_counter(), np.arange(COUNT)
    batches = [
        images[:, -1]
        for _, images, _ in sampler.sample_images(
            setup, sampler.make_sampler(setup), params, indices
        )
    ]
    return np.concatenate(batches), sampler.labels_of(setup, indices), time.perf_counter() - began


def run(workdir: epath.Path) -> bool:
    """Prints the report; True if both figures reach their bars."""
    config = config_lib.load(str(workdir / "config.json"))
    guided = config.sample.cfg_scale
    judge = fit_classifier(*real_digits("train"))
    print(
        f"the SVC reads {judge.score(*real_digits('test')):.1%} of the real digits it has not seen"
    )
    passed = True
    for scale, bar in ((guided, 0.97), (1.0, 0.95)):
        images, labels, seconds = draw(config, workdir, scale)
        agreement = np.mean(judge.predict(as_features(images)) == labels)
        passed &= agreement >= bar
        print(
            f"cfg {scale:g}: {agreement:.1%} of {COUNT} samples read as their label (bar {bar:.0%}), {seconds:.1f} s"
        )
        if scale == guided:
            storage.write_bytes(
                workdir / "digits.png", encode_png(sheet(images[:100], 10, scale=6))
            )
    print(f"sheet: {workdir / 'digits.png'}")
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", required=True, help="the workdir of a finished configs/digits.py run"
    )
    main.use_compilation_cache()
    try:
        sys.exit(0 if run(epath.Path(parser.parse_args().workdir)) else 1)
    except UserError as error:
        sys.exit(f"error: {error}")
