"""The precision of matrix products."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

Use = Literal["training", "sampling", "measurement"]

# The network's float32 products by their use, unless precision.matmul is set. NVIDIA GPUs compute
# "default" and "high" in TF32. TPUs compute them in one and in three bfloat16 passes, "highest" in
# six. On CPUs all are plain float32. tests/benchmarks/precision.py shows that "high" changes images
# by less than the error that solvers are allowed; the likelihood and losses are exact figures.
MATMUL: dict[Use, str] = {"training": "default", "sampling": "high", "measurement": "highest"}


def matmul(use: Use, chosen: str | None) -> str:
    """Return the precision of the network's float32 products; `chosen` is precision.matmul."""
    return chosen or MATMUL[use]


def precision(dtype: Any) -> lax.Precision | None:
    """Return the precision of a product whose operands have this dtype.

    None defers to `jax.default_matmul_precision`. Operands of 16 bits need only one pass of the
    matrix unit, and the TPU's compiler refuses more ("Bad lhs type").
    """
    return None if jnp.dtype(dtype).itemsize > 2 else lax.Precision.DEFAULT
