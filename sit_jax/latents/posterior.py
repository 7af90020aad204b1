"""The posterior of an autoencoder: draws from its moments, fresh or stored.

Shape suffixes: b batch, h height, w width, c channels of a latent, m moments: the c means, then the
c log variances.
"""

import jax
import jax.numpy as jnp

from sit_jax.latents.codec import Records


def draw(keys_b: jax.Array, moments_bhwm: jax.Array) -> jax.Array:
    """Return a latent z_bhwc drawn from each posterior, float32."""
    mean, logvar = jnp.split(moments_bhwm.astype(jnp.float32), 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys_b)
    return mean + jnp.exp(logvar / 2) * noise


def draw_stored(keys_b: jax.Array, records: Records) -> jax.Array:
    """Return x_bhwc = scale * (z - shift), channel by channel, for records of stored latents."""
    scale_bc, shift_bc = records["scale"], records["shift"]
    z_bhwc = draw(keys_b, records["moments"])
    return scale_bc[:, None, None, :] * (z_bhwc - shift_bc[:, None, None, :])
