"""Stored latents of any autoencoder train, and samples of them are latents."""

import contextlib
import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import sit_jax
from sit_jax import main
from sit_jax.data.latents import open_latents
from sit_jax.data.source import SourceOptions
from tests import caches
from tests.commands import snapshot

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "latents.py"
SETTINGS = {
    "model.depth": 1, "model.width": 16, "model.heads": 2, "model.patch": 1,
    "data.classes": 2, "latents.codec": "stored", "train.steps": 3,
    "train.batch": 8, "checkpoint.every": 3, "log.every": 1, "log.sheet_every": 3,
    "log.sheet_count": 4, "log.tensorboard": False, "sample.solver": "heun", "sample.steps": 2,
    "sample.count": 5, "sample.batch": 4, "mesh.data": -1, "mesh.fsdp": 1,
}  # fmt: skip


def call(*arguments):
    """Return main's exit status, its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def train(workdir, **settings):
    given = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    flags = [f"--config.{key}={value}" for key, value in given.items()]
    return call("--config", CONFIG, "--workdir", workdir, *flags)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def plan_of(side, channels, name, factor):
    """Return a plan of latents, each channel with its own spread and mean, as it is stored."""
    random = np.random.default_rng(channels)
    return caches.make_plan(
        shape=(side, side, channels), dtype="float16",
        scale=tuple(random.uniform(0.1, 3, channels).tolist()),
        shift=tuple(random.normal(size=channels).tolist()),
        autoencoder={"name": name}, image_size=side * factor,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run on latents of the shape of VA-VAE's, 32 channels and factor 16, and its plan."""
    folder = tmp_path_factory.mktemp("run")
    plan = plan_of(4, 32, "va-vae", 16)
    caches.write(folder / "latents", plan)
    status, _, err = train(
        folder / "run",
        data__path=folder / "latents",
        data__image_size=4,
        data__channels=32,
    )
    assert (status, err) == (0, "")
    status, out, err = call("--mode", "sample", "--workdir", folder / "run")
    assert (status, err) == (0, "") and "samples.npz; the sheet shows false colours" in out
    return folder / "run", plan


def samples_of(workdir):
    (folder,) = (workdir / "samples").iterdir()
    return folder


def test_samples_are_latents_in_the_units_of_their_autoencoder(run):
    workdir, plan = run
    folder = samples_of(workdir)
    with np.load(folder / "samples.npz") as file:
        latents, labels = file["arr_0"], file["labels"]
    assert latents.shape == (5, 4, 4, 32) and latents.dtype == np.float32
    assert labels.tolist() == [0, 1, 0, 1, 0]
    x = (latents - np.float32(plan.shift)) * np.float32(plan.scale)
    # The image is the first three channels of x, of which 3 is white.
    expected = np.clip(x[..., :3] / 3, -1, 1) * 127.5 + 128
    for index in range(5):
        image = np.asarray(Image.open(folder / "images" / f"{index:06d}.png")).astype(float)
        assert np.abs(image - expected[index]).max() <= 1.01
    assert (workdir / "sheets" / "step_00000003.png").exists()


def test_the_interface_of_python_gives_the_same_latents(run):
    workdir, _ = run
    with np.load(samples_of(workdir) / "samples.npz") as file:
        latents = file["arr_0"]
    loaded = sit_jax.load(workdir)
    np.testing.assert_allclose(loaded.sample(count=5), latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="trained on stored latents, which log_prob cannot take"):
        loaded.log_prob(np.zeros((1, 4, 4, 32), np.uint8))


def test_missing_samples_are_drawn_again_and_nothing_else_changes(run):
    workdir, _ = run
    folder = samples_of(workdir)
    before = snapshot(folder)
    (folder / "images" / "000002.png").unlink()
    status, out, _ = call("--mode", "sample", "--workdir", workdir)
    # The image is made from the latents.
    assert status == 0 and "sampling 0 of 5" in out and snapshot(folder) == before
    (folder / "samples.npz").write_bytes(before["samples.npz"][:1000])
    status, out, _ = call("--mode", "sample", "--workdir", workdir)
    assert "samples.npz is damaged; its samples are drawn again" in out
    assert status == 0 and "sampling 5 of 5" in out and snapshot(folder) == before


def test_latents_may_be_written_without_images(run, tmp_path):
    workdir, _ = run
    with_images = snapshot(samples_of(workdir))
    status, _, _ = call(
        "--mode", "sample", "--workdir", workdir, "--out", tmp_path, "--config.sample.format=npz"
    )
    assert status == 0
    expected = {name: data for name, data in with_images.items() if "images" not in name}
    assert snapshot(samples_of(tmp_path)) == expected


def test_the_network_sees_normalised_latents(run):
    workdir, plan = run
    folder = json.loads((workdir / "config.json").read_text())["data"]["path"]
    source = open_latents(SourceOptions(folder, None, "all", 4, 32, None))
    record = source.read(3)
    import jax

    from sit_jax.latents import CODECS

    codec = CODECS["stored"].open(None, None)
    batch = {name: np.asarray(value)[None] for name, value in record.items()}
    keys = jax.random.split(jax.random.key(0), 1)
    x = codec.encode({}, keys, batch)[0]
    mean, logvar = np.split(record["moments"].astype(np.float32), 2, axis=-1)
    noise = jax.random.normal(keys[0], mean.shape)
    z = mean + np.exp(logvar / 2) * noise
    expected = (z - np.float32(plan.shift)) * np.float32(plan.scale)
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)
    # A latent without a variance is its mean, whatever the key.
    none = np.full_like(batch["moments"][..., :32], -np.inf)
    batch["moments"] = np.concatenate([batch["moments"][..., :32], none], axis=-1)
    expected = (mean - np.float32(plan.shift)) * np.float32(plan.scale)
    np.testing.assert_allclose(codec.encode({}, keys, batch)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "channels", "factor", "patch"),
    [
        (4, 16, 8, 2),
        pytest.param(2, 32, 32, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, 8, 2, marks=pytest.mark.slow),
    ],
)
def test_latents_of_other_shapes_train(tmp_path, side, channels, factor, patch):
    """The shapes of DC-AE f32c32 and of Stable Diffusion 3's 16 channels, and a single channel."""
    caches.write(tmp_path / "latents", plan_of(side, channels, "other", factor))
    status, _, err = train(
        tmp_path / "run",
        data__path=tmp_path / "latents",
        data__image_size=side,
        data__channels=channels,
        model__patch=patch,
        train__steps=1,
    )
    assert (status, err) == (0, "")


def test_latents_of_another_scale_do_not_continue_a_run(run, tmp_path):
    workdir, plan = run
    other = caches.make_plan(
        shape=plan.moments.shape, dtype="float16", scale=plan.scale[::-1], shift=plan.shift
    )
    caches.write(tmp_path / "latents", other)
    status, _, err = call(
        "--workdir", workdir, "--config.train.steps=4",
        f"--config.data.path={tmp_path / 'latents'}",
    )  # fmt: skip
    assert status == 2 and err.count("\n") == 1
    assert "data.path is" in err or "these latents are scaled by" in err


@pytest.mark.parametrize("mode", ["sweep", "quality", "invert"])
def test_modes_that_compare_images_are_refused(run, mode):
    status, _, err = call("--mode", mode, "--workdir", run[0])
    assert status == 2 and "holds no images to compare with" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("evaluate", []),
        ("sweep", ["--config.sweep.features=inception"]),
        ("train", ["--config.log.scores_every=2", "--config.train.steps=400"]),
    ],
)
def test_false_colours_are_not_scored(run, mode, flags, tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((9, 4, 4, 3), np.uint8))
    reference = f"--config.evaluate.reference={tmp_path / 'x.npz'}"
    status, _, err = call("--mode", mode, "--workdir", run[0], reference, *flags)
    assert status == 2 and "'stored' has no decoder, so that samples are not" in err
    assert err.count("\n") == 1


def test_images_are_not_stored_latents(tmp_path):
    status, _, err = train(tmp_path / "run", data__source="digits", data__path="none")
    assert status == 2 and "latents.codec is 'stored', but data.source gives images" in err
