"""Exponential moving average of the parameters."""

from typing import Any

import jax


def update(ema: Any, params: Any, decay: float) -> Any:
    """Return decay * ema + (1 - decay) * params, leaf by leaf.

    It is computed as ema + (1 - decay) * (params - ema), so that the average of a parameter that
    never moves stays exactly the same.
    """
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
