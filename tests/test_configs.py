"""Every file of configs/ has valid values, its model can be built, and it trains for two steps."""

import ast
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax import main
from sit_jax.errors import UserError
from sit_jax.jobs import train
from sit_jax.jobs.data import abstract_batch
from sit_jax.jobs.setup import set_up
from sit_jax.models.sizes import SIZES
from tests import caches, goldens

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.py")) if path.name != "__init__.py"]
ONE_DEVICE = {"mesh.data": "-1", "mesh.fsdp": "1", "mesh.tensor": "1"}
# Overrides that make a small run of any config. They keep its path, prediction, optimizer and
# precision.
TINY = ONE_DEVICE | {
    "model.depth": "1",
    "model.width": "16",
    "model.heads": "2",
    "model.patch": "4",
    "data.workers": "0",
    "train.steps": "2",
    "train.batch": "8",
    "train.accumulation": "1",
    "log.every": "1",
    "log.sheet_every": "0",
    "log.tensorboard": "False",
    "log.wandb_project": "none",
    "checkpoint.every": "2",
}
# Overrides of a config that reads a folder: 8 images in 2 classes.
TINY_FOLDER = {"data.image_size": "16", "data.classes": "2"}
# Overrides of a config that reads stored latents: 23 of 8x8x4 in 2 classes.
TINY_CACHE = {"data.image_size": "8", "data.classes": "2"}
# Overrides of a config in latent space: a tiny autoencoder.
TINY_LATENTS = {"latents.path": str(goldens.FOLDER / "vae_legacy"), "latents.repo": "none"}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_are_configs():
    assert "digits" in [path.stem for path in FILES]


@each_file
def test_its_docstring_shows_its_command(path):
    tree = ast.parse(path.read_text())
    assert f"--config configs/{path.name}" in ast.get_docstring(tree)


def make_images(folder):
    """Write eight images of noise in two classes; return the folder."""
    for i in range(8):
        file = folder / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        ).save(file)
    return folder


def make_latents(folder):
    """Write latents of noise in two classes, scaled as those of the SD-VAE; return the folder."""
    plan = caches.make_plan(
        shape=(8, 8, 4), scale=(0.18215,) * 4, shift=(0.0,) * 4, autoencoder={"name": "sd-vae"}
    )
    caches.write(folder, plan)
    return folder


@each_file
def test_its_model_and_state_have_shapes(path):
    """At full size, with abstract arrays that take no memory."""
    config = config_lib.load(str(path), list(ONE_DEVICE.items()))
    setup = set_up(config)
    state = setup.abstract_state
    # The first leaf belongs to the blocks, which are stacked over the layers.
    assert jax.tree.leaves(state.params)[0].shape[0] == setup.size.depth
    assert jax.tree.map(jnp.shape, state.ema) == jax.tree.map(jnp.shape, state.params)
    after, metrics = jax.eval_shape(
        train.make_train_step(setup), state, abstract_batch(setup), setup.codec.abstract_params
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics["loss"].shape == ()


@each_file
def test_two_steps_of_it_train(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    config = config_lib.load(str(path))
    tiny = dict(TINY)
    if config.data.source == "folder":
        tiny |= TINY_FOLDER | {"data.path": str(make_images(tmp_path / "images"))}
    if config.data.source == "latents":
        tiny |= TINY_CACHE | {"data.path": str(make_latents(tmp_path / "latents"))}
    if config.latents.codec == "sd-vae":
        tiny |= TINY_LATENTS
    flags = [f"--config.{key}={text}" for key, text in tiny.items()]
    assert main.main(["--config", str(path), "--workdir", str(tmp_path / "run"), *flags]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(
        math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in rows
    )
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("image_size", [256, 512])
def test_imagenet_comes_in_all_sizes(name, image_size):
    config = config_lib.load(
        f"{CONFIGS / 'imagenet.py'}:{name},{image_size}", list(ONE_DEVICE.items())
    )
    setup = set_up(config)
    assert setup.size == SIZES[name] and setup.input_shape == (image_size // 8, image_size // 8, 4)
    published = (
        config.train.batch,
        config.optimizer.learning_rate,
        config.train.ema_decay,
        config.train.label_dropout,
    )
    assert published == (256, 1e-4, 0.9999, 0.1)


@pytest.mark.parametrize("argument", ["SiT-XL/2", "SiT-XL/2,128", "256"])
def test_imagenet_refuses_other_arguments(argument):
    with pytest.raises(
        UserError, match=r"expected a size and 256 or 512 pixels, such as SiT-XL/2,256"
    ):
        config_lib.load(f"{CONFIGS / 'imagenet.py'}:{argument}")
    with pytest.raises(UserError, match="unknown model.name 'SiT-X/2'"):
        config_lib.load(f"{CONFIGS / 'imagenet.py'}:SiT-X/2,256")
