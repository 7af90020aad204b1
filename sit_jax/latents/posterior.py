"""The posterior of an autoencoder: draws from its moments, fresh or stored.

Shape suffixes: b batch, h height, w width, c channels of a latent, m moments: the c means, then the
c log variances.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sit_jax.latents.codec import Codec, Records


def draw(keys_b: jax.Array, moments_bhwm: jax.Array) -> jax.Array:
    """Return a latent z_bhwc drawn from each posterior, float32."""
    mean, std = _mean_and_std(moments_bhwm)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys_b)
    return mean + std * noise


def draw_stored(keys_b: jax.Array, records: Records) -> jax.Array:
    """Return x_bhwc = scale * (z - shift), channel by channel, for records of stored latents."""
    return _normalised(records, draw(keys_b, records["moments"]))


def input_distribution(
    codec: Codec, params: Any, records: Records
) -> tuple[jax.Array, jax.Array | None]:
    """Return mean and standard deviation of the network's input x_bhwc for each record.

    The deviation is None for a codec that draws nothing, such as that of pixels.
    """
    if "moments" in records:
        mean, std = _mean_and_std(records["moments"])
        return _normalised(records, mean), records["scale"][:, None, None, :] * std
    if codec.moments:
        mean, std = _mean_and_std(codec.moments(params, records))
        return codec.scale * mean, codec.scale * std
    unused = jnp.zeros(len(records["label"]))
    return codec.encode(params, unused, records), None


def _mean_and_std(moments_bhwm: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, logvar = jnp.split(moments_bhwm.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(logvar / 2)


def _normalised(records: Records, z_bhwc: jax.Array) -> jax.Array:
    scale_bc, shift_bc = records["scale"], records["shift"]
    return scale_bc[:, None, None, :] * (z_bhwc - shift_bc[:, None, None, :])
