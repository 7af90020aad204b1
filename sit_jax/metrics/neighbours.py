"""Nearest neighbours among features: improved precision and recall, and nearest images.

Kynkaanniemi et al., arXiv 1904.06991, eqs. 1 and 2. Distances are decided in float64, though nearly
all work is float32 products on the device. Suffixes: n and m rows, d features, b rows and c columns
of a block, s blocks, k candidates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sit_jax.errors import check
from sit_jax.metrics.checks import check_features, check_same_width

_ROWS = 1024
_COLUMNS = 4096
# More candidates than neighbours wanted, so that float32 rarely leaves a doubt.
_SPARE = 5
_PAIRS = 1024  # of rows that are compared in float64 at a time, which bounds the memory


def precision_recall(real_nd: np.ndarray, fake_nd: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Return (precision, recall): the share of each set within the other's manifold.

    A manifold is the union of balls around the rows of a set that reach their k-th nearest
    neighbour, themselves not counted; a row on the border is within. Raises UserError for sets of
    k rows or fewer, unequal widths and rows that are not finite.
    """
    _check_pair(fake_nd, real_nd, "features of the samples", "features of the real images")
    for name, rows in (("real images", real_nd), ("samples", fake_nd)):
        check(1 <= k < len(rows), f"k={k} with {len(rows)} {name}; expected 1 to {len(rows) - 1}")
    return _share_within(fake_nd, real_nd, k), _share_within(real_nd, fake_nd, k)


def nearest(a_nd: np.ndarray, b_md: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (Euclidean distance, index) of the row of b nearest to each row of a.

    The first of equally near rows counts. A copy has distance 0. Raises UserError for unequal
    widths, an empty b and rows that are not finite.
    """
    _check_pair(a_nd, b_md, "the first features", "the second features")
    squares_n1, index_n1 = _smallest(a_nd, b_md, np.zeros(len(b_md)), 1)
    return np.sqrt(squares_n1[:, 0]), index_n1[:, 0]


def _check_pair(a_nd: np.ndarray, b_md: np.ndarray, a_name: str, b_name: str) -> None:
    check_features(a_nd, what=a_name)
    check_features(b_md, what=b_name)
    check(min(len(a_nd), len(b_md)) >= 1, f"{len(a_nd)} and {len(b_md)} rows; expected 1 or more")
    check_same_width(a_nd, b_md)


def _share_within(a_nd: np.ndarray, b_md: np.ndarray, k: int) -> float:
    """Return the share of the rows of a that are in the manifold of b."""
    squares_mk, _ = _smallest(b_md, b_md, np.zeros(len(b_md)), k, skip_self=True)
    squared_radii_m = squares_mk[:, k - 1]
    margins_n1, _ = _smallest(a_nd, b_md, squared_radii_m, 1)
    return float(np.mean(margins_n1[:, 0] <= 0))


def _smallest(
    a_nd: np.ndarray, b_md: np.ndarray, offsets_m: np.ndarray, count: int, skip_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` smallest |a_i - b_j|^2 - offset_j of each row i in order, and their j.

    The device finds candidates by a lower bound of each score: its float32 value less what
    rounding may have added. float64 then scores the candidates. The result is right where the
    last candidate's bound, which every other row's exceeds, is not below the scores returned.
    The few rows left are scored against all of b in float64.
    """
    candidates = min(count + _SPARE, len(b_md) - skip_self)
    bounds_nk, index_nk = _candidates(a_nd, b_md, offsets_m, candidates, skip_self)
    scores_nk = _exact_squares(a_nd, b_md, index_nk) - offsets_m[index_nk]
    scores_nk, index_nk = _first(scores_nk, index_nk, count)
    if candidates < len(b_md) - skip_self:
        for i in np.flatnonzero(bounds_nk[:, -1] < scores_nk[:, -1]):
            others = np.arange(len(b_md))
            if skip_self:
                others = np.delete(others, i)
            row = _exact_squares(a_nd[i : i + 1], b_md, others[None]) - offsets_m[others]
            scores_nk[i : i + 1], index_nk[i : i + 1] = _first(row, others[None], count)
    return scores_nk, index_nk


def _first(
    scores_nk: np.ndarray, index_nk: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `count` smallest scores of each row and their indices; ties go to the first."""
    order = np.lexsort((index_nk, scores_nk))[:, :count]
    return np.take_along_axis(scores_nk, order, 1), np.take_along_axis(index_nk, order, 1)


def _exact_squares(a_nd: np.ndarray, b_md: np.ndarray, index_nk: np.ndarray) -> np.ndarray:
    """Return |a_i - b_j|^2 in float64 for the j of each row i."""
    n, k = index_nk.shape
    rows, columns = np.repeat(np.arange(n), k), index_nk.ravel()
    squares = np.empty(n * k)
    for start in range(0, n * k, _PAIRS):
        pairs = slice(start, start + _PAIRS)
        differences = a_nd[rows[pairs]].astype(np.float64) - b_md[columns[pairs]]
        squares[pairs] = np.einsum("pd,pd->p", differences, differences)
    return squares.reshape(n, k)


def _candidates(
    a_nd: np.ndarray, b_md: np.ndarray, offsets_m: np.ndarray, k: int, skip_self: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k smallest lower bounds of |a_i - b_j|^2 - offset_j for each i, and their j."""
    # Centred, norms are about as small as distances, and so is rounding. Nothing else changes.
    centre_d = b_md.mean(axis=0, dtype=np.float64)
    m, d = b_md.shape
    blocks = -(-m // _COLUMNS)
    b_scd = np.zeros((blocks * _COLUMNS, d), np.float32)
    b_scd[:m] = b_md - centre_d
    offsets_sc = np.full(blocks * _COLUMNS, -np.inf, np.float32)  # padding is never near
    # Rounded up, which lowers the bound.
    offsets_sc[:m] = np.nextafter(offsets_m.astype(np.float32), np.float32(np.inf))
    b_scd = jax.device_put(b_scd.reshape(blocks, _COLUMNS, d))
    offsets_sc = jax.device_put(offsets_sc.reshape(blocks, _COLUMNS))
    found = []
    for start in range(0, len(a_nd), _ROWS):
        rows_bd = np.zeros((_ROWS, d), np.float32)
        part_bd = a_nd[start : start + _ROWS]
        rows_bd[: len(part_bd)] = part_bd - centre_d
        skipped_b = start + np.arange(_ROWS) if skip_self else np.full(_ROWS, -1)
        found.append(_block(rows_bd, b_scd, offsets_sc, skipped_b.astype(np.int32), k))
    bounds_nk, index_nk = (np.concatenate(parts)[: len(a_nd)] for parts in zip(*found, strict=True))
    return bounds_nk, index_nk


@functools.partial(jax.jit, static_argnames="k")
def _block(
    a_bd: jax.Array, b_scd: jax.Array, offsets_sc: jax.Array, skipped_b: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """Return the k smallest lower bounds [b, k] for a block of rows, and their columns.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b. A sum of d float32 products is off by at most d eps / 2 times
    the sum of their sizes, so all three terms together by less than (d + 16) eps (|a|^2 + |b|^2).
    The 16 stands for the few other roundings.
    """
    d = a_bd.shape[1]
    rounding = (d + 16) * float(jnp.finfo(jnp.float32).eps)
    a_squares_b = jnp.sum(a_bd**2, axis=1)

    def step(
        best: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        b_cd, offsets_c, first = block
        norms_bc = a_squares_b[:, None] + jnp.sum(b_cd**2, axis=1)
        product_bc = jnp.matmul(a_bd, b_cd.T, precision=lax.Precision.HIGHEST)
        squares_bc = norms_bc * (1 - rounding) - 2 * product_bc
        bounds_bc = jnp.maximum(squares_bc, 0) - offsets_c
        columns_c = first + jnp.arange(_COLUMNS)
        bounds_bc = jnp.where(columns_c == skipped_b[:, None], jnp.inf, bounds_bc)
        smallest_bk, places_bk = lax.top_k(-bounds_bc, k)
        bounds = jnp.concatenate([best[0], -smallest_bk], axis=1)
        columns = jnp.concatenate([best[1], columns_c[places_bk]], axis=1)
        smallest_bk, places_bk = lax.top_k(-bounds, k)
        return (-smallest_bk, jnp.take_along_axis(columns, places_bk, axis=1)), None

    starts_s = jnp.arange(len(b_scd), dtype=jnp.int32) * _COLUMNS
    nothing = (jnp.full((len(a_bd), k), jnp.inf), jnp.zeros((len(a_bd), k), jnp.int32))
    return lax.scan(step, nothing, (b_scd, offsets_sc, starts_s))[0]
