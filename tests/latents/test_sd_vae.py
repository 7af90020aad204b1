"""The autoencoder against diffusers' own, its codec, and every file that cannot be used."""

import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sit_jax.errors import UserError
from sit_jax.latents import files, open_codec
from sit_jax.latents.autoencoder import Architecture, AutoencoderKL
from tests import goldens
from tests.goldens import nhwc, relative_error

SCALE = 0.18215
DEFAULTS = dict(path=None, repo="stabilityai/sd-vae-ft-ema", revision=None, dtype="float32", scale=SCALE, batch=8)
each_case = pytest.mark.parametrize("case", goldens.cases("vae", "vae"), ids=lambda case: case["name"])


def sd_vae(folder="vae_legacy", **changes):
    path = str(goldens.FOLDER / folder) if isinstance(folder, str) else str(folder)
    return open_codec("sd-vae", **(DEFAULTS | {"path": path} | changes))


def arrays_of(case):
    arrays = goldens.load("vae")[1]
    return {name: arrays[key] if name.endswith("nhwc") else nhwc(arrays[key]) for name, key in case["arrays"].items()}


# Equal to diffusers


@each_case
def test_posterior_and_decoder_equal_diffusers(case):
    folder, arrays = str(goldens.FOLDER / case["folder"]), arrays_of(case)
    architecture = files.read_architecture(folder, "", None, SCALE)
    codec = sd_vae(case["folder"])
    vae, params = AutoencoderKL(architecture), codec.load()
    mean, logvar = jnp.split(jax.jit(lambda x: vae.apply({"params": params}, x, method="encode"))(arrays["x"]), 2, -1)
    # 30 layers of float32 sums in another order: measured 1e-6 to 3e-6.
    assert relative_error(mean, arrays["mean"]) < 1e-5
    assert relative_error(logvar, arrays["logvar"]) < 1e-5
    assert relative_error(vae.apply({"params": params}, arrays["z"], method="decode"), arrays["decoded"]) < 1e-5
    assert architecture.factor == case["downsampling"]
    height, width, channels = arrays["mean"].shape[1:]
    assert codec.shape(arrays["x"].shape[1:]) == (height, width, channels)


@each_case
def test_the_codec_draws_scales_and_decodes_as_diffusers(case, monkeypatch):
    arrays, codec = arrays_of(case), sd_vae(case["folder"])
    params = codec.load()
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(arrays["noise"]).reshape(shape))
    x = codec.encode(params, jax.random.key(0), arrays["x"])
    assert relative_error(x, arrays["scaled_latent"]) < 1e-5
    assert relative_error(codec.decode(params, x), arrays["round_trip"]) < 1e-5
    assert codec.scale == SCALE
