"""Every file of configs/: its values are possible, its model can be built, and two steps of it train."""

import ast
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from sit_jax import config as config_lib
from sit_jax import main, train_state
from sit_jax.jobs.setup import set_up

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.py")) if path.name != "__init__.py"]
ONE_DEVICE = {"mesh.data": "-1", "mesh.fsdp": "1", "mesh.tensor": "1"}
# The one small run that any config becomes: what it says of path, prediction, optimizer, precision and the like stays.
TINY = ONE_DEVICE | {
    "model.depth": "1", "model.width": "16", "model.heads": "2", "model.patch": "4",
    "data.source": "digits", "data.path": "none", "data.split": "train", "data.workers": "0",
    "data.image_size": "8", "data.channels": "1", "data.classes": "10", "latents.codec": "pixels",
    "train.steps": "2", "train.batch": "8", "train.accumulation": "1",
    "log.every": "1", "log.sheet_every": "0", "log.tensorboard": "False", "log.wandb_project": "none",
    "checkpoint.every": "2",
}  # fmt: skip

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_configs():
    assert "digits" in [path.stem for path in FILES]


@each_file
def test_it_is_values_in_a_function_under_a_docstring_with_its_command(path):
    tree = ast.parse(path.read_text())
    assert f"--config configs/{path.name}" in ast.get_docstring(tree)


@each_file
def test_its_model_and_state_have_shapes(path):
    """At its full size, with no memory behind it."""
    config = config_lib.load(str(path), list(ONE_DEVICE.items()))
    setup = set_up(config)
    state = train_state.abstract(setup.init_params, setup.optimizer, setup.mesh)
    assert jax.tree.leaves(state.params)[0].shape[0] == setup.size.depth  # blocks, stacked over the layers
    assert jax.tree.map(jnp.shape, state.ema) == jax.tree.map(jnp.shape, state.params)
    x_bhwc = jax.ShapeDtypeStruct((config.train.batch, *setup.input_shape), jnp.float32)
    t_b, y_b = (jax.ShapeDtypeStruct((config.train.batch,), dtype) for dtype in (jnp.float32, jnp.int32))
    assert jax.eval_shape(setup.network, state.params, x_bhwc, t_b, y_b).shape == x_bhwc.shape


@each_file
def test_two_steps_of_it_train(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    flags = [f"--config.{key}={text}" for key, text in TINY.items()]
    assert main.main(["--config", str(path), "--workdir", str(tmp_path / "run"), *flags]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
