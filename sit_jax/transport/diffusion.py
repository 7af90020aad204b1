"""Diffusion coefficients D(t) of the reverse SDE dx = (v + D s) dt + sqrt(2 D) dW.

v is the velocity and s the score. The paper (eq. 5) writes v + w s / 2 and sqrt(w) dW, so its w is
twice D. Names and norms are those of the PyTorch reference: SBDM with norm 1 is the paper's w^KL,
"sigma" its 2 sigma, "increasing-decreasing" its 2 sin^2.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name
from sit_jax.transport.paths import Path, drift_variance

# (path, t, norm) -> D like t
FORMS: dict[str, Callable[[Path, jax.Array, float], jax.Array]] = {
    "constant": lambda path, t, norm: jnp.full_like(t, norm),
    "SBDM": lambda path, t, norm: norm * drift_variance(path, t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    # The norm is inside the square, as in the reference: it does not scale D as in other forms.
    "decreasing": lambda path, t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def diffusion(path: Path, form: str, t: jax.Array, norm: float = 1.0) -> jax.Array:
    """Return D(t) of a form, like t.

    SBDM is infinite where alpha=0 (t=0 of Linear and GVP). Raises UserError for an unknown form.
    """
    if form not in FORMS:
        raise unknown_name("diffusion form", form, FORMS)
    return FORMS[form](path, t, norm)
