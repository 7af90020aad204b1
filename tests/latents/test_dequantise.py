"""Dequantisation estimates an image's probability correctly where that is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm

from sit_jax.latents import dequantise
from sit_jax.latents.pixels import BIN, normalise

N = 4000
KEYS = jax.vmap(jax.random.key)(jnp.arange(N))


def images_of(level):
    return jnp.full((N, 1, 1, 1), level, jnp.uint8)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_uniform_noise_fills_the_bin_and_gives_its_probability(level):
    x, correction = dequantise.uniform(KEYS, images_of(level))
    centre = float(normalise(np.uint8(level)))
    assert abs(float(x.min()) - (centre - BIN / 2)) < BIN / 100
    assert abs(float(x.max()) - (centre + BIN / 2)) < BIN / 100
    # A normal density that varies strongly within a bin.
    loc = centre + 2 * BIN
    scale = 1.5 * BIN
    probability = norm.cdf(centre + BIN / 2, loc, scale) - norm.cdf(centre - BIN / 2, loc, scale)
    estimates = jnp.exp(norm.logpdf(x, loc, scale).sum((1, 2, 3)) + correction)
    assert abs(float(estimates.mean()) - float(probability)) < 4 * float(estimates.std()) / N**0.5
    bound = norm.logpdf(x, loc, scale).sum((1, 2, 3)) + correction
    assert float(bound.mean()) < float(jnp.log(probability))


LEVELS = np.array([0, 16, 17, 200, 255])
PROBABILITIES = np.array([0.5, 0.1, 0.2, 0.15, 0.05])


def noisy_log_density(z, alpha, sigma):
    """Return log p_t(z) of pixels that take LEVELS with PROBABILITIES."""
    parts = norm.logpdf(z[..., None], alpha * normalise(LEVELS), sigma) + np.log(PROBABILITIES)
    return logsumexp(parts, axis=-1).sum((1, 2, 3))


@pytest.mark.parametrize("index", range(len(LEVELS)))
def test_gaussian_noise_gives_the_probability_of_discrete_data(index):
    """The bound is tight if the noise keeps the levels apart.

    Uniform noise has no such test: it needs the density of the data themselves, which data of
    discrete levels do not have.
    """
    alpha, sigma = 0.998, BIN / 8
    z, correction = dequantise.gaussian(KEYS, images_of(LEVELS[index]), alpha, sigma)
    estimates = np.asarray(noisy_log_density(z, alpha, sigma) + correction)
    # A draw four standard deviations off may belong to the neighbouring level.
    assert np.median(np.abs(estimates - np.log(PROBABILITIES[index]))) < 1e-3
    assert estimates.mean() == pytest.approx(np.log(PROBABILITIES[index]), abs=2e-3)


def test_gaussian_noise_that_mixes_levels_still_gives_a_bound():
    alpha, sigma = 0.9, BIN
    for level, probability in zip(LEVELS, PROBABILITIES, strict=True):
        z, correction = dequantise.gaussian(KEYS, images_of(level), alpha, sigma)
        assert float((noisy_log_density(z, alpha, sigma) + correction).mean()) < np.log(probability)


@pytest.mark.parametrize("kind", dequantise.KINDS)
def test_an_image_does_not_depend_on_its_neighbours(kind):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 3, 2, 3)), jnp.uint8)
    arguments = () if kind == "uniform" else (0.99, 0.01)
    draw = getattr(dequantise, kind)
    batch = draw(KEYS[:4], images, *arguments)
    single = draw(KEYS[2:3], images[2:3], *arguments)
    for of_batch, of_single in zip(batch, single, strict=True):
        np.testing.assert_allclose(of_single[0], of_batch[2], rtol=1e-6)
    assert len(np.unique(batch[0] - normalise(images))) == images.size


def test_gaussian_noise_costs_a_smooth_density_as_much_as_one_that_knows_the_level():
    """Gaussian dequantisation loses 0.14 bits on either kind of density.

    The exact log P is the log of (density times bin width) for a smooth density, and 0 for data
    with a single level. The loss is the exact log P minus the estimate.
    """
    z, correction = dequantise.gaussian(KEYS, images_of(100), 1.0, dequantise.GAUSSIAN_NOISE)
    smooth = math.log(BIN) - correction
    known = -(
        norm.logpdf(z, normalise(np.uint8(100)), dequantise.GAUSSIAN_NOISE).sum((1, 2, 3))
        + correction
    )
    for loss in (smooth, known):
        assert abs(float(loss.mean()) - 0.14 * math.log(2)) < 4 * float(loss.std()) / N**0.5
