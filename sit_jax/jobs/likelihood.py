"""`--mode likelihood`: log p and bits/dim of each image of a data set, under the ODE flow."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sit_jax import hosts, rng, sharding
from sit_jax.data import pipeline
from sit_jax.data.source import Source
from sit_jax.errors import check
from sit_jax.jobs.data import (
    check_same_classes,
    digests,
    draw,
    kind_of_draw,
    open_source,
    read_in_order,
    record_settings,
)
from sit_jax.jobs.job import NETWORK, Job, Overrides
from sit_jax.jobs.results import OUT, Results, Row, open_results, progress_bar
from sit_jax.jobs.setup import Setup, call_with_batches, check_batch, jit_for_batches, set_up
from sit_jax.jobs.workdir import Weights, restore_weights
from sit_jax.latents import dequantise
from sit_jax.sampling import density
from sit_jax.settings import Config
from sit_jax.transport.interval import Interval, ode_interval, train_interval
from sit_jax.transport.paths import time_of_noise
from sit_jax.transport.prediction import velocity_field


@dataclasses.dataclass(frozen=True)
class DensityTarget:
    """Maps records to a continuous x, and log p(x) to the records' log-likelihood."""

    # (codec_params, keys_b, records) -> (x_bhwc, correction_b)
    encode: Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]
    interval: Interval  # of the flow from N(0, I) to x
    meaning: str  # of log p(x) plus the correction


def density_target(setup: Setup) -> DensityTarget:
    """Return dequantised pixels, or latents in units of the encoder's output.

    For latents, x is z times the codec's scale, so log p(z) = log p(x) + dimensions * log(scale).
    """
    transport = setup.config.transport
    codec = setup.codec
    t0, t1 = ode_interval(setup.path, transport.prediction, transport.sample_eps)
    if not codec.quantised:
        correction = math.prod(setup.input_shape) * math.log(codec.scale)

        def encode(codec_params: Any, keys_b: jax.Array, records: Any) -> tuple:
            x_bhwc = codec.encode(codec_params, keys_b, records)
            return x_bhwc, jnp.full(len(x_bhwc), correction)

        meaning = (
            f"density of the latents, their factor {codec.scale:g} taken out; continuous, so not "
            "dequantised"
        )
        return DensityTarget(encode, (t0, t1), meaning)
    if setup.config.likelihood.dequantisation == "gaussian":
        trained = train_interval(setup.path, transport.prediction, transport.train_eps)
        t1 = min(time_of_noise(setup.path, dequantise.GAUSSIAN_NOISE), trained[1])
        alpha = float(setup.path.alpha(jnp.float32(t1)))
        sigma = float(setup.path.sigma(jnp.float32(t1)))
        meaning = (
            "lower bound of the 8-bit image's probability, dequantised by the Gaussian noise of "
            f"t={t1:.6f}"
        )
        return DensityTarget(
            lambda _, keys, records: dequantise.gaussian(keys, records["image"], alpha, sigma),
            (t0, t1),
            meaning,
        )
    return DensityTarget(
        lambda _, keys, records: dequantise.uniform(keys, records["image"]),
        (t0, t1),
        "lower bound of the 8-bit image's probability, dequantised uniformly",
    )


def make_log_prob(setup: Setup) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return `(params, indices_b, records, condition) -> (log p [b] in nats, evaluations)`.

    It is compiled once. Image i's value depends only on (likelihood.seed, i, the image, its
    condition), not on the batch or the devices.
    """
    options = setup.config.likelihood
    target = density_target(setup)
    network = setup.network_for("measurement")

    def log_prob(
        params: Any, codec_params: Any, indices_b: jax.Array, records: Any, condition: Any
    ) -> tuple[jax.Array, jax.Array]:
        def keys_b(stream: str) -> jax.Array:
            return jax.vmap(lambda i: rng.key(options.seed, stream, i))(indices_b)

        if options.labels == "null":
            condition = setup.conditioning.null_like(condition)
        x_bhwc, correction_b = target.encode(codec_params, keys_b("dequantisation"), records)
        probes_nbhwc = None
        if options.trace == "hutchinson":
            probes_nbhwc = density.draw_probes(
                options.probe, keys_b("probe"), options.probes, setup.input_shape
            )

        def predict(x: jax.Array, t_b: jax.Array) -> jax.Array:
            return network(params, x, t_b, condition)

        log_prob_b, _, evaluations = density.log_prob(
            velocity_field(predict, setup.path, setup.objective.prediction),
            jax.lax.with_sharding_constraint(x_bhwc, sharding.batch_sharding(setup.mesh)),
            target.interval,
            probes_nbhwc,
            options.ode,
        )
        return log_prob_b + correction_b, evaluations

    out_shardings = sharding.batch_sharding(setup.mesh), sharding.replicated(setup.mesh)
    return call_with_batches(setup, jit_for_batches(setup, log_prob, out_shardings))


def evaluate(
    setup: Setup, source: Source, params: Any, indices: Sequence[int]
) -> Iterator[tuple[list[Row], int]]:
    """Yield (result rows, network evaluations) of the images at these indices, a batch at a time.

    The last batch is padded and its padding dropped. With data.skip_unreadable, images that cannot
    be read are dropped too.
    """
    size = setup.config.likelihood.batch
    log_prob = make_log_prob(setup)
    skip = setup.config.data.skip_unreadable
    for batch in read_in_order(setup, source, indices, size, skip_unreadable=skip):
        padded = pipeline.pad(batch, size)
        condition = setup.conditioning.from_records(padded)
        log_prob_b, evaluations = hosts.to_host(
            log_prob(params, padded["index"], padded, condition)
        )
        yield _rows(setup, batch, log_prob_b), int(evaluations)


def _rows(setup: Setup, batch: dict[str, np.ndarray], log_prob_b: np.ndarray) -> list[Row]:
    """Return the result rows of a batch. Raises `UserError` if a value is not finite."""
    readable = [i for i in range(len(batch["index"])) if not batch["skipped"][i]]
    bad = [int(batch["index"][i]) for i in readable if not np.isfinite(log_prob_b[i])]
    check(
        not bad,
        f"log p of images {bad[:8]} is not finite; use more steps or looser tolerances, or check "
        "whether training diverged",
    )
    nats_per_bit = math.prod(setup.input_shape) * math.log(2)
    return [
        {
            "index": int(batch["index"][i]),
            "label": int(batch["label"][i]),
            "log_prob": float(log_prob_b[i]),
            "bits_per_dim": float(-log_prob_b[i] / nats_per_bit),
        }
        for i in readable
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return means over the images, with their standard errors (None for a single image)."""
    summary: dict[str, Any] = {"images": len(rows)}
    for name in ("log_prob", "bits_per_dim"):
        values = np.array([row[name] for row in rows])
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        summary[name] = {"mean": float(values.mean()), "standard_error": error}
    return summary


def _check_batch(setup: Setup) -> None:
    check_batch(setup.mesh, "likelihood.batch", setup.config.likelihood.batch)


def run(config: Config, workdir: epath.Path, flags: argparse.Namespace) -> None:
    """Write workdir/likelihood/NAME/{results.jsonl, settings.json, summary.json}.

    Rows that already exist are kept.
    """
    options = config.likelihood
    data = dataclasses.replace(config.data, split=options.split or config.data.split)
    setup = set_up(with_einsum_attention(dataclasses.replace(config, data=data)))
    _check_batch(setup)
    source = hosts.run_on_all(lambda: open_source(setup))
    count = len(source) if options.count is None else options.count
    check(
        count <= len(source),
        f"likelihood.count is {count}, but split {data.split!r} of the {data.source} source has "
        f"{len(source)} images",
    )
    weights = restore_weights(setup, workdir, options.weights)
    check_same_classes(weights.note, source)
    meaning = density_target(setup).meaning
    settings = _results_settings(setup, source, weights, meaning)
    with open_results(
        flags, workdir, "likelihood", _results_name(setup, weights.step), settings
    ) as results:
        drawn = draw(setup, source, options.count)
        stored = digests(source, drawn, skip_unreadable=config.data.skip_unreadable)
        digest_of = dict(zip(drawn, stored, strict=True))
        rows = _unchanged(results, digest_of)
        evaluated = {row["index"] for row in rows}
        missing = [index for index in drawn if index not in evaluated]
        print(
            f"log p of {len(missing)} of {count} images of split {data.split!r} under step "
            f"{weights.step}, into {results.folder}"
        )
        if count < len(source):
            print(f"they are {kind_of_draw(source)} of {len(source):,}")
        print(f"unguided; {meaning}", flush=True)
        with progress_bar(len(missing), "image") as bar:
            for new_rows, evaluations in evaluate(setup, source, weights.params, missing):
                new_rows = [row | {"sha256": digest_of[row["index"]]} for row in new_rows]
                results.add_rows(new_rows)
                rows += new_rows
                bar.update(min(options.batch, len(missing) - bar.n))
                bar.set_postfix(evaluations=evaluations)
        rows = [row for row in rows if row["index"] in digest_of]
        check(rows, f"none of the {count} images can be read; check data.path")
        summary = summarise(rows)
        others = {"unreadable": count - len(rows), "of": len(source), "meaning": meaning}
        results.write_summary(summary | others)
        _print_summary(summary, unreadable=count - len(rows))


def _unchanged(results: Results, digest_of: Mapping[int, str | None]) -> list[Row]:
    """Return the rows so far, and drop from the file those whose image has another digest now."""
    rows = results.read_rows(("index", "log_prob", "bits_per_dim"))
    kept = [
        row
        for row in rows
        if row["index"] not in digest_of or row.get("sha256") == digest_of[row["index"]]
    ]
    changed = len(rows) - len(kept)
    if changed:
        results.keep_rows(kept)
        print(f"rows of images that have changed since, to be computed again: {changed}")
    return kept


def with_einsum_attention(config: Config) -> Config:
    """Return the config with attention that has the forward-mode derivatives of the divergence.

    Fused attention kernels have none.
    """
    model = dataclasses.replace(config.model, attention="einsum")
    return dataclasses.replace(config, model=model)


def _results_name(setup: Setup, step: int) -> str:
    options = setup.config.likelihood
    probes = f"{options.probe}{options.probes}"
    trace = "exact" if options.trace == "exact" else probes
    split = setup.config.data.split
    return f"step{step}-{options.weights}-{split}-{options.solver}-{trace}-seed{options.seed}"


def _results_settings(
    setup: Setup, source: Source, weights: Weights, meaning: str
) -> dict[str, Any]:
    """Return everything that an image's log p depends on."""
    config = setup.config
    settings: dict[str, Any] = {
        "step": weights.step,
        "checkpoint": weights.digest,
        "log_prob": meaning,
        "data": record_settings(config.data, source),
        "precision": dataclasses.asdict(config.precision) | {"matmul": setup.matmul("measurement")},
        "transport": dataclasses.asdict(config.transport),
        "likelihood": dataclasses.asdict(config.likelihood),
    }
    # An image's log p does not depend on these.
    for section, key in (
        ("likelihood", "count"),
        ("likelihood", "batch"),
        ("precision", "deterministic"),
    ):
        del settings[section][key]
    return settings | setup.codec_settings()


def _print_summary(summary: dict[str, Any], unreadable: int) -> None:
    for name, unit in (("log_prob", "log p"), ("bits_per_dim", "bits/dim")):
        mean = summary[name]["mean"]
        error = summary[name]["standard_error"]
        margin = "" if error is None else f" +- {error:.4f} (standard error)"
        print(f"{unit}: {mean:.4f}{margin}")
    omitted = f", {unreadable} unreadable ones left out" if unreadable else ""
    print(f"{summary['images']} images{omitted}")


def _refuse_sampler_settings(flags: argparse.Namespace, overrides: Overrides) -> None:
    """Raise `UserError` for settings of the sampler, which the likelihood does not use."""
    for key, _ in overrides:
        check(
            not key.startswith("sample."),
            f"--config.{key} has no effect on --mode likelihood, which integrates the unguided ODE "
            "with settings of its own; see --help-config likelihood",
        )


JOB = Job(
    run,
    "log p and bits/dim of each image of the data set, under the unguided ODE flow",
    flags=(OUT,),
    memory="likelihood.batch or likelihood.probes",
    check_batches=_check_batch,
    check=_refuse_sampler_settings,
    uses=(*NETWORK, "data.", "transport.train_eps", "likelihood."),
)
