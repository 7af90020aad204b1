"""Train and sample in latents through main, with a tiny autoencoder and a folder of images."""

import contextlib
import io
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image

from sit_jax import config as config_lib
from sit_jax import main
from sit_jax.jobs.setup import set_up
from sit_jax.jobs.workdir import restore_weights
from tests import goldens

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEGACY = goldens.FOLDER / "vae_legacy"
SETTINGS = {
    "model.depth": 1, "model.width": 16, "model.heads": 2, "model.patch": 4,
    "model.learn_sigma": False, "data.image_size": 16, "data.classes": 2, "data.workers": 0,
    "latents.path": LEGACY, "latents.batch": 2, "train.steps": 2, "train.batch": 4,
    "train.ema_decay": 0.5, "optimizer.learning_rate": 0.02, "checkpoint.every": 1,
    "log.every": 1, "log.sheet_every": 2, "log.sheet_count": 4, "log.tensorboard": False,
    "sample.solver": "heun", "sample.steps": 2, "sample.count": 4, "sample.batch": 4,
    "sample.columns": 2,
}  # fmt: skip


def flags(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]


def call(*arguments):
    """Return main's exit status and its stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    return status, err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compile into a temporary cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of six noise images in two classes."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


def start(images, workdir, **changes):
    """Train with SETTINGS, changed by keywords such as train__steps=1."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    settings = SETTINGS | {"data.path": images} | changed
    config = ROOT / "configs" / "imagenet.py"
    return call("--config", config, "--workdir", workdir, *flags(settings))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Return the workdir of a finished run of two steps."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert start(images, workdir) == (0, "")
    return workdir


def weights(workdir):
    """Restore the EMA weights of the newest checkpoint."""
    config = config_lib.load(str(workdir / "config.json"))
    return restore_weights(set_up(config), epath.Path(workdir), "ema").params


def test_it_trains_on_latents_and_shows_images(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    # A patch has 4 x 4 latent cells of 4 channels.
    assert weights(run)["x_embedder"]["kernel"].shape == (4 * 4 * 4, 16)
    sheet = np.asarray(Image.open(run / "sheets" / "step_00000002.png"))
    assert sheet.shape[-1] == 3 and sheet.shape[0] >= 32 and sheet.std() > 1


def test_a_run_that_was_interrupted_draws_the_same_posteriors(run, images, tmp_path):
    for steps in (1, 2):
        assert start(images, tmp_path / "run", train__steps=steps, log__sheet_every=0) == (0, "")
    jax.tree.map(np.testing.assert_array_equal, weights(tmp_path / "run"), weights(run))


def draw_samples(workdir, *arguments):
    """Draw samples; return the images and their settings.json."""
    assert call("--mode", "sample", "--workdir", workdir, *arguments) == (0, "")
    folder = max(
        (workdir / "samples").iterdir(), key=lambda path: (path / "sheet.png").stat().st_mtime_ns
    )
    images = np.stack(
        [np.asarray(Image.open(path)) for path in sorted(folder.glob("images/0*.png"))]
    )
    return images.astype(int), json.loads((folder / "settings.json").read_text())


def brighten(vae):
    """Change the weights in a folder so that every decoded pixel is brighter by 0.2."""
    file = vae / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["decoder.conv_out.bias"] += 0.2
    safetensors.numpy.save_file(tensors, file)


def test_samples_may_be_decoded_by_another_autoencoder(run, tmp_path):
    workdir = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    other = pathlib.Path(shutil.copytree(LEGACY, tmp_path / "vae"))
    images, settings = draw_samples(workdir)
    assert images.shape == (4, 16, 16, 3) and settings["latents"]["path"] == str(LEGACY)
    brighten(other)
    brighter, settings = draw_samples(workdir, f"--config.latents.path={other}")
    inside = (images > 0) & (brighter < 255)
    # The latents are the same, so every pixel is brighter by 0.2, which is 25.5 grey levels.
    assert inside.mean() > 0.2 and set((brighter - images)[inside]) <= {25, 26}
    assert settings["latents"]["path"] == str(other)
    assert len(list((workdir / "samples").iterdir())) == 2


def test_other_weights_at_the_same_path_are_another_autoencoder(tmp_path):
    folder = pathlib.Path(shutil.copytree(LEGACY, tmp_path / "vae"))
    overrides = [("latents.path", str(folder)), ("data.image_size", "16"), ("latents.batch", "2")]
    overrides += [("latents.codec", "sd-vae"), ("data.channels", "3"), ("model.patch", "2")]

    def recorded():
        return set_up(config_lib.load("configs/digits.py", overrides)).codec_settings()["latents"]

    before = recorded()
    assert recorded() == before and before["path"] == str(folder)
    brighten(folder)
    after = recorded()
    assert after.pop("weights") != before.pop("weights") and after == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data.image_size": 15},
            "data.image_size is 15, but one cell of this VAE is 2 pixels; make it a multiple of 2",
        ),
        ({"data.image_size": 18}, "input size 9 is not divisible by the patch size 4"),
        (
            {"data.source": "digits", "data.channels": 1},
            "data.channels is 1, but this VAE encodes 3; set it to 3",
        ),
        (
            {"latents.path": "/no/such"},
            "latents.path '/no/such' has no config.json; expected a folder with config.json",
        ),
        ({"latents.repo": "a/b"}, "and latents.repo 'a/b' are both given; set one of them to none"),
        ({"latents.scale": 0}, "latents.scale is 0.0; expected 1e-06 to 1e+06"),
        ({"latents.batch": 0}, "latents.batch is 0; expected 1 to 1,048,576"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(images, tmp_path, changes, words):
    status, err = start(
        images,
        tmp_path / "run",
        **{key.replace(".", "__"): value for key, value in changes.items()},
    )
    assert status == 2 and err.startswith("error: ")
    assert err.count("\n") == 1 and words in err
    assert not (tmp_path / "run").exists()


def test_unreadable_weights_are_one_line_and_write_nothing(images, tmp_path):
    folder = pathlib.Path(shutil.copytree(LEGACY, tmp_path / "vae"))
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    status, err = start(images, tmp_path / "run", latents__path=folder)
    assert status == 2
    assert "diffusion_pytorch_model.safetensors cannot be read" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_codec_and_scale(run):
    for key, value in (("latents.scale", 0.13), ("latents.codec", "pixels")):
        for mode in ("train", "sample"):
            status, err = call("--mode", mode, "--workdir", run, f"--config.{key}={value}")
            assert status == 2 and f"{key} is {value!r} but was" in err
