"""One training step: draw what is random for the whole batch, then one update from it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sit_jax import ema, rng
from sit_jax.models.label_dropout import drop_labels
from sit_jax.train_state import TrainState
from sit_jax.transport.interval import Interval
from sit_jax.transport.losses import losses
from sit_jax.transport.paths import Path
from sit_jax.transport.times import training_times

Network = Callable[
    [Any, jax.Array, jax.Array, jax.Array], jax.Array
]  # (params, x_bhwc, t_b, y_b) -> like x
Encode = Callable[[jax.Array, jax.Array], jax.Array]  # (keys_b, images_bhwc in [-1, 1]) -> x1_bhwc
Examples = Mapping[str, jax.Array]  # x1, x0 [b, h, w, c], t, y [b]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learned: the interpolant, its prediction, and how times and labels are drawn."""

    path: Path
    prediction: str
    weight: str
    interval: Interval
    times: str
    times_mean: float
    times_std: float
    label_dropout: float
    null_label: int


def draw_examples(
    objective: Objective,
    encode: Encode,
    seed: int,
    step: jax.Array,
    images_bhwc: jax.Array,
    labels_b: jax.Array,
) -> Examples:
    """Everything random of a step, as a function of (seed, step) and the position in the global batch.

    It is drawn before the batch is split, so neither devices nor accumulation change it. Images are float32 in [-1, 1].
    """
    x1 = encode(jax.random.split(rng.key(seed, "posterior", step), len(images_bhwc)), images_bhwc)
    x0 = jax.random.normal(rng.key(seed, "noise", step), x1.shape)
    t = training_times(
        rng.key(seed, "time", step),
        len(x1),
        objective.interval,
        objective.times,
        objective.times_mean,
        objective.times_std,
    )
    y = drop_labels(
        rng.key(seed, "label dropout", step),
        labels_b,
        objective.label_dropout,
        objective.null_label,
    )
    return {"x1": x1, "x0": x0, "t": t, "y": y}


def batch_loss(
    network: Network, objective: Objective, params: Any, examples: Examples
) -> jax.Array:
    """The mean loss over the examples, a float32 scalar."""

    def predict(x_bhwc, t_b):
        return network(params, x_bhwc, t_b, examples["y"])

    return jnp.mean(
        losses(
            predict,
            objective.path,
            objective.prediction,
            objective.weight,
            examples["x1"],
            examples["x0"],
            examples["t"],
        )
    )


def update(
    state: TrainState,
    examples: Examples,
    *,
    loss: Callable[[Any, Examples], jax.Array],
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulation: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean gradient of `loss(params, examples)`, then the EMA.

    Metrics are scalars: the loss before the update, the global gradient norm before any clipping, and whether both are
    finite. If they are not, the step counts but nothing else of the state changes.
    """
    value, grads = _mean_over_microbatches(
        jax.value_and_grad(loss), state.params, examples, accumulation
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    new = TrainState(state.step, params, ema.update(state.ema, params, ema_decay), opt_state)
    new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    return new.replace(step=state.step + 1), {
        "loss": value,
        "grad_norm": grad_norm,
        "finite": finite,
    }


def _mean_over_microbatches(
    value_and_grad: Callable, params: Any, examples: Examples, n: int
) -> Any:
    if n == 1:
        return value_and_grad(params, examples)
    # Every n-th example, so that each microbatch is spread over the devices as the batch is.
    micro = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x) // n, n, *x.shape[1:]), 1, 0), examples
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, params, examples)
    )
    total, _ = jax.lax.scan(add, zeros, micro)
    return jax.tree.map(lambda x: x / n, total)
