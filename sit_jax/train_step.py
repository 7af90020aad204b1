"""One training step: draw all random values for the entire batch, then make one update.

Every function here is pure. The loss returns a scalar and a dict of named scalars; each of them,
and each scalar that `update` adds, reaches all logs by its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sit_jax import ema, rng
from sit_jax.models.conditioning import ClassLabels
from sit_jax.train_state import TrainState
from sit_jax.transport.interval import Interval
from sit_jax.transport.losses import losses
from sit_jax.transport.paths import Path
from sit_jax.transport.times import training_times

# (params, x_bhwc, t_b, condition) -> like x_bhwc
Network = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
Records = Mapping[str, jax.Array]  # a batch of records
Encode = Callable[[jax.Array, Records], jax.Array]  # (keys_b, records) -> x1_bhwc
Examples = Mapping[str, Any]  # x1 and x0 [b, h, w, c], t [b], condition (a pytree of [b, ...])
Scalars = dict[str, jax.Array]
Loss = Callable[[Any, Examples], tuple[jax.Array, Scalars]]  # of (params, examples)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The function to learn: the interpolant, the prediction, the distributions of its inputs."""

    path: Path
    prediction: str
    weight: str
    interval: Interval
    times: str
    times_mean: float
    times_std: float
    label_dropout: float
    conditioning: ClassLabels


def draw_examples(
    objective: Objective, encode: Encode, seed: int, step: jax.Array, records: Records
) -> Examples:
    """Draw the random values of a step, a function of (seed, step) and the position in the batch.

    They are drawn for the global batch before it is split, so they depend neither on the number of
    devices nor on accumulation.
    """
    size = len(next(iter(records.values())))
    x1 = encode(jax.random.split(rng.key(seed, "posterior", step), size), records)
    x0 = jax.random.normal(rng.key(seed, "noise", step), x1.shape, jnp.float32)
    t = training_times(
        rng.key(seed, "time", step),
        size,
        objective.interval,
        objective.times,
        objective.times_mean,
        objective.times_std,
    )
    conditioning = objective.conditioning
    condition = conditioning.drop(
        rng.key(seed, "label dropout", step),
        conditioning.from_records(records),
        objective.label_dropout,
    )
    return {"x1": x1, "x0": x0, "t": t, "condition": condition}


def batch_loss(
    network: Network, objective: Objective, params: Any, examples: Examples
) -> tuple[jax.Array, Scalars]:
    """Return the mean loss over the examples, float32, and further scalars to log (none here)."""

    def predict(x_bhwc: jax.Array, t_b: jax.Array) -> jax.Array:
        return network(params, x_bhwc, t_b, examples["condition"])

    losses_b = losses(
        predict,
        objective.path,
        objective.prediction,
        objective.weight,
        examples["x1"],
        examples["x0"],
        examples["t"],
    )
    return jnp.mean(losses_b), {}


def update(
    state: TrainState,
    examples: Examples,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int = 1,
) -> tuple[TrainState, Scalars]:
    """Make one optimizer step on the mean gradient of `loss(params, examples)`, then an EMA step.

    The scalars are the loss before the update and those that `loss` adds, the global gradient norm
    before clipping, and whether loss and norm are finite. If they are not, the step counts but
    nothing else of the state changes.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    (value, scalars), grads = _mean_over_microbatches(
        value_and_grad, state.params, examples, accumulation
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    new = TrainState(state.step, params, ema.update(state.ema, params, ema_decay), opt_state)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    scalars = {"loss": value, **scalars, "grad_norm": grad_norm, "finite": finite}
    return new.replace(step=state.step + 1), scalars


def _mean_over_microbatches(
    value_and_grad: Callable, params: Any, examples: Examples, count: int
) -> Any:
    """Return the mean of `value_and_grad(params, microbatch)` over `count` microbatches."""
    if count == 1:
        return value_and_grad(params, examples)

    # Every count-th example, so that each microbatch is split over the devices as the batch is:
    # [b, ...] -> [b/count, count, ...] -> [count, b/count, ...].
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(len(x) // count, count, *x.shape[1:]), 1, 0)

    def add(total: Any, microbatch: Examples) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch)), None

    shapes = jax.eval_shape(value_and_grad, params, examples)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, examples))
    return jax.tree.map(lambda x: x / count, total)
