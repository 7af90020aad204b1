"""The best possible prediction for a finite data set, and the loss of the best affine map.

A data set is a mixture: x1 is one of n points, each a Gaussian N(mean, std^2) of independent
dimensions with equal weight, or exact where std is None. The optimum memorises the data. With
V = alpha^2 std^2 + sigma^2 and x = alpha a + sigma e, the point i has
    log w_i = -1/2 sum_d [(alpha (a - mean_i) + sigma e)^2 / V_i + log V_i] + constant,
    u_i = (sigma (mean_i - a) + alpha std_i^2 e) / V_i,
    E[x1 | x, i] = a + sigma u_i  and  E[x0 | x, i] = e - alpha u_i.
Near t=1 nothing cancels if a and e are the data and the noise that x was made of: the distance to
a's own point is then exactly sigma e. A field at any x takes a=0 and e=x/sigma.

Shape suffixes: b batch, n points, d dimensions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.transport.losses import WEIGHTS
from sit_jax.transport.paths import Path
from sit_jax.transport.prediction import Predict, check_prediction, from_means

PADDING = -1  # label of a row that is not a point
_ELEMENTS = 2**24  # of the largest array [b, n, d], if the compiler builds one


class Points(NamedTuple):
    """A block of a data set as the network sees it, on the host or on the devices."""

    mean_nd: jax.Array | np.ndarray
    std_nd: jax.Array | np.ndarray | None  # None: all 0
    label_n: jax.Array | np.ndarray  # int32


class Query(NamedTuple):
    """Where to evaluate: x = alpha data + sigma noise at time t, given a label."""

    data_bd: jax.Array
    noise_bd: jax.Array
    t_b: jax.Array
    label_b: jax.Array  # int32; the null label stands for all points


class Sums(NamedTuple):
    """Sums over the points so far, relative to the largest log weight."""

    largest_b: jax.Array
    weight_b: jax.Array
    shift_bd: jax.Array  # of w_i u_i


def no_points(query: Query) -> Sums:
    """Return the sums over no points."""
    zero_b = jnp.zeros_like(query.t_b)
    return Sums(zero_b - jnp.inf, zero_b, jnp.zeros_like(query.data_bd))


def add_points(path: Path, null_label: int, query: Query, sums: Sums, points: Points) -> Sums:
    """Add a block of points to the sums, in parts so small that memory stays bounded."""
    b, d = query.data_bd.shape
    n = len(points.label_n)
    rows = max(1, min(n, _ELEMENTS // (b * d)))
    parts, rest = divmod(n, rows)

    def part(start: int, count: int, size: int) -> Points:
        return jax.tree.map(
            lambda x: x[start : start + count * size].reshape(count, size, *x.shape[1:]), points
        )

    def add(sums: Sums, points: Points) -> tuple[Sums, None]:
        return _add(path, null_label, query, sums, points), None

    sums, _ = jax.lax.scan(add, sums, part(0, parts, rows))
    if rest:
        sums, _ = jax.lax.scan(add, sums, part(parts * rows, 1, rest))
    return sums


def _add(path: Path, null_label: int, query: Query, sums: Sums, points: Points) -> Sums:
    t_b11 = query.t_b[:, None, None]
    alpha = path.alpha(t_b11)
    sigma = path.sigma(t_b11)
    noise_b1d = query.noise_bd[:, None]
    apart_bnd = points.mean_nd - query.data_bd[:, None]
    residual_bnd = sigma * noise_b1d - alpha * apart_bnd
    if points.std_nd is None:
        log_w_bn = -0.5 * jnp.sum((residual_bnd / sigma) ** 2, axis=-1)
        shift_bnd = apart_bnd / sigma
    else:
        variance_nd = points.std_nd**2
        total_bnd = alpha**2 * variance_nd + sigma**2
        # Relative to sigma^2, so that points of variance 0 add exactly 0.
        log_total_bnd = jnp.log1p((alpha / sigma) ** 2 * variance_nd)
        log_w_bn = -0.5 * jnp.sum(residual_bnd**2 / total_bnd + log_total_bnd, axis=-1)
        shift_bnd = (sigma * apart_bnd + alpha * variance_nd * noise_b1d) / total_bnd
    label_b1 = query.label_b[:, None]
    is_same_bn = (label_b1 == points.label_n) | (label_b1 == null_label)
    log_w_bn = jnp.where(is_same_bn & (points.label_n != PADDING), log_w_bn, -jnp.inf)
    largest_b = jnp.maximum(sums.largest_b, log_w_bn.max(axis=1))
    finite_b = jnp.where(jnp.isfinite(largest_b), largest_b, 0.0)  # no point of the label so far
    w_bn = jnp.exp(log_w_bn - finite_b[:, None])
    kept_b = jnp.exp(sums.largest_b - finite_b)
    return Sums(
        largest_b,
        kept_b * sums.weight_b + w_bn.sum(axis=1),
        # A sum, not a matmul: the shifts are exact differences, which rounded products would spoil.
        kept_b[:, None] * sums.shift_bd + jnp.sum(w_bn[..., None] * shift_bnd, axis=1),
    )


def finish(path: Path, query: Query, sums: Sums) -> tuple[jax.Array, jax.Array]:
    """Return (E[x1 | x], E[x0 | x]) [b, d], NaN where the label has no points."""
    t_b1 = query.t_b[:, None]
    shift_bd = sums.shift_bd / sums.weight_b[:, None]
    data_bd = query.data_bd + path.sigma(t_b1) * shift_bd
    return data_bd, query.noise_bd - path.alpha(t_b1) * shift_bd


def optimal_predict(
    path: Path, prediction: str, points: Points, label_b: jax.Array, null_label: int
) -> Predict:
    """Return the network that no other can beat on these points: (x, t_b) -> like x, for t < 1.

    Raises UserError for an unknown prediction.
    """
    check_prediction(prediction)

    def predict(x: jax.Array, t_b: jax.Array) -> jax.Array:
        x_bd = x.reshape(len(x), -1)
        noise_bd = x_bd / path.sigma(t_b)[:, None]
        query = Query(jnp.zeros_like(x_bd), noise_bd, t_b, label_b)
        sums = add_points(path, null_label, query, no_points(query), points)
        data_bd, noise_bd = finish(path, query, sums)
        return from_means(path, prediction, data_bd, noise_bd, t_b).reshape(x.shape)

    return predict


def affine_losses(
    path: Path, prediction: str, weight: str, eigenvalues_d: jax.Array, t_b: jax.Array
) -> jax.Array:
    """Return the loss of the best affine map at each time, float32 [b].

    It depends only on the eigenvalues l of the data's covariance: the variance of x0 given x is
    alpha^2 l / (alpha^2 l + sigma^2) along each eigenvector. For Gaussian data nothing is better.
    """
    check_prediction(prediction)
    t_b1 = t_b[:, None]
    alpha = path.alpha(t_b1)
    sigma = path.sigma(t_b1)
    l_d = jnp.maximum(eigenvalues_d, 0.0)  # rounding may make them negative
    factor = alpha**2
    if prediction == "velocity":
        # u = alpha' x1 + sigma' x0 with x1 = (x - sigma x0) / alpha.
        factor = (path.d_alpha(t_b1) * sigma - path.d_sigma(t_b1) * alpha) ** 2
    variance_bd = jnp.where(l_d > 0, factor * l_d / (alpha**2 * l_d + sigma**2), 0.0)
    return WEIGHTS[weight](path, t_b) * variance_bd.mean(axis=1)


def zero_losses(
    path: Path, prediction: str, weight: str, mean_square: float, t_b: jax.Array
) -> jax.Array:
    """Return the loss of the output zero at each time, float32 [b].

    `mean_square` is that of the data, over examples and dimensions.
    """
    check_prediction(prediction)
    loss_b = jnp.ones_like(t_b)
    if prediction == "velocity":
        loss_b = path.d_alpha(t_b) ** 2 * mean_square + path.d_sigma(t_b) ** 2
    return WEIGHTS[weight](path, t_b) * loss_b
