"""Where time starts and stops: some predictions have a singular end, which a small eps keeps away from."""

from sit_jax.errors import check
from sit_jax.transport.paths import Path

Interval = tuple[float, float]
SINGULAR_FORM_EPS = 1e-3  # start of an SDE whose diffusion is infinite at t=0


def check_eps(name: str, eps: float | None) -> None:
    """`UserError` unless eps is None (the default of path and prediction) or inside (0, 0.5)."""
    check(
        eps is None or 0 < eps < 0.5,
        f"{name} is {eps}; expected a number inside (0, 0.5): give one, or leave it unset for the path's default",
    )


def default_train_eps(path: Path, prediction: str) -> float:
    """The reference's defaults: VP 1e-5; Linear and GVP 0 for velocity, else 1e-3."""
    return 1e-5 if path.name == "VP" else _regular_or_small(prediction)


def default_sample_eps(path: Path, prediction: str) -> float:
    """The reference's defaults: VP 1e-3; Linear and GVP 0 for velocity, else 1e-3."""
    return 1e-3 if path.name == "VP" else _regular_or_small(prediction)


def _regular_or_small(prediction: str) -> float:
    return 0.0 if prediction == "velocity" else 1e-3


def train_interval(path: Path, prediction: str, eps: float | None = None) -> Interval:
    """[t0, t1] of the training times. eps None is the default; unlike the reference, a given one is always honoured."""
    return _interval(path, default_train_eps(path, prediction) if eps is None else eps)


def ode_interval(path: Path, prediction: str, eps: float | None = None) -> Interval:
    """[t0, t1] of the probability-flow ODE, noise to data; the way back is the same interval backwards."""
    return _interval(path, default_sample_eps(path, prediction) if eps is None else eps)


def sde_interval(
    path: Path, prediction: str, form: str, last_step_size: float, eps: float | None = None
) -> Interval:
    """[t0, t1] of the stochastic steps; a last step of size > 0 then goes from 1 - last_step_size to 1."""
    t0, t1 = ode_interval(path, prediction, eps)
    if form == "SBDM" and t0 == 0 and not path.noise_remains_at_0:
        t0 = SINGULAR_FORM_EPS
    return t0, 1 - last_step_size if last_step_size else t1


def _interval(path: Path, eps: float) -> Interval:
    return (0.0 if path.noise_remains_at_0 else eps), 1 - eps
