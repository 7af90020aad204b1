"""How many passes a matrix unit makes for a product."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def precision(dtype: Any) -> lax.Precision | None:
    """Of a product of operands of this type: None leaves it to `jax.default_matmul_precision`.

    One pass is exact for operands of 16 bits, and the TPU's compiler knows no more of them ("Bad lhs type").
    """
    return None if jnp.dtype(dtype).itemsize > 2 else lax.Precision.DEFAULT
