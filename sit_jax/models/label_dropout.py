"""Label dropout for classifier-free guidance (Ho & Salimans, arXiv 2207.12598), outside the network."""

import jax
import jax.numpy as jnp


def drop_labels(key: jax.Array, labels_b: jax.Array, rate: float, null_label: int) -> jax.Array:
    """labels_b with each one replaced by the null label (= number of classes) with probability `rate`."""
    return jnp.where(jax.random.uniform(key, labels_b.shape) < rate, null_label, labels_b)
