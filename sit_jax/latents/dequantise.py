"""Dequantisation: draw a continuous x for an image of 256 levels, so that p(x) bounds P(image).

Both kinds return (x, correction) with log P(image) >= E[log p(x) + correction] in nats, one draw
for each image. Pixels are in [-1, 1], as `pixels.normalise` gives them. Shapes: b images, h height,
w width, c channels.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.latents.pixels import BIN, LEVELS, normalise

KINDS = ("uniform", "gaussian")
# sigma / alpha of Gaussian noise, chosen so that its entropy equals that of uniform noise. More
# noise blurs the levels; less makes them sharper than a smooth density can follow. With this much
# noise, a density that is smooth over a bin and one that knows the levels lose equally: 0.14 bits a
# dimension. Noise of a sixth of a bin would cost the smooth density 0.54.
GAUSSIAN_NOISE = BIN / math.sqrt(2 * math.pi * math.e)


def uniform(keys_b: jax.Array, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Map uint8 images to (x_bhwc uniform over each pixel's bin, correction_b).

    The probability of an image is the integral of the density over its bins, so the correction is
    the log of their volume (Theis et al., arXiv 1511.01844, eqs. 4-6).
    """
    u_bhwc = _draw(jax.random.uniform, keys_b, images_bhwc)
    correction = images_bhwc[0].size * math.log(BIN)
    x_bhwc = normalise(images_bhwc) + (u_bhwc - 0.5) * BIN
    return x_bhwc, jnp.full(len(images_bhwc), correction)


def gaussian(
    keys_b: jax.Array, images_bhwc: jax.Array, alpha: float, sigma: float
) -> tuple[jax.Array, jax.Array]:
    """Map uint8 images to (z_bhwc = alpha x + sigma eps, correction_b), with the noise of a time t.

    Nothing is learned. The variational bound with q(z|x) = N(alpha x, sigma^2) and P(x|z) = q(z|x)
    / sum_k q(z|level k), pixel by pixel (Kingma et al., arXiv 2107.00630, section 3.3):
        log P(x) >= E[log p_t(z) + log P(x|z) - log q(z|x)]
                  = E[log p_t(z) - sum_pixels log sum_k q(z|level k)].
    The network has seen such z in training at that time, and has never seen uniform noise (Zheng et
    al., arXiv 2305.03935, section 4, truncate the noise at the bin's edge instead).
    """
    eps_bhwc = _draw(jax.random.normal, keys_b, images_bhwc)

    def add_level(k: jax.Array, total_bhwc: jax.Array) -> jax.Array:
        # q(z|level k) / q(z|x), one level at a time to save memory.
        distance = alpha * BIN / sigma * (images_bhwc.astype(jnp.float32) - k) + eps_bhwc
        return total_bhwc + jnp.exp((eps_bhwc**2 - distance**2) / 2)

    levels_bhwc = jax.lax.fori_loop(0, LEVELS, add_level, jnp.zeros_like(eps_bhwc))
    log_q_bhwc = -(eps_bhwc**2) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2
    correction_b = -jnp.sum(log_q_bhwc + jnp.log(levels_bhwc), axis=(1, 2, 3))
    return alpha * normalise(images_bhwc) + sigma * eps_bhwc, correction_b


def _draw(distribution: Callable, keys_b: jax.Array, images_bhwc: jax.Array) -> jax.Array:
    return jax.vmap(lambda key: distribution(key, images_bhwc.shape[1:], jnp.float32))(keys_b)
