"""Exponential moving average of the parameters."""

import jax


def update(ema, params, decay: float):
    """decay ema + (1 - decay) params, leaf by leaf: a parameter that never moves keeps its value exactly."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
