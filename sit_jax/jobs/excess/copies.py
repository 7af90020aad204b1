"""How far samples are from being copies of training images."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import hosts, rng, sharding
from sit_jax.image_io import encode_png, sheet, to_uint8
from sit_jax.jobs.excess.points import DataPoints
from sit_jax.jobs.excess.sets import PointSet
from sit_jax.jobs.results import make_sheet
from sit_jax.jobs.sampler import Guide, make_sampler, sample_images
from sit_jax.jobs.setup import Setup, call_with_batches, jit_for_batches, set_up
from sit_jax.jobs.workdir import Weights
from sit_jax.metrics.neighbours import nearest
from sit_jax.settings import Config

_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CLOSE = 0.01  # share of test images that count as close to the training set


class Copies(NamedTuple):
    """The distances to the nearest training images, and the closest pairs."""

    summary: dict[str, Any]
    sheet: bytes  # PNG: each sample beside its nearest training image, closest first


def compare(
    setup: Setup, weights: Weights, guide: Guide | None, sets: Sequence[PointSet]
) -> Copies:
    """Draw excess.samples samples; find the training image nearest to each, and to test images.

    Distances are Euclidean, in the network's input.
    """
    train, *tests = sets
    samples_nd = _draw(setup, weights.params, guide)
    distance_n, index_n = nearest(samples_nd, train.points.mean_nd)
    summary: dict[str, Any] = {
        "distance": "Euclidean, of the network's input, to the nearest training image",
        "samples": _describe(distance_n),
    }
    for images in tests:
        points_nd = _inputs(setup, images.points, images.order[: setup.config.excess.samples])
        test_distance_n, _ = nearest(points_nd, train.points.mean_nd)
        summary["test images"] = _describe(test_distance_n) | {
            "copies": int((test_distance_n == 0).sum())
        }
        summary["closer"] = float(np.mean(distance_n < np.quantile(test_distance_n, _CLOSE)))
    closest = np.argsort(distance_n, kind="stable")[: setup.config.log.sheet_count]
    samples_bhwc = _decode(setup, samples_nd[closest])
    images_bhwc = _decode(setup, train.points.mean_nd[index_n[closest]])
    pairs = [sheet(np.stack(pair), 2) for pair in zip(samples_bhwc, images_bhwc, strict=True)]
    return Copies(summary, encode_png(make_sheet(setup.config, np.stack(pairs))))


def _describe(distance_n: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(distance_n),
        "quantiles": {f"{q:g}": float(np.quantile(distance_n, q)) for q in _QUANTILES},
    }


def _draw(setup: Setup, params: Any, guide: Guide | None) -> np.ndarray:
    """Return samples as the network sees them, float32 [n, d]."""
    sampled = set_up(_without_decoder(setup))
    sampler = make_sampler(sampled, guide)
    indices = np.arange(setup.config.excess.samples)
    batches = list(sample_images(sampled, sampler, params, indices))
    x_nhwc = np.concatenate([batch.x_bfhwc[:, -1] for batch in batches])  # type: ignore[index]
    return x_nhwc.reshape(len(x_nhwc), -1)


def _without_decoder(setup: Setup) -> Config:
    """Return the config of the same network on stored latents, whose samples are its output."""
    config = setup.config
    side, _, channels = setup.input_shape
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source="latents", image_size=side, channels=channels),
        latents=dataclasses.replace(config.latents, codec="stored"),
        sample=dataclasses.replace(config.sample, labels=(), frames=None),
    )


def _inputs(setup: Setup, points: DataPoints, rows: np.ndarray) -> np.ndarray:
    """Return inputs of the network for these points: draws from their posteriors, if they have."""
    mean_nd = points.mean_nd[rows]
    if points.std_nd is None:
        return mean_nd
    seed = setup.config.excess.seed
    noise = rng.normal_by_index(seed, "excess nearest", jnp.arange(len(rows)), mean_nd.shape[1:])
    return mean_nd + points.std_nd[rows] * np.asarray(noise)


def _decode(setup: Setup, x_nd: np.ndarray) -> np.ndarray:
    """Return uint8 images [n, h, w, c] of inputs of the network, a batch at a time."""

    def decode(params: None, codec_params: Any, x_bd: jax.Array) -> jax.Array:
        return setup.codec.decode(codec_params, x_bd.reshape(-1, *setup.input_shape))

    compiled = jit_for_batches(decode, sharding.batch_sharding(setup.mesh))
    call = call_with_batches(setup, compiled)
    size = setup.config.sample.batch
    images = []
    for start in range(0, len(x_nd), size):
        x_bd = x_nd[start : start + size]
        padded = np.pad(x_bd, ((0, size - len(x_bd)), (0, 0)), mode="edge")
        images.append(to_uint8(hosts.to_host(call(None, padded)))[: len(x_bd)])
    return np.concatenate(images)
