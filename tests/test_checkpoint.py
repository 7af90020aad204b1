"""Checkpoints restore what was saved, keep what they promise, and refuse another model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.checkpoint import Checkpoints
from sit_jax.errors import UserError

ITEMS = ("params", "ema")


def tree(value, shape=(3, 2)):
    return {"a": {"kernel": jnp.full(shape, value)}, "b": jnp.arange(4.0) * value}


def test_round_trip_and_one_item_alone(tmp_path):
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(7, {"params": tree(1.5), "ema": tree(2.5)}, '{"seed": 3}')
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        assert checkpoints.latest_step() == 7
        restored = checkpoints.restore(7, {"ema": jax.eval_shape(lambda: tree(0.0))})
    assert restored.keys() == {"ema"}
    jax.tree.map(np.testing.assert_array_equal, restored["ema"], tree(2.5))
    assert '"seed": 3' in (tmp_path / "c" / "7" / "config" / "metadata").read_text()


def test_keeps_the_last_and_the_periodic(tmp_path):
    with Checkpoints(tmp_path / "c", ITEMS, keep_last=2, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, {"params": tree(step), "ema": tree(step)}, "{}")
        checkpoints.wait()
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == [4, 6, 7]


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    double = jax.jit(lambda t: jax.tree.map(lambda x: 2 * x, t), donate_argnums=0)
    state = {name: jax.tree.map(jnp.copy, tree(1.0, (512, 512))) for name in ITEMS}
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(1, state, "{}")
        double(state)
        checkpoints.wait()
        restored = checkpoints.restore(1, {"params": jax.eval_shape(lambda: tree(0.0, (512, 512)))})
    jax.tree.map(np.testing.assert_array_equal, restored["params"], tree(1.0, (512, 512)))


def test_another_models_arrays_are_named_with_both_shapes(tmp_path):
    with Checkpoints(tmp_path / "c", ITEMS) as checkpoints:
        checkpoints.save(1, {"params": tree(1.0), "ema": tree(1.0)}, "{}")
        checkpoints.wait()
        with pytest.raises(
            UserError, match=r"another model: a/kernel has shape \(3, 2\) there and \(5, 2\) in this config"
        ):
            checkpoints.restore(1, {"params": jax.eval_shape(lambda: tree(0.0, (5, 2)))})
        with pytest.raises(UserError, match="another model: c has shape None there"):
            checkpoints.restore(1, {"params": jax.eval_shape(lambda: tree(0.0) | {"c": jnp.zeros(1)})})
