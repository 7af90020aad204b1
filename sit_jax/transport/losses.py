"""The training objective: regression of a prediction on its target (paper eqs. 4, 7 and 8)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import check, unknown_name
from sit_jax.transport.paths import Path, drift_variance, expand_time, interpolate, target_velocity
from sit_jax.transport.prediction import Predict, check_prediction

# (path, t_b) -> weight of each example's loss
WEIGHTS: dict[str, Callable[[Path, jax.Array], jax.Array]] = {
    "none": lambda path, t: jnp.ones_like(t),
    # Turns the loss of a score or noise prediction into that of the velocity it implies.
    "velocity": lambda path, t: (drift_variance(path, t) / path.sigma(t)) ** 2,
    # Turns it into a bound on log p (Song et al., arXiv 2101.09258).
    "likelihood": lambda path, t: drift_variance(path, t) / path.sigma(t) ** 2,
}


def check_weight(weight: str, prediction: str) -> None:
    """Raise UserError for an unknown weight, or for any weight with velocity prediction.

    The reference silently ignores the latter.
    """
    if weight not in WEIGHTS:
        raise unknown_name("loss weight", weight, WEIGHTS)
    check(
        weight == "none" or prediction != "velocity",
        f"loss weight {weight!r} does nothing to a velocity prediction; use 'none', or prediction "
        "'score' or 'noise'",
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
    """Return the loss of each example, float32 [b]: weight times mean squared error.

    x1 is data and x0 noise [b, ...]; t_b [b] lies inside `train_interval`. Raises UserError for
    unknown names.
    """
    check_prediction(prediction)
    check_weight(weight, prediction)
    output = predict(interpolate(path, x1, x0, t_b), t_b).astype(jnp.float32)
    if prediction == "velocity":
        error = output - target_velocity(path, x1, x0, t_b)
    elif prediction == "noise":
        error = output - x0
    else:
        # The score's error times sigma, so that no target is divided by sigma.
        error = path.sigma(expand_time(t_b, x0)) * output + x0
    return WEIGHTS[weight](path, t_b) * jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
