"""Randomness as a pure function of (seed, stream, index): no random state is stored or carried."""

import zlib

import jax


def key(seed: int, stream: str, index: int | jax.Array = 0) -> jax.Array:
    """Return the key of a named stream at a step or sample index.

    Different names or indices give independent keys.
    """
    stream_key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    return jax.random.fold_in(stream_key, index)


def normal_by_index(
    seed: int, stream: str, indices: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Draw standard normals [n, *shape].

    The row of index i depends only on (seed, stream, i), however rows are batched.
    """
    return jax.vmap(lambda i: jax.random.normal(key(seed, stream, i), shape))(indices)
