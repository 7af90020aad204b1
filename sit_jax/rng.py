"""Randomness as a pure function of (seed, stream, index): no random state is stored or carried."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np


def key(seed: int, stream: str, index: int | jax.Array = 0) -> jax.Array:
    """Return the key of a named stream at a step or sample index, for 0 <= seed < 2**32.

    Different names or indices give independent keys.
    """
    # As jax.random.key(seed), but $JAX_DEFAULT_PRNG_IMPL and $JAX_RANDOM_SEED_OFFSET cannot change
    # it.
    run_key = jax.random.wrap_key_data(
        jnp.asarray(np.array([0, seed], np.uint32)), impl="threefry2x32"
    )
    stream_key = jax.random.fold_in(run_key, zlib.crc32(stream.encode()))
    return jax.random.fold_in(stream_key, index)


def normal_by_index(
    seed: int, stream: str, indices: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Draw standard normals [n, *shape].

    The row of index i depends only on (seed, stream, i), however rows are batched.
    """
    return jax.vmap(lambda i: jax.random.normal(key(seed, stream, i), shape, jnp.float32))(indices)


def integers_by_index(seed: int, stream: str, indices: np.ndarray, high: int) -> np.ndarray:
    """Draw whole numbers below `high`, each equally likely, int32 [n].

    That of index i depends only on (seed, stream, i) and `high`.
    """

    def draw(index: jax.Array) -> jax.Array:
        return jax.random.randint(key(seed, stream, index), (), 0, high)

    return np.asarray(jax.vmap(draw)(jnp.asarray(indices, jnp.int32)))
