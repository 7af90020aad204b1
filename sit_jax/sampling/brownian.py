"""Keyed Brownian motion on a fixed grid of times: what sample i meets at step k is a function of (key_i, k) alone.

diffrax's own paths draw one array for the whole batch, so a sample would depend on its neighbours.
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

# (step, which) -> standard normal like the state; which is 0 for the increment and 1 for its space-time Levy area.
Draw = Callable[[jax.Array, int], jax.Array]


def keyed_draw(keys_b: jax.Array, shape: tuple[int, ...]) -> Draw:
    """Draws [b, *shape] whose row i depends on keys_b[i], the step and `which`."""

    def draw(step, which):
        return jax.vmap(
            lambda key: jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(key, step), which), shape
            )
        )(keys_b)

    return draw


class GridBrownianPath(diffrax.AbstractBrownianPath):
    """Brownian increments between neighbours of `times`, with space-time Levy area for the solvers that use it.

    Over a step h: W ~ N(0, h) and, independently, H ~ N(0, h/12) (Foster et al., arXiv 1905.09130, section 2).
    """

    times: jax.Array
    draw: Draw = eqx.field(static=True)
    levy_area: type = eqx.field(static=True, default=diffrax.SpaceTimeLevyArea)

    @property
    def t0(self):
        return self.times[0]

    @property
    def t1(self):
        return self.times[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        """W(t1) - W(t0) for neighbouring grid times t0 < t1."""
        step = jnp.argmin(
            jnp.abs(self.times - t0)
        )  # the solver's times are the grid's, but for rounding
        h = t1 - t0
        w = jnp.sqrt(h) * self.draw(step, 0)
        if not use_levy:
            return w
        return diffrax.SpaceTimeLevyArea(dt=h, W=w, H=jnp.sqrt(h / 12) * self.draw(step, 1))
