"""Losses of the model, of the memoriser and of simple maps, by the time of the noise.

The memoriser is the best possible prediction for a finite training set (transport/optimal.py): it
knows every image by heart. Times are split into strata, equally probable in training.

Shape suffixes: b batch, n draws, d dimensions of the network's input, s strata.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import hosts, rng, sharding
from sit_jax.errors import check
from sit_jax.jobs.excess.points import DataPoints, covariance_eigenvalues
from sit_jax.jobs.results import Row
from sit_jax.jobs.setup import Setup, jit_for_batches
from sit_jax.transport import optimal, times
from sit_jax.transport.losses import losses
from sit_jax.transport.optimal import Query, Sums
from sit_jax.transport.prediction import from_means

_LATEST = 1 - 2**-24  # the last time before 1 in float32: at 1 the weights of points are 0/0
_TIMES = 100  # at which a stratum's closed forms are averaged

# (points to draw from, rows [n], numbers of the draws [n], stratum) -> losses [n] of the model and
# of the memoriser
Measure = Callable[[DataPoints, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def make_measure(setup: Setup, params: Any, memorised: DataPoints) -> Measure:
    """Return a function that evaluates the model and the memoriser of some points on equal draws.

    Image, noise, time and label of a draw depend only on (excess.seed, its number, the row), not on
    the batch or the devices.
    """
    blocks = memorised.blocks()
    size = setup.config.excess.batch
    null = setup.config.data.classes
    split = sharding.batch_sharding(setup.mesh)
    ask = jax.jit(functools.partial(_query, setup), out_shardings=split)
    labels_of_draws = jax.jit(functools.partial(_labels, setup))
    add = jax.jit(functools.partial(optimal.add_points, setup.path, null), out_shardings=split)
    model_losses = jit_for_batches(setup, functools.partial(_model_losses, setup), split)
    optimal_losses = jax.jit(functools.partial(_optimal_losses, setup), out_shardings=split)

    def best(query: Query, labels_b: np.ndarray) -> jax.Array:
        sums = optimal.no_points(query)
        for block in blocks:
            if _may_hold(np.asarray(block.label_n), labels_b, null):
                sums = add(query, sums, sharding.put_replicated(setup.mesh, block))
        return optimal_losses(query, sums)

    def measure(
        points: DataPoints, rows_n: np.ndarray, numbers_n: np.ndarray, stratum: int
    ) -> tuple[np.ndarray, np.ndarray]:
        labels_n = np.asarray(labels_of_draws(numbers_n, points.labels_n[rows_n]))
        order = np.argsort(labels_n, kind="stable")  # so that a batch needs few blocks
        found = np.empty((2, len(order)), np.float32)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            padded = np.pad(chunk, (0, size - len(chunk)), mode="edge")
            rows_b = rows_n[padded]
            batch = {
                "mean": points.mean_nd[rows_b],
                "std": None if points.std_nd is None else points.std_nd[rows_b],
                "label": labels_n[padded],
                "number": numbers_n[padded],
                "stratum": np.full(size, stratum, np.int32),
            }
            query = ask(sharding.shard_global_batch(setup.mesh, batch))
            both = model_losses(params, None, query), best(query, labels_n[chunk])
            found[:, chunk] = [loss_b[: len(chunk)] for loss_b in hosts.to_host(both)]
        return found[0], found[1]

    return measure


def _may_hold(label_n: np.ndarray, labels_b: np.ndarray, null: int) -> bool:
    """Return True if a block, sorted by label and padded, may hold points of these labels."""
    kept = label_n[label_n != optimal.PADDING]
    return bool(((labels_b >= kept[0]) & (labels_b <= kept[-1]) | (labels_b == null)).any())


def _labels(setup: Setup, numbers_n: jax.Array, labels_n: jax.Array) -> jax.Array:
    """Return the label that the network is given in each draw."""
    kind = setup.config.excess.labels
    rate = {"data": 0.0, "null": 1.0, "dropout": setup.config.train.label_dropout}[kind]
    keys_n = _keys(setup, "label dropout", numbers_n)
    drop = functools.partial(setup.conditioning.drop, rate=rate)
    return jax.vmap(drop)(keys_n, labels_n)


def _keys(setup: Setup, stream: str, numbers_n: jax.Array) -> jax.Array:
    seed = setup.config.excess.seed
    return jax.vmap(lambda number: rng.key(seed, f"excess {stream}", number))(numbers_n)


def _query(setup: Setup, batch: Mapping[str, Any]) -> Query:
    """Draw x1, x0 and a time of the stratum for each row of a batch."""

    def normal(stream: str) -> jax.Array:
        return rng.normal_by_index(
            setup.config.excess.seed, f"excess {stream}", batch["number"], batch["mean"].shape[1:]
        )

    x1_bd = batch["mean"]
    if batch["std"] is not None:
        x1_bd = x1_bd + batch["std"] * normal("posterior")
    keys_b = _keys(setup, "time", batch["number"])
    u_b = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys_b)
    t_b = _times(setup, (batch["stratum"] + u_b) / setup.config.excess.strata)
    return Query(x1_bd, normal("noise"), t_b, batch["label"])


def _times(setup: Setup, u_b: jax.Array) -> jax.Array:
    """Return the quantiles of the training times."""
    objective = setup.objective
    t_b = times.quantiles(
        objective.interval, u_b, objective.times, objective.times_mean, objective.times_std
    )
    return jnp.minimum(t_b, _LATEST)


def _model_losses(setup: Setup, params: Any, _: None, query: Query) -> jax.Array:
    """Return the training loss of the network in each draw."""

    network = setup.network_for("measurement")

    def predict(x_bhwc: jax.Array, t_b: jax.Array) -> jax.Array:
        return network(params, x_bhwc, t_b, query.label_b)

    x1_bhwc, x0_bhwc = (
        x_bd.reshape(-1, *setup.input_shape) for x_bd in (query.data_bd, query.noise_bd)
    )
    objective = setup.objective
    return losses(
        predict,
        objective.path,
        objective.prediction,
        objective.weight,
        x1_bhwc,
        x0_bhwc,
        query.t_b,
    )


def _optimal_losses(setup: Setup, query: Query, sums: Sums) -> jax.Array:
    """Return the training loss of the memoriser in each draw."""
    objective = setup.objective
    means = optimal.finish(objective.path, query, sums)
    # Computed beside x, not from x, which is rounded: see transport/optimal.py.
    output_bd = from_means(objective.path, objective.prediction, *means, query.t_b)
    return losses(
        lambda x, t_b: output_bd,
        objective.path,
        objective.prediction,
        objective.weight,
        query.data_bd,
        query.noise_bd,
        query.t_b,
    )


def baselines(setup: Setup, points: DataPoints, is_train: bool) -> dict[str, np.ndarray]:
    """Return {name: loss in each stratum [s]} of the output zero and the best affine maps.

    The affine maps are those of the training set, and known only there. They are left out for
    inputs of too many dimensions; those of each class also where no label is given.
    """
    options = setup.config.excess
    objective = setup.objective
    loss = (objective.path, objective.prediction, objective.weight)
    u = (np.arange(options.strata * _TIMES, dtype=np.float32) + 0.5) / (options.strata * _TIMES)
    t = _times(setup, jnp.asarray(u))

    def by_stratum(losses: jax.Array) -> np.ndarray:
        return np.asarray(losses, np.float64).reshape(options.strata, _TIMES).mean(axis=1)

    def affine(points: DataPoints) -> np.ndarray | None:
        values = covariance_eigenvalues(points)
        if values is None:
            return None
        return by_stratum(optimal.affine_losses(*loss, jnp.asarray(values, jnp.float32), t))

    found = {"zero": by_stratum(optimal.zero_losses(*loss, points.mean_square, t))}
    if not is_train:
        return found
    overall = affine(points)
    if overall is None:
        return found
    found["affine"] = overall
    if options.labels == "null":
        return found
    of_class = np.zeros(options.strata)
    for label in np.unique(points.labels_n):
        members = points.of_class(label)
        values = affine(members)
        if values is None:
            return found
        of_class += len(members) / len(points) * values
    dropout = setup.config.train.label_dropout if options.labels == "dropout" else 0.0
    found["class_affine"] = (1 - dropout) * of_class + dropout * overall
    return found


def stratum_row(
    setup: Setup, measure: Measure, points: DataPoints, order: np.ndarray, stratum: int
) -> Row:
    """Return means and standard errors over the draws of a stratum.

    Raises `UserError` if a loss of the model is not finite.
    """
    options = setup.config.excess
    numbers_n = stratum * options.draws + np.arange(options.draws, dtype=np.int32)
    rows_n = order[numbers_n % len(order)]
    model_n, memoriser_n = measure(points, rows_n, numbers_n, stratum)
    check(
        np.isfinite(model_n).all(),
        f"the model's loss is not finite in {int((~np.isfinite(model_n)).sum())} of "
        f"{options.draws} draws of part {stratum} of the times; check whether training diverged, "
        "or set sample.weights=raw",
    )
    ends = _times(setup, jnp.array([stratum, stratum + 1]) / options.strata)
    row: Row = {"stratum": stratum, "t": [float(t) for t in ends], "draws": options.draws}
    columns = {
        "model": model_n,
        "memoriser": memoriser_n,
        "difference": model_n.astype(np.float64) - memoriser_n,
    }
    for name, values_n in columns.items():
        row[name] = float(values_n.mean(dtype=np.float64))
        row[f"{name}_error"] = float(values_n.std(ddof=1, dtype=np.float64) / len(values_n) ** 0.5)
    return row
