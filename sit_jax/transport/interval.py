"""The interval of times in training and sampling.

Some predictions are singular at an end of time; a small eps keeps the interval away from that end.
"""

from sit_jax.transport.paths import Path

Interval = tuple[float, float]
SINGULAR_FORM_EPS = 1e-3  # start of an SDE whose diffusion is infinite at t=0


def default_train_eps(path: Path, prediction: str) -> float:
    """Return the reference's eps: the path's, or 0 if neither end of time is singular."""
    return 0.0 if _is_regular(path, prediction) else path.train_eps


def default_sample_eps(path: Path, prediction: str) -> float:
    """Return the reference's eps: the path's, or 0 if neither end of time is singular."""
    return 0.0 if _is_regular(path, prediction) else path.sample_eps


def _is_regular(path: Path, prediction: str) -> bool:
    return prediction == "velocity" and path.velocity_is_bounded


def train_interval(path: Path, prediction: str, eps: float | None = None) -> Interval:
    """Return [t0, t1] of the training times.

    None takes the default eps. Unlike the reference, a given eps is always honoured.
    """
    return _interval(path, default_train_eps(path, prediction) if eps is None else eps)


def ode_interval(path: Path, prediction: str, eps: float | None = None) -> Interval:
    """Return [t0, t1] of the probability-flow ODE, from noise to data.

    From data to noise, the ODE runs over the same interval backwards.
    """
    return _interval(path, default_sample_eps(path, prediction) if eps is None else eps)


def sde_interval(
    path: Path, prediction: str, form: str, last_step_size: float, eps: float | None = None
) -> Interval:
    """Return [t0, t1] of an SDE's stochastic steps.

    A last step of size > 0 then goes from 1 - last_step_size to 1.
    """
    t0, t1 = ode_interval(path, prediction, eps)
    if form == "SBDM" and t0 == 0 and not path.noise_remains_at_0:
        t0 = SINGULAR_FORM_EPS
    return t0, 1 - last_step_size if last_step_size else t1


def _interval(path: Path, eps: float) -> Interval:
    return (0.0 if path.noise_remains_at_0 else eps), 1 - eps
