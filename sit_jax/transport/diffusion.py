"""Diffusion coefficients D(t) of the reverse SDE dx = (v + D s) dt + sqrt(2 D) dW, for velocity v and score s.

The paper (eq. 5) writes v + w s / 2 and sqrt(w) dW, so its w is twice the D of the PyTorch code, whose names and
norms are kept here: SBDM with norm 1 is the paper's w^KL, "sigma" its 2 sigma, "increasing-decreasing" its 2 sin^2.
"""

import jax
import jax.numpy as jnp

from sit_jax.errors import unknown_name
from sit_jax.transport.paths import Path, drift_variance

FORMS = {
    "constant": lambda path, t, norm: jnp.full_like(t, norm),
    "SBDM": lambda path, t, norm: norm * drift_variance(path, t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    # The norm sits inside the square, as in the reference: it is no overall factor.
    "decreasing": lambda path, t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def diffusion(path: Path, form: str, t: jax.Array, norm: float = 1.0) -> jax.Array:
    """D(t) of a form, like t.

    SBDM is infinite where alpha=0 (t=0 of Linear and GVP). `UserError` for an unknown form.
    """
    if form not in FORMS:
        raise unknown_name("diffusion form", form, FORMS)
    return FORMS[form](path, t, norm)
