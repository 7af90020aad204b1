"""The precision of matrix products."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def precision(dtype: Any) -> lax.Precision | None:
    """Return the precision of a product whose operands have this dtype.

    None defers to `jax.default_matmul_precision`. Operands of 16 bits need only one pass of the
    matrix unit, and the TPU's compiler refuses more ("Bad lhs type").
    """
    return None if jnp.dtype(dtype).itemsize > 2 else lax.Precision.DEFAULT
