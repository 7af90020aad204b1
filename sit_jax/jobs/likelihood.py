"""`--mode likelihood`: log p and bits/dim of every image of a data set, under the newest checkpoint's ODE flow."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from sit_jax import hosts, rng, sharding, storage
from sit_jax.data import dequantise, pipeline
from sit_jax.data.sources import Source
from sit_jax.data.transforms import normalise
from sit_jax.errors import check
from sit_jax.jobs.setup import Setup, call_with_batches, check_batch, jit_for_batches, set_up
from sit_jax.jobs.train import open_source
from sit_jax.jobs.workdir import read_rows, restore_weights, results_folder
from sit_jax.sampling import density
from sit_jax.settings import Config
from sit_jax.transport.interval import Interval, ode_interval, train_interval
from sit_jax.transport.paths import time_of_noise
from sit_jax.transport.prediction import velocity_field


@dataclasses.dataclass(frozen=True)
class Continuous:
    """How images become what has a density, and how its log p becomes theirs."""

    encode: Callable[
        ..., tuple[jax.Array, jax.Array]
    ]  # (codec_params, keys_b, uint8 images) -> (x_bhwc, correction_b)
    interval: Interval  # of the flow from N(0, I) to x
    meaning: str  # of log p of x plus the correction


def continuous(setup: Setup) -> Continuous:
    """Dequantised pixels, or latents without their scale: of z = x / scale, log p(z) = log p(x) + d log scale."""
    transport, codec = setup.config.transport, setup.codec
    t0, t1 = ode_interval(setup.path, transport.prediction, transport.sample_eps)
    if setup.config.latents.codec != "pixels":
        correction = math.prod(setup.input_shape) * math.log(codec.scale)

        def encode(codec_params, keys_b, images_bhwc):
            x_bhwc = codec.encode(codec_params, keys_b, normalise(images_bhwc))
            return x_bhwc, jnp.full(len(x_bhwc), correction)

        meaning = f"density of the latents, their factor {codec.scale:g} taken out; continuous, so not dequantised"
        return Continuous(encode, (t0, t1), meaning)
    if setup.config.likelihood.dequantisation == "gaussian":
        trained = train_interval(setup.path, transport.prediction, transport.train_eps)
        t1 = min(time_of_noise(setup.path, dequantise.GAUSSIAN_NOISE), trained[1])
        alpha, sigma = (float(f(jnp.float32(t1))) for f in (setup.path.alpha, setup.path.sigma))
        meaning = f"lower bound of the 8-bit image's probability, dequantised by the Gaussian noise of t={t1:.6f}"
        return Continuous(
            lambda _, keys, images: dequantise.gaussian(keys, images, alpha, sigma),
            (t0, t1),
            meaning,
        )
    meaning = "lower bound of the 8-bit image's probability, dequantised uniformly"
    return Continuous(lambda _, keys, images: dequantise.uniform(keys, images), (t0, t1), meaning)


def make_log_prob(setup: Setup) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`(params, indices_b, images_bhwc uint8, labels_b) -> (log p [b] in nats, evaluations)`, compiled once.

    That of image i depends on (likelihood.seed, i, the image, its label) alone, whatever batch and devices it is in.
    """
    options, how = setup.config.likelihood, continuous(setup)

    def run(params, codec_params, indices_b, images_bhwc, labels_b):
        def keys_b(stream):
            return jax.vmap(lambda i: rng.key(options.seed, stream, i))(indices_b)

        y_b = labels_b if options.labels == "data" else jnp.full_like(labels_b, setup.null_label)
        x_bhwc, correction_b = how.encode(codec_params, keys_b("dequantisation"), images_bhwc)
        probes_nbhwc = None
        if options.trace == "hutchinson":
            probes_nbhwc = density.draw_probes(
                options.probe, keys_b("probe"), options.probes, setup.input_shape
            )
        log_prob_b, _, evaluations = density.log_prob(
            velocity_field(
                lambda x, t_b: setup.network(params, x, t_b, y_b),
                setup.path,
                setup.objective.prediction,
            ),
            jax.lax.with_sharding_constraint(x_bhwc, sharding.batch_sharding(setup.mesh)),
            how.interval,
            probes_nbhwc,
            solver=options.solver,
            steps=options.steps,
            atol=options.atol,
            rtol=options.rtol,
        )
        return log_prob_b + correction_b, evaluations

    out_shardings = sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh)
    return call_with_batches(setup, jit_for_batches(setup, run, out_shardings))


def evaluate(
    setup: Setup, source: Source, params: Any, indices: Sequence[int]
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yields (rows of the results, network evaluations) of the images at these indices, a batch at a time.

    The last batch is padded, and its padding dropped; so are images that cannot be read, where they may be skipped.
    """
    data, size = setup.config.data, setup.config.likelihood.batch
    shape = (data.image_size, data.image_size, data.channels)
    dataset = pipeline.in_order(
        source, indices, batch_size=size, skip_unreadable=data.skip_unreadable, shape=shape
    )
    log_prob, dimensions = make_log_prob(setup), math.prod(setup.input_shape)
    with contextlib.closing(pipeline.iterate(dataset, 0, workers=data.workers)) as batches:
        for batch in batches:
            n = len(batch["index"])
            padded = pipeline.pad(batch, size)
            found_b, evaluations = hosts.to_host(
                log_prob(params, padded["index"], padded["image"], padded["label"])
            )
            kept = [i for i in range(n) if not batch["skipped"][i]]
            bad = [int(batch["index"][i]) for i in kept if not np.isfinite(found_b[i])]
            check(
                not bad,
                f"log p of images {bad[:8]} is not finite; use more steps or looser tolerances, or look whether "
                "training diverged",
            )
            yield (
                [
                    {
                        "index": int(batch["index"][i]),
                        "label": int(batch["label"][i]),
                        "log_prob": float(found_b[i]),
                        "bits_per_dim": float(-found_b[i] / (dimensions * math.log(2))),
                    }
                    for i in kept
                ],
                int(evaluations),
            )


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the images, with their standard errors (null for a single one)."""
    summary = {"images": len(rows)}
    for name in ("log_prob", "bits_per_dim"):
        values = np.array([row[name] for row in rows])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        summary[name] = {"mean": float(values.mean()), "standard_error": error}
    return summary


def run(config: Config, workdir: epath.Path) -> None:
    """Writes workdir/likelihood/NAME/{results.jsonl, settings.json, summary.json}; rows that are there are kept."""
    options = config.likelihood
    data = dataclasses.replace(config.data, split=options.split or config.data.split)
    # The fused attention kernels of accelerators have no forward-mode derivative, which the divergence is.
    model = dataclasses.replace(config.model, attention="einsum")
    setup = set_up(dataclasses.replace(config, data=data, model=model))
    check_batch(setup.mesh, "likelihood.batch", options.batch)
    source = hosts.run_on_all(lambda: open_source(setup))
    count = len(source) if options.count is None else options.count
    check(
        count <= len(source),
        f"likelihood.count is {count}, but split {data.split!r} of the {data.source} source has {len(source)} images",
    )
    step, params = restore_weights(setup, workdir, options.weights)
    how = continuous(setup)
    settings = {
        "step": step,
        "log_prob": how.meaning,
        "data": dataclasses.asdict(data),
        "precision": dataclasses.asdict(config.precision),
    }
    settings |= {
        "transport": dataclasses.asdict(config.transport),
        "likelihood": dataclasses.asdict(options),
    }
    for section, keys in (
        ("likelihood", ("count", "batch")),
        ("data", ("workers", "flip", "skip_unreadable")),
    ):
        for key in keys:  # these change no image's log p
            del settings[section][key]
    trace = "exact" if options.trace == "exact" else f"{options.probe}{options.probes}"
    name = f"step{step}-{options.weights}-{data.split}-{options.solver}-{trace}-seed{options.seed}"
    folder = results_folder(workdir / "likelihood", name, settings)
    results = folder / "results.jsonl"
    rows = hosts.broadcast_from_first(lambda: read_rows(results))
    there = {row["index"] for row in rows}
    missing = [index for index in range(count) if index not in there]
    print(
        f"log p of {len(missing)} of {count} images of split {data.split!r} under step {step}, into {folder}"
    )
    print(f"unguided; {how.meaning}", flush=True)
    with tqdm(total=len(missing), unit="image", disable=hosts.tqdm_disabled()) as bar:
        for new, evaluations in evaluate(setup, source, params, missing):
            if hosts.is_first():
                storage.append_text(results, "".join(json.dumps(row) + "\n" for row in new))
            rows += new
            bar.update(min(options.batch, len(missing) - bar.n))
            bar.set_postfix(evaluations=evaluations)
    rows = [row for row in rows if row["index"] < count]
    check(rows, f"none of the {count} images can be read; check data.path")
    summary = summarise(rows) | {"unreadable": count - len(rows), "meaning": how.meaning}
    if hosts.is_first():
        storage.write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, unit in (("log_prob", "log p"), ("bits_per_dim", "bits/dim")):
        mean, error = summary[name]["mean"], summary[name]["standard_error"]
        print(
            f"{unit}: {mean:.4f}"
            + (f" +- {error:.4f} (standard error)" if error is not None else "")
        )
    print(
        f"{len(rows)} images"
        + (f", {count - len(rows)} unreadable ones left out" if len(rows) < count else "")
    )
