"""Randomness as a pure function of (seed, stream, index): nothing random is ever stored or carried along."""

import zlib

import jax


def key(seed: int, stream: str, index: int | jax.Array = 0) -> jax.Array:
    """The key of a named stream at a step or sample index. Other names and other indices give independent keys."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode())), index
    )


def normal_by_index(
    seed: int, stream: str, indices: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Standard normal [n, *shape] whose row of index i depends on (seed, stream, i) alone, however rows are batched."""
    return jax.vmap(lambda i: jax.random.normal(key(seed, stream, i), shape))(indices)
