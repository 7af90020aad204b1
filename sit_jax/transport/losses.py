"""The training objective: regression of the chosen prediction on its conditional target (paper eqs. 4, 7 and 8)."""

import jax
import jax.numpy as jnp

from sit_jax.errors import check, unknown_name
from sit_jax.transport.paths import Path, drift_variance, expand_time, interpolate, target_velocity
from sit_jax.transport.prediction import Predict, check_prediction

WEIGHTS = {
    "none": lambda path, t: jnp.ones_like(t),
    "velocity": lambda path, t: (
        (drift_variance(path, t) / path.sigma(t)) ** 2
    ),  # makes it a velocity loss
    "likelihood": lambda path, t: (
        drift_variance(path, t) / path.sigma(t) ** 2
    ),  # a bound on log p (Song et al. 2101.09258)
}


def check_weight(weight: str, prediction: str) -> None:
    """`UserError` for an unknown weight, or one with velocity prediction, which the reference silently ignores."""
    if weight not in WEIGHTS:
        raise unknown_name("loss weight", weight, WEIGHTS)
    check(
        weight == "none" or prediction != "velocity",
        f"loss weight {weight!r} does nothing to a velocity prediction; use 'none', or prediction 'score' or 'noise'",
    )


def losses(
    predict: Predict,
    path: Path,
    prediction: str,
    weight: str,
    x1: jax.Array,
    x0: jax.Array,
    t_b: jax.Array,
) -> jax.Array:
    """The loss of each example, float32 [b]: the mean over its elements of the weighted squared error.

    x1 is data and x0 noise [b, ...], t_b [b] inside `train_interval`. `UserError` for unknown names.
    """
    check_prediction(prediction)
    check_weight(weight, prediction)
    output = predict(interpolate(path, x1, x0, t_b), t_b).astype(jnp.float32)
    if prediction == "velocity":
        error = output - target_velocity(path, x1, x0, t_b)
    elif prediction == "noise":
        error = output - x0
    else:  # sigma s + x0: the score's error times sigma, so that no target is divided by it
        error = path.sigma(expand_time(t_b, x0)) * output + x0
    return WEIGHTS[weight](path, t_b) * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
