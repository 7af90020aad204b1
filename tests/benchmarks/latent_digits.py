"""Train on stored latents of the digits; say how many samples a classifier reads as their label.

    python tests/benchmarks/latent_digits.py [--steps 300]

Takes about four minutes on 2 busy cores. Trains an autoencoder of 167,381 parameters on the digits
of scikit-learn for 600 steps, writes it as diffusers does, stores the latents of the training half
with `--mode encode`, trains configs/digits.py on them for 300 steps, and draws 500 samples, which
the autoencoder decodes. The classifier is that of `--mode quality`. The same is said of the test
half as the autoencoder reconstructs it, which is as good as samples can get.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

import sit_jax
from sit_jax import main
from sit_jax.data.digits import open_digits
from sit_jax.data.source import ArraySource, SourceOptions
from sit_jax.image_io import to_uint8
from sit_jax.latents import files, posterior
from sit_jax.latents.autoencoder import AutoencoderKL, VaeArchitecture
from sit_jax.latents.pixels import normalise
from sit_jax.metrics.pixels import as_features, fit_classifier

ARCHITECTURE = VaeArchitecture(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, image_channels=1
)
VAE_STEPS = 600
KL_WEIGHT = 1e-4
SAMPLES = 500


def digits(split: str) -> ArraySource:
    """Open a half of the digits."""
    return open_digits(SourceOptions(None, None, split, 8, 1, None))


def train_vae(images_nhwc: np.ndarray) -> Any:
    """Return the parameters of an autoencoder of these images."""
    vae = AutoencoderKL(ARCHITECTURE)
    x_nhwc = normalise(jnp.asarray(images_nhwc))
    params = vae.init(jax.random.key(0), x_nhwc[:1])["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, VAE_STEPS))

    def loss(params: Any, x_bhwc: jax.Array, key: jax.Array) -> jax.Array:
        moments = vae.apply({"params": params}, x_bhwc, method="encode")
        z_bhwc = posterior.draw(jax.random.split(key, len(x_bhwc)), moments)
        again = vae.apply({"params": params}, z_bhwc, method="decode")
        mean, logvar = jnp.split(moments, 2, axis=-1)
        divergence = jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar) / 2
        return jnp.mean((again - x_bhwc) ** 2) + KL_WEIGHT * divergence

    @jax.jit
    def step(params: Any, state: Any, number: jax.Array) -> tuple[Any, Any]:
        draw, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        rows = jax.random.choice(draw, len(x_nhwc), (128,))
        grads = jax.grad(loss)(params, x_nhwc[rows], noise)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(VAE_STEPS):
        params, state = step(params, state, number)
    return params


def write_vae(folder: pathlib.Path, params: Any, scale: float) -> None:
    """Write an autoencoder as diffusers does."""
    blocks = len(ARCHITECTURE.block_out_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(ARCHITECTURE.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "in_channels": ARCHITECTURE.image_channels,
        "out_channels": ARCHITECTURE.image_channels,
        "latent_channels": ARCHITECTURE.latent_channels,
        "layers_per_block": ARCHITECTURE.layers_per_block,
        "norm_num_groups": ARCHITECTURE.norm_num_groups,
        "scaling_factor": scale,
    }
    folder.mkdir()
    (folder / files.CONFIG).write_text(json.dumps(config))
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        # [h, w, in, out] -> [out, in, h, w], and [in, out] -> [out, in].
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        tensors[files.torch_name(path)] = np.ascontiguousarray(array)
    safetensors.numpy.save_file(tensors, folder / files.WEIGHTS)


def run(*arguments: object) -> None:
    """Run a job; exit if it fails."""
    if status := main.main([str(argument) for argument in arguments]):
        sys.exit(status)


def measure(folder: pathlib.Path, steps: int) -> None:
    """Train everything in a folder and print the shares that are read as their label."""
    train, test = digits("train"), digits("test")
    vae = AutoencoderKL(ARCHITECTURE)
    params = train_vae(train.images)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    moments = vae.apply({"params": params}, normalise(train.images), method="encode")
    scale = round(1 / float(np.std(moments[..., : ARCHITECTURE.latent_channels])), 4)
    write_vae(folder / "vae", params, scale)
    common = ["--config", "configs/digits.py"]
    latents = {"codec": "sd-vae", "path": folder / "vae", "scale": scale, "batch": 128}
    common += [f"--config.latents.{key}={value}" for key, value in latents.items()]
    run("--mode", "encode", *common, "--workdir", folder / "latents")
    data = {"source": "latents", "path": folder / "latents", "split": "all"}
    data |= {"image_size": 4, "channels": ARCHITECTURE.latent_channels}
    run(
        *common,
        *(f"--config.data.{key}={value}" for key, value in data.items()),
        "--config.model.patch=1",
        f"--config.train.steps={steps}",
        "--config.train.ema_decay=0.98",
        "--config.log.sheet_every=0",
        "--workdir",
        folder / "run",
    )
    labels = np.arange(SAMPLES) % 10
    samples = sit_jax.load(folder / "run").sample(labels=labels)
    encoded = vae.apply({"params": params}, normalise(test.images), method="encode")
    mean = encoded[..., : ARCHITECTURE.latent_channels]
    again = to_uint8(np.asarray(vae.apply({"params": params}, mean, method="decode")))
    classifier = fit_classifier(as_features(train.images), train.labels)

    def share(images: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean(classifier.predict(as_features(images)) == labels))

    print(f"autoencoder: {count:,} parameters, latents of 4x4x4 scaled by {scale:g}")
    print(f"read as their label: {share(test.images, test.labels):.1%} of the test half")
    print(f"    {share(again, test.labels):.1%} of the test half, reconstructed")
    print(f"    {share(samples, labels):.1%} of {SAMPLES} samples after {steps} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as main_folder:
        measure(pathlib.Path(main_folder), options.steps)
