"""Dequantisation: an image of 256 levels as a continuous x, so that a density of x bounds the probability of the image.

Both give (x, correction) with log P(image) >= E[log p(x) + correction], in nats, one draw for each image. Pixels are
`transforms.normalise`'s, in [-1, 1]. Shapes: b images, h height, w width, c channels.
"""

import math

import jax
import jax.numpy as jnp

from sit_jax.data.transforms import BIN, LEVELS, normalise

KINDS = ("uniform", "gaussian")
# sigma / alpha of Gaussian noise: its entropy is that of uniform noise. More blurs the levels, less is sharper than a
# smooth density can follow; here a density that is smooth over a bin and one that knows the levels lose the same,
# 0.14 bits a dimension (a sixth of a bin costs the smooth one 0.54).
GAUSSIAN_NOISE = BIN / math.sqrt(2 * math.pi * math.e)


def uniform(keys_b: jax.Array, images_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 images -> (x_bhwc uniform over each pixel's bin, correction_b); Theis et al., arXiv 1511.01844, eqs. 4-6.

    The image's probability is the integral of the density over its bins: the correction is the log of their volume.
    """
    u_bhwc = _draw(jax.random.uniform, keys_b, images_bhwc)
    correction = images_bhwc[0].size * math.log(BIN)
    return normalise(images_bhwc) + (u_bhwc - 0.5) * BIN, jnp.full(len(images_bhwc), correction)


def gaussian(
    keys_b: jax.Array, images_bhwc: jax.Array, alpha: float, sigma: float
) -> tuple[jax.Array, jax.Array]:
    """uint8 images -> (z_bhwc = alpha x + sigma eps, correction_b): the noise of a path's time t, nothing learned.

    The variational bound with q(z|x) = N(alpha x, sigma^2) and P(x|z) = q(z|x) / sum_k q(z|level k), pixel by pixel
    (Kingma et al., arXiv 2107.00630, section 3.3):
        log P(x) >= E[log p_t(z) + log P(x|z) - log q(z|x)] = E[log p_t(z) - sum_pixels log sum_k q(z|level k)].
    z is what the network met in training at that time, while uniform noise is not (Zheng et al., arXiv 2305.03935,
    section 4, who cut the noise off at the bin's edge instead).
    """
    eps_bhwc = _draw(jax.random.normal, keys_b, images_bhwc)

    def add_level(k, total_bhwc):  # q(z|level k) / q(z|x); one level at a time, for memory
        distance = alpha * BIN / sigma * (images_bhwc.astype(jnp.float32) - k) + eps_bhwc
        return total_bhwc + jnp.exp((eps_bhwc**2 - distance**2) / 2)

    levels_bhwc = jax.lax.fori_loop(0, LEVELS, add_level, jnp.zeros_like(eps_bhwc))
    log_q_bhwc = -(eps_bhwc**2) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2
    correction_b = -jnp.sum(log_q_bhwc + jnp.log(levels_bhwc), axis=(1, 2, 3))
    return alpha * normalise(images_bhwc) + sigma * eps_bhwc, correction_b


def _draw(distribution, keys_b, images_bhwc):
    return jax.vmap(lambda key: distribution(key, images_bhwc.shape[1:]))(keys_b)
