"""Brownian motion on a fixed grid of times: sample i's noise at step k depends only on (key_i, k).

diffrax's own paths draw one array for the entire batch, so a sample would depend on its neighbours.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

Time = int | float | jax.Array | np.ndarray
# (step, which) -> standard normal like the state. `which` is 0 for the increment of the step and 1
# for its space-time Levy area.
Draw = Callable[[jax.Array, int], jax.Array]


def keyed_draw(keys_b: jax.Array, shape: tuple[int, ...]) -> Draw:
    """Return draws [b, *shape] whose row i depends only on keys_b[i], the step and `which`."""

    def draw(step: jax.Array, which: int) -> jax.Array:
        def row(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, step), which)
            return jax.random.normal(key, shape, jnp.float32)

        return jax.vmap(row)(keys_b)

    return draw


class GridBrownianPath(diffrax.AbstractBrownianPath):
    """Brownian increments between neighbours of `times`.

    Solvers that ask for it also get the space-time Levy area: over a step h, W ~ N(0, h) and,
    independently, H ~ N(0, h/12) (Foster et al., arXiv 1905.09130, section 2).
    """

    times: jax.Array
    draw: Draw = eqx.field(static=True)
    levy_area: type[diffrax.SpaceTimeLevyArea] = eqx.field(
        static=True, default=diffrax.SpaceTimeLevyArea, kw_only=True
    )

    # equinox lets a property implement an abstract attribute; mypy does not.
    @property
    def t0(self) -> jax.Array:  # type: ignore[override]
        return self.times[0]

    @property
    def t1(self) -> jax.Array:  # type: ignore[override]
        return self.times[-1]

    def evaluate(
        self, t0: Time, t1: Time | None = None, left: bool = True, use_levy: bool = False
    ) -> Any:
        """Return W(t1) - W(t0) for neighbouring grid times t0 < t1, with H if `use_levy`."""
        assert t1 is not None, "an increment has two ends"
        # The solver's times are those of the grid up to rounding, so take the nearest.
        step = jnp.argmin(jnp.abs(self.times - t0))
        h = t1 - t0
        w = jnp.sqrt(h) * self.draw(step, 0)
        if not use_levy:
            return w
        return diffrax.SpaceTimeLevyArea(dt=h, W=w, H=jnp.sqrt(h / 12) * self.draw(step, 1))
