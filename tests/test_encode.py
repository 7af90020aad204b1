"""Stored latents are what the autoencoder gives, and train as the autoencoder in the step does."""

import contextlib
import io
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sit_jax import config as config_lib
from sit_jax import main, train_step
from sit_jax.data import latent_cache, pipeline
from sit_jax.jobs import encode
from sit_jax.jobs.data import open_source
from sit_jax.jobs.setup import set_up
from sit_jax.latents.pixels import normalise
from tests import goldens
from tests.processes import Processes

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
IMAGES = 11
# vae_legacy: cells of 2 pixels, 4 channels.
IMAGE_SETTINGS = {
    "model.depth": 1, "model.width": 16, "model.heads": 2, "model.patch": 4,
    "model.learn_sigma": False, "data.source": "folder", "data.image_size": 16,
    "data.channels": 3, "data.classes": 2, "data.workers": 0, "data.flip": True,
    "latents.codec": "sd-vae", "latents.path": goldens.FOLDER / "vae_legacy", "latents.batch": 3,
    "encode.shard": 4, "train.steps": 3, "train.batch": 8, "train.ema_decay": 0.5,
    "optimizer.learning_rate": 0.02, "checkpoint.every": 3, "log.every": 1, "log.sheet_every": 0,
    "log.sheet_count": 4, "log.tensorboard": False, "sample.solver": "heun", "sample.steps": 2,
    "sample.count": 4, "sample.batch": 4,
}  # fmt: skip
LATENT_SETTINGS = IMAGE_SETTINGS | {
    "data.source": "latents", "data.image_size": 8, "data.channels": 4,
}  # fmt: skip


def flags(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]


def call(*arguments):
    """Return main's exit status, its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def run(mode, workdir, settings, **changes):
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    config = CONFIGS / "imagenet.py"
    return call(
        "--mode", mode, "--config", config, "--workdir", workdir, *flags(settings | changed)
    )


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of noise images in two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def latents(images, tmp_path_factory):
    """Return the latents of the images in float32, and what the command printed."""
    folder = tmp_path_factory.mktemp("latents") / "train"
    status, out, err = run(
        "encode", folder, IMAGE_SETTINGS, data__path=images, encode__dtype="float32"
    )
    assert (status, err) == (0, "")
    return folder, out


def opened(settings, **changes):
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [(key, str(value)) for key, value in (settings | changed).items()]
    setup = set_up(config_lib.load(str(CONFIGS / "imagenet.py"), overrides))
    return setup, open_source(setup)


def test_the_moments_of_each_image_and_its_mirror_image_are_stored(images, latents):
    folder, out = latents
    setup, source = opened(IMAGE_SETTINGS, data__path=images)
    _, stored = opened(LATENT_SETTINGS, data__path=folder)
    moments_of = jax.jit(setup.codec.moments)
    assert len(stored) == len(source) == IMAGES and stored.class_names == source.class_names
    for index in range(IMAGES):
        for mirrored in (False, True):
            record = source.read(index, mirrored)
            expected = moments_of(setup.codec_params, {"image": record["image"][None]})
            read = stored.read(index, mirrored)
            # Other batches compile to other orders of summation.
            np.testing.assert_allclose(read["moments"], expected[0], rtol=2e-5, atol=2e-5)
            assert read["label"] == record["label"]
    mirror_of_latent = stored.read(0)["moments"][:, ::-1]
    assert np.abs(stored.read(0, True)["moments"] - mirror_of_latent).max() > 0.01
    assert "encoding 11 images and their mirror images to 8x8x4 float32" in out
    assert "3 shards, 0 of them complete" in out and "11 records of 2 classes" in out


def test_the_manifest_says_what_the_latents_are(images, latents):
    manifest = json.loads((latents[0] / "manifest.json").read_text())
    assert manifest["records"] == manifest["examples"] == IMAGES
    assert manifest["class_names"] == ["class0", "class1"]
    assert manifest["moments"] == {
        "shape": [8, 8, 4], "dtype": "float32", "mirrored": True, "variance": True,
    }  # fmt: skip
    assert manifest["scale"] == [0.18215] * 4 and manifest["shift"] == [0.0] * 4
    assert manifest["image_size"] == 16 and manifest["source"]["path"] == str(images)
    assert manifest["autoencoder"]["name"] == "sd-vae"
    assert re.fullmatch("[0-9a-f]{16}", manifest["autoencoder"]["encoder"])
    assert [shard["records"] for shard in manifest["shards"]] == [4, 4, 3]


# The largest relative change that a storage dtype makes to a number.
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        ("float16", 2**-11),
        pytest.param("float32", 2**-20, marks=pytest.mark.slow),
        pytest.param("bfloat16", 2**-8, marks=pytest.mark.slow),
    ],
)
def test_training_draws_the_same_examples_as_with_the_autoencoder(
    images, tmp_path, dtype, rounding
):
    """The same order, mirror images, posterior draws, noise, times and labels."""
    status, _, err = run(
        "encode", tmp_path / "latents", IMAGE_SETTINGS, data__path=images, encode__dtype=dtype
    )
    assert (status, err) == (0, "")
    examples = []
    for settings, path in ((IMAGE_SETTINGS, images), (LATENT_SETTINGS, tmp_path / "latents")):
        setup, source = opened(settings, data__path=path)
        batches = pipeline.batches(
            source, seed=setup.config.seed, batch_size=8, flip=True, skip_unreadable=False
        )
        codec_params = setup.codec_params if settings is IMAGE_SETTINGS else {}

        def encode_records(keys_b, records, setup=setup, codec_params=codec_params):
            return setup.codec.encode(codec_params, keys_b, records)

        for step in (0, 5):
            records = {name: jnp.asarray(rows) for name, rows in batches[step].items()}
            examples.append(
                train_step.draw_examples(setup.objective, encode_records, 0, step, records)
            )
    for fresh, stored in zip(examples[:2], examples[2:], strict=True):
        for name in ("x0", "t", "condition"):
            np.testing.assert_array_equal(fresh[name], stored[name])
        # A relative change e of the log variance l changes the spread by e l / 2 of itself.
        largest = float(jnp.abs(fresh["x1"]).max())
        np.testing.assert_allclose(fresh["x1"], stored["x1"], rtol=0, atol=8 * rounding * largest)
        assert not np.array_equal(fresh["x1"], stored["x1"]) or dtype == "float32"


def test_training_from_latents_equals_training_with_the_autoencoder(images, latents, tmp_path):
    folder, _ = latents
    assert run("train", tmp_path / "images", IMAGE_SETTINGS, data__path=images)[0] == 0
    assert run("train", tmp_path / "latents", LATENT_SETTINGS, data__path=folder)[0] == 0
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("images", "latents")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    status, _, err = call("--mode", "sample", "--workdir", tmp_path / "latents")
    assert (status, err) == (0, "")
    (folder,) = (tmp_path / "latents" / "samples").iterdir()
    assert np.asarray(Image.open(folder / "images" / "000003.png")).shape == (16, 16, 3)


def test_training_from_latents_needs_the_autoencoder_only_for_sheets(latents, tmp_path):
    folder, _ = latents
    settings = LATENT_SETTINGS | {"data.path": folder, "train.steps": 1}
    empty = tmp_path / "vae"
    shutil.copytree(goldens.FOLDER / "vae_legacy", empty)
    (empty / "diffusion_pytorch_model.safetensors").unlink()
    assert run("train", tmp_path / "a", settings, latents__path=empty)[0] == 0
    status, _, err = run("train", tmp_path / "b", settings, latents__path=empty, log__sheet_every=1)
    assert status == 2 and "has no diffusion_pytorch_model.safetensors" in err
    assert not (tmp_path / "b").exists()


def test_latents_of_other_weights_than_those_that_decode_are_refused(latents, tmp_path):
    folder, _ = latents
    settings = LATENT_SETTINGS | {"data.path": folder, "log.sheet_every": 1}
    status, _, err = run(
        "train", tmp_path / "run", settings, latents__path=goldens.FOLDER / "vae_current"
    )
    assert status == 2 and "were encoded with other weights" in err and err.count("\n") == 1


def test_latents_of_two_autoencoders_are_not_mixed(images, latents, tmp_path):
    """Neither when a run continues nor when its samples are decoded; no sheet reads the VAE."""
    settings = LATENT_SETTINGS | {"train.steps": 1}
    other = IMAGE_SETTINGS | {"latents.path": goldens.FOLDER / "vae_current"}
    assert run("encode", tmp_path / "other", other, data__path=images)[0] == 0
    assert run("train", tmp_path / "run", settings, data__path=latents[0])[0] == 0
    status, _, err = run(
        "train", tmp_path / "run", settings, data__path=tmp_path / "other", train__steps=2
    )
    assert status == 2 and "encoded with other weights than those that the run" in err
    assert run("train", tmp_path / "b", settings, data__path=tmp_path / "other")[0] == 0
    status, _, err = call("--mode", "sample", "--workdir", tmp_path / "b")
    assert status == 2 and err.count("\n") == 1
    assert "the latents that the run was trained on were encoded with other weights" in err
    path = f"--config.latents.path={goldens.FOLDER / 'vae_current'}"
    assert call("--mode", "sample", "--workdir", tmp_path / "b", path)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data.image_size": 16},
            "data.image_size=16, but the latents .* are 8x8 .of images of 16",
        ),
        ({"data.classes": 3}, "data.classes is 3, but the latents source has 2 classes"),
        ({"data.channels": 8}, "data.channels is 8, but the latents of this VAE have 4"),
        ({"latents.codec": "pixels"}, "latents.codec is 'pixels', but data.source gives latents"),
        (
            {"latents.scale": 0.5},
            "have the scale 0.18215 and the shift 0, but latents.scale is 0.5",
        ),
        ({"data.path": "elsewhere"}, "'elsewhere' holds no stored latents"),
    ],
)
def test_a_config_of_other_latents_is_refused(latents, tmp_path, change, message):
    settings = LATENT_SETTINGS | {"data.path": latents[0]} | change
    status, _, err = run("train", tmp_path / "run", settings)
    assert status == 2 and re.search(message, err) and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_flip_needs_the_latents_of_mirror_images(images, tmp_path):
    settings = IMAGE_SETTINGS | {"data.path": images, "data.flip": False}
    assert run("encode", tmp_path / "latents", settings)[0] == 0
    settings = LATENT_SETTINGS | {"data.path": tmp_path / "latents", "train.steps": 1}
    status, _, err = run("train", tmp_path / "run", settings)
    assert status == 2 and "data.flip=True, but the latents were stored without" in err
    assert run("train", tmp_path / "run", settings, data__flip=False)[0] == 0


def test_encoding_again_changes_nothing_and_other_settings_are_refused(images, tmp_path):
    settings = IMAGE_SETTINGS | {"data.path": images}
    assert run("encode", tmp_path / "latents", settings)[0] == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    status, out, _ = run("encode", tmp_path / "latents", settings)
    assert status == 0 and "3 shards, 3 of them complete" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == files
    status, _, err = run("encode", tmp_path / "latents", settings, data__image_size=32)
    assert status == 2 and "holds other latents" in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == files


@pytest.mark.parametrize("change", ["renamed", "moved"])
def test_shards_of_other_images_are_not_taken_for_those_of_these(images, tmp_path, change):
    """As many images as before, in another order or with another label."""
    shutil.copytree(images, tmp_path / "images")
    settings = IMAGE_SETTINGS | {"data.path": tmp_path / "images"}
    broken = tmp_path / "images" / "class1" / "09.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    # Stopped at the last of three shards.
    assert run("encode", tmp_path / "latents", settings)[0] == 2
    broken.write_bytes(whole)
    first = tmp_path / "images" / "class0" / "00.png"
    if change == "renamed":
        first.rename(first.with_name("99.png"))
    else:
        first.rename(tmp_path / "images" / "class1" / "00.png")
    files = {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()}
    status, _, err = run("encode", tmp_path / "latents", settings)
    assert status == 2 and err.count("\n") == 1
    assert "holds other latents: source.fingerprint is " in err and "give another folder" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "latents").iterdir()} == files


def test_a_repaired_image_does_not_undo_what_is_done(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    settings = IMAGE_SETTINGS | {
        "data.path": tmp_path / "images", "encode.shard": 2, "latents.batch": 1,
    }  # fmt: skip
    broken = tmp_path / "images" / "class1" / "09.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    assert run("encode", tmp_path / "latents", settings)[0] == 2
    broken.write_bytes(whole)
    status, out, _ = run("encode", tmp_path / "latents", settings)
    # Without the shards of the batches that were on the device.
    assert status == 0 and re.search("6 shards, [1-5] of them complete", out)


def test_an_unreadable_image_stops_it_or_is_left_out(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    broken = tmp_path / "images" / "class0" / "04.png"
    broken.write_bytes(broken.read_bytes()[:60])
    settings = IMAGE_SETTINGS | {"data.path": tmp_path / "images"}
    status, _, err = run("encode", tmp_path / "latents", settings)
    assert status == 2 and "04.png' cannot be read" in err and err.count("\n") == 1
    status, out, _ = run("encode", tmp_path / "latents", settings, data__skip_unreadable=True)
    assert status == 0 and "10 records of 2 classes; 1 images that cannot be read" in out
    assert latent_cache.read_manifest(tmp_path / "latents").left_out == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents.codec": "pixels"}, "latents.codec is 'pixels', which has no latents to store"),
        ({"data.image_size": 15}, "data.image_size is 15, but one cell of this VAE is 2 pixels"),
    ],
)
def test_what_cannot_be_encoded_is_refused(images, tmp_path, change, message):
    settings = IMAGE_SETTINGS | {"data.path": images} | change
    status, _, err = run("encode", tmp_path / "latents", settings)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "latents").exists()


def test_a_run_and_latents_do_not_share_a_folder(images, latents, tmp_path):
    settings = LATENT_SETTINGS | {"data.path": latents[0], "train.steps": 1}
    assert run("train", tmp_path / "run", settings)[0] == 0
    status, _, err = run("encode", tmp_path / "run", IMAGE_SETTINGS, data__path=images)
    assert status == 2 and "holds a run; give another folder" in err


def test_the_encoder_runs_on_all_devices_of_this_process(images):
    setup, source = opened(IMAGE_SETTINGS, data__path=images)
    batch = np.stack([source.read(index)["image"] for index in range(6)])
    moments = encode.make_encoder(setup)(batch)
    assert moments.shape == (6, 2, 8, 8, 8)
    expected = setup.codec.moments(setup.codec_params, {"image": jnp.asarray(batch[:, :, ::-1])})
    np.testing.assert_allclose(moments[:, 1], expected, rtol=2e-5, atol=2e-5)
    assert normalise(batch).shape == batch.shape and jax.device_count() >= 1


@pytest.mark.parametrize("matmul", ["highest", "default"])
def test_the_autoencoder_has_the_precision_of_its_setting(images, matmul):
    setup, source = opened(IMAGE_SETTINGS, data__path=images, latents__matmul=matmul)
    batch = jnp.asarray(source.read(0)["image"])[None]
    moments = jax.jit(lambda params: setup.codec.moments(params, {"image": batch}))
    text = moments.lower(setup.codec.abstract_params).as_text()
    products = re.findall(r"stablehlo.(?:dot_general|convolution).*", text)
    assert products
    assert all(("HIGHEST" in line) == (matmul == "highest") for line in products)
    # Results of the highest precision keep the names that they had before there was a choice.
    assert ("matmul" in setup.codec_settings()["latents"]) == (matmul != "highest")


def test_two_processes_write_the_latents_of_one(images, tmp_path):
    """Real processes, which divide the shards."""
    settings = IMAGE_SETTINGS | {"data.path": images, "encode.shard": 2, "latents.batch": 1}
    # The same rows at a time as a device of the two processes.
    assert run("encode", tmp_path / "one", settings)[0] == 0
    arguments = [
        "--mode", "encode", "--config", CONFIGS / "imagenet.py", "--workdir", tmp_path / "two",
        *flags(settings),
    ]  # fmt: skip
    processes = Processes(tmp_path / "log", arguments, devices=1)
    out = processes.succeed()
    assert "6 shards, 0 of them complete" in out and "11 records of 2 classes" in out
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 8
