"""The quantity that a network predicts, and conversions between velocity, score and noise.

With x = alpha x1 + sigma x0 and v = alpha' x1 + sigma' x0 (both conditional means given x), any
one of velocity, score and noise gives the others: solve two linear equations (paper eqs. 6 and 7).
The score is -noise/sigma.
"""

from collections.abc import Callable

import jax

from sit_jax.errors import unknown_name
from sit_jax.transport.paths import Path, expand_time

PREDICTIONS = ("velocity", "score", "noise")
Predict = Callable[[jax.Array, jax.Array], jax.Array]  # (x [b, ...], t_b [b]) -> like x
# (x [b, ...], t_b [b]) -> (velocity like x, score like x)
VelocityAndScore = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def check_prediction(name: str) -> None:
    """Raise UserError unless the name is velocity, score or noise."""
    if name not in PREDICTIONS:
        raise unknown_name("prediction", name, PREDICTIONS)


def from_means(
    path: Path, prediction: str, data: jax.Array, noise: jax.Array, t_b: jax.Array
) -> jax.Array:
    """Return the network's output that E[x1 | x] and E[x0 | x] stand for."""
    check_prediction(prediction)
    t = expand_time(t_b, data)
    if prediction == "velocity":
        return path.d_alpha(t) * data + path.d_sigma(t) * noise
    return noise if prediction == "noise" else -noise / path.sigma(t)


def to_noise(
    path: Path, prediction: str, output: jax.Array, x: jax.Array, t_b: jax.Array
) -> jax.Array:
    """Return E[x0 | x], given the network's output at (x, t)."""
    check_prediction(prediction)
    t = expand_time(t_b, x)
    if prediction == "noise":
        return output
    if prediction == "score":
        return -path.sigma(t) * output
    # Cramer's rule: it never divides by alpha or sigma, so it holds at both ends of time.
    determinant = path.alpha(t) * path.d_sigma(t) - path.sigma(t) * path.d_alpha(t)
    return (path.alpha(t) * output - path.d_alpha(t) * x) / determinant


def to_score(
    path: Path, prediction: str, output: jax.Array, x: jax.Array, t_b: jax.Array
) -> jax.Array:
    """Return grad log p_t(x), given the network's output at (x, t).

    It is infinite where sigma=0, unless the network predicts the score itself.
    """
    if prediction == "score":
        return output
    return -to_noise(path, prediction, output, x, t_b) / path.sigma(expand_time(t_b, x))


def to_velocity(
    path: Path, prediction: str, output: jax.Array, x: jax.Array, t_b: jax.Array
) -> jax.Array:
    """Return the drift of the probability-flow ODE, given the network's output at (x, t).

    It is infinite where alpha=0, unless the network predicts the velocity itself.
    """
    if prediction == "velocity":
        return output
    t = expand_time(t_b, x)
    noise = to_noise(path, prediction, output, x, t_b)
    data = (x - path.sigma(t) * noise) / path.alpha(t)
    return from_means(path, "velocity", data, noise, t_b)


def velocity_field(predict: Predict, path: Path, prediction: str) -> Predict:
    """Return the network as a velocity: (x, t_b) -> drift of the probability-flow ODE."""
    return lambda x, t_b: to_velocity(path, prediction, predict(x, t_b), x, t_b)


def velocity_and_score(predict: Predict, path: Path, prediction: str) -> VelocityAndScore:
    """Return both fields, computed from a single call of the network."""

    def fields(x: jax.Array, t_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = predict(x, t_b)
        velocity = to_velocity(path, prediction, output, x, t_b)
        score = to_score(path, prediction, output, x, t_b)
        return velocity, score

    return fields
