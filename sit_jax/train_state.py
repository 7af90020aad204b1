"""The state that a training run carries from step to step.

Nothing else is stored, and nothing in it is random.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sit_jax import sharding

CHECKPOINT_ITEMS = ("params", "ema", "opt_state")  # the step is the checkpoint's own number


@flax.struct.dataclass
class TrainState:
    """Parameters, their moving average and the optimizer's state after a number of steps."""

    step: jax.Array  # int32: steps taken
    params: Any
    ema: Any  # like params
    opt_state: Any

    def items(self) -> dict[str, Any]:
        """Return the parts that a checkpoint stores, by name."""
        return {name: getattr(self, name) for name in CHECKPOINT_ITEMS}


def init(init_params: Callable[[], Any], optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; the EMA starts as a copy of the parameters."""
    params = init_params()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def abstract(
    init_params: Callable[[], Any], optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Return shapes, dtypes and shardings of the state, without memory: the target of a restore."""
    shapes = jax.eval_shape(lambda: init(init_params, optimizer))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )


def create(
    init_params: Callable[[], Any], optimizer: optax.GradientTransformation, target: TrainState
) -> TrainState:
    """Create the state before the first step, sharded as `target` (from `abstract`).

    It is created sharded: no device ever holds all of it.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda: init(init_params, optimizer), out_shardings=shardings)()
