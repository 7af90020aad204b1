"""Embeddings of time, labels, position and patches."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def time_features(t_b: jax.Array, dim: int = 256, max_period: float = 10_000.0) -> jax.Array:
    """Return sinusoids of t, float32 [b, dim]: dim//2 cosines, then as many sines.

    t enters unscaled, in [0, 1], as in the training of the released weights. An odd dim ends with a
    zero.
    """
    angles_bk = t_b.astype(jnp.float32)[:, None] * time_frequencies(dim, max_period)
    waves_bk = jnp.concatenate([jnp.cos(angles_bk), jnp.sin(angles_bk)], axis=-1)
    return jnp.pad(waves_bk, ((0, 0), (0, dim % 2)))


def time_frequencies(dim: int = 256, max_period: float = 10_000.0) -> jax.Array:
    """Return the frequencies of `time_features`, float32 [dim//2]: max_period^(-k/(dim//2))."""
    half = dim // 2
    return jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)


@jax.custom_jvp
def lookup(table_nd: jax.Array, row_b: jax.Array) -> jax.Array:
    """Return the rows [b, d] of a table; NaN for a row that it does not have.

    Its gradient is a product. That of a plain lookup is a scatter, which GPUs compute with atomic
    additions: in another order, and so with other rounding, each time.
    """
    return jnp.take(table_nd, row_b, axis=0)


@lookup.defjvp
def _lookup_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # lookup(T) = H T with the one-hot rows H [b, n], so a tangent dT gives H dT, and jax derives
    # from that the gradient H^T g [n, d]. A custom_jvp, unlike a custom_vjp, has both derivatives.
    table_nd, row_b = primals
    tangent_nd, _ = tangents
    rows = len(table_nd)
    row_b = jnp.where(row_b < 0, row_b + rows, row_b)  # as jnp.take counts from the end
    one_hot_bn = jax.nn.one_hot(row_b, rows, dtype=tangent_nd.dtype)
    tangent_bd = jnp.matmul(one_hot_bn, tangent_nd, precision=jax.lax.Precision.HIGHEST)
    return lookup(table_nd, row_b), tangent_bd


def position_embedding(width: int, grid: int) -> np.ndarray:
    """Return fixed 2-D sinusoids, float32 [grid*grid, width], computed in float64.

    Tokens are in row-major order. The first half of the channels encodes the column, the second
    the row; within each, sines then cosines.
    """
    row, column = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    halves = [_sincos(width // 2, column), _sincos(width // 2, row)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def _sincos(dim: int, position: np.ndarray) -> np.ndarray:
    frequencies = 1.0 / 10_000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angles = np.outer(position, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def patchify(x_bhwc: jax.Array, patch: int) -> jax.Array:
    """Cut images into patches: [b, h, w, c] -> tokens [b, t, patch*patch*c].

    Features are in the order (row, column, channel), channel fastest.
    """
    b, h, w, c = x_bhwc.shape
    x = x_bhwc.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(x_btf: jax.Array, patch: int, channels: int) -> jax.Array:
    """Invert `patchify` for a square image: [b, t, patch*patch*c] -> [b, h, w, c]."""
    b, t, _ = x_btf.shape
    grid = math.isqrt(t)
    x = x_btf.reshape(b, grid, grid, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, grid * patch, grid * patch, channels)
