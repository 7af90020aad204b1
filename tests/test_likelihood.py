"""--mode likelihood: an image's row does not depend on the batch or on interruptions.

Every mistake is reported in one line.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from sit_jax import config as config_lib
from sit_jax import rng, sharding
from sit_jax.data import subset
from sit_jax.jobs import likelihood
from sit_jax.jobs.data import open_source
from sit_jax.jobs.setup import set_up
from sit_jax.latents import CODECS, CodecKind, dequantise
from sit_jax.latents.codec import Codec
from sit_jax.latents.pixels import BIN, normalise
from sit_jax.transport import paths
from tests.commands import DIGITS, FOLDER, TINY, flags, refusal, snapshot, succeed, write_images

pytestmark = pytest.mark.usefixtures("quiet_machine")

FAST = {
    "likelihood__solver": "heun",
    "likelihood__steps": 2,
    "likelihood__count": 10,
    "likelihood__batch": 8,
}


def evaluate(workdir, **settings):
    return succeed("--workdir", workdir, "--mode", "likelihood", *flags(**(FAST | settings)))


def folder_of(workdir):
    (folder,) = (workdir / "likelihood").iterdir()
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def column(folder, name):
    return np.array([row[name] for row in rows_of(folder)])


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """Return a copy of the run with the likelihoods of ten images, and the stdout of the job."""
    workdir = pathlib.Path(
        shutil.copytree(trained[0], tmp_path_factory.mktemp("evaluated") / "run")
    )
    return workdir, evaluate(workdir)


def test_every_image_has_its_row_and_the_summary_their_mean(evaluated):
    workdir, out = evaluated
    folder = folder_of(workdir)
    assert "log p of 10 of 10 images of split 'test' under step 4" in out
    assert "unguided; lower bound of the 8-bit image's probability, dequantised uniformly" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "results.jsonl",
        "settings.json",
        "summary.json",
    ]
    source = open_source(set_up(config_lib.load(DIGITS, [("data.split", "test")])))
    drawn = subset.draw_order(source.labels, seed=0)[:10].tolist()
    assert column(folder, "index").tolist() == drawn
    assert sorted(column(folder, "label").tolist()) == list(range(10))  # one of each class
    assert column(folder, "label").tolist() == [int(source.read(i)["label"]) for i in drawn]
    assert column(folder, "sha256").tolist() == [source.digest(i) for i in drawn]
    assert "they are a stratified draw of 898" in out
    bits = column(folder, "bits_per_dim")
    np.testing.assert_allclose(bits, -column(folder, "log_prob") / (64 * math.log(2)), rtol=1e-6)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["images"], summary["unreadable"], summary["of"]) == (10, 0, 898)
    assert summary["bits_per_dim"]["mean"] == pytest.approx(bits.mean())
    assert summary["bits_per_dim"]["standard_error"] == pytest.approx(bits.std(ddof=1) / 10**0.5)
    assert (
        f"bits/dim: {bits.mean():.4f} +- {bits.std(ddof=1) / 10**0.5:.4f} (standard error)" in out
    )
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["step"] == 4
    assert settings["likelihood"]["solver"] == "heun"
    assert settings["data"]["split"] == "test" and settings["data"]["subset_seed"] == 0


@pytest.mark.parametrize("batch", [3, 10, 16])
def test_the_batch_size_changes_no_row(evaluated, run_copy, batch):
    evaluate(run_copy, likelihood__batch=batch)
    folder = folder_of(run_copy)
    batch_of_8 = folder_of(evaluated[0])
    assert folder.name == batch_of_8.name
    assert column(folder, "index").tolist() == column(batch_of_8, "index").tolist()
    np.testing.assert_allclose(
        column(folder, "log_prob"), column(batch_of_8, "log_prob"), rtol=1e-5
    )


@pytest.mark.parametrize("lines", [8, 5])
def test_a_killed_job_continues_and_redoes_a_torn_line(evaluated, tmp_path, lines):
    workdir = pathlib.Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    results = folder_of(workdir) / "results.jsonl"
    before = snapshot(workdir)
    complete_lines = results.read_bytes().splitlines(keepends=True)
    (results.parent / "summary.json").unlink()
    results.write_bytes(b"".join(complete_lines[:lines]) + complete_lines[lines][:20])
    assert f"log p of {10 - lines} of 10 images" in evaluate(workdir)
    if lines == 8:  # the same batches as in the first run
        assert snapshot(workdir) == before
    assert results.read_bytes().splitlines(keepends=True)[:lines] == complete_lines[:lines]
    np.testing.assert_allclose(
        column(results.parent, "log_prob"), column(folder_of(evaluated[0]), "log_prob"), rtol=1e-5
    )
    original = folder_of(evaluated[0])
    assert column(results.parent, "index").tolist() == column(original, "index").tolist()


def test_a_finished_job_changes_no_file_and_a_larger_count_adds_to_it(evaluated, tmp_path):
    workdir = pathlib.Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    results = folder_of(workdir) / "results.jsonl"
    before = snapshot(workdir)
    written_at = results.stat().st_mtime_ns
    assert "log p of 0 of 10 images" in evaluate(workdir)
    assert snapshot(workdir) == before
    assert results.stat().st_mtime_ns == written_at
    assert "log p of 2 of 12 images" in evaluate(workdir, likelihood__count=12)
    assert rows_of(folder_of(workdir))[:10] == rows_of(folder_of(evaluated[0]))
    evaluate(workdir, likelihood__count=4)
    assert json.loads((folder_of(workdir) / "summary.json").read_text())["images"] == 4


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "null"},
        {"weights": "raw"},
        {"seed": 1},
        {"dequantisation": "gaussian"},
        {"trace": "exact"},
        {"probe": "gaussian"},
        {"probes": 3},
        {"split": "train"},
    ],
    ids=str,
)
def test_other_settings_have_a_folder_and_numbers_of_their_own(evaluated, run_copy, change):
    evaluate(
        run_copy,
        likelihood__count=2,
        **{f"likelihood__{key}": value for key, value in change.items()},
    )
    assert folder_of(run_copy).name != folder_of(evaluated[0]).name
    changed = column(folder_of(run_copy), "log_prob")
    original = column(folder_of(evaluated[0]), "log_prob")[:2]
    assert (np.abs(changed - original) > 1e-4).all()


def log_prob_of_fresh_weights(**settings):
    """Return log p of the first 8 test digits under fresh weights, the digits, and their keys.

    The keys are those of dequantisation. A fresh network's velocity is 0, so log p is that of the
    standard normal.
    """
    config = config_lib.load(
        DIGITS, [(k.replace("__", "."), str(v)) for k, v in (FAST | settings).items()]
    )
    setup = set_up(config)
    source = open_source(setup)
    indices = np.arange(8)
    images = np.stack([source.read(i)["image"] for i in indices])
    labels = np.stack([source.read(i)["label"] for i in indices])
    log_prob, _ = likelihood.make_log_prob(setup)(
        setup.init_params(), indices, {"image": images}, labels
    )
    keys = jax.vmap(lambda i: rng.key(config.likelihood.seed, "dequantisation", i))(indices)
    return np.asarray(log_prob), images, keys


def test_uniform_dequantisation_in_the_8_bit_convention():
    log_prob, images, keys = log_prob_of_fresh_weights()
    x = np.asarray(dequantise.uniform(keys, jnp.asarray(images))[0], np.float64)
    expected = norm.logpdf(x).sum((1, 2, 3)) - 64 * math.log(255 / 2)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def test_gaussian_dequantisation_is_the_noise_of_a_time():
    log_prob, images, keys = log_prob_of_fresh_weights(likelihood__dequantisation="gaussian")
    t = 1 / (1 + dequantise.GAUSSIAN_NOISE)  # solves (1 - t) / t = GAUSSIAN_NOISE
    linear = paths.path_by_name("Linear")
    time_of_noise = paths.time_of_noise(linear, dequantise.GAUSSIAN_NOISE)
    assert time_of_noise == pytest.approx(t, abs=1e-6)
    z, correction = dequantise.gaussian(keys, jnp.asarray(images), t, 1 - t)
    expected = norm.logpdf(np.asarray(z, np.float64)).sum((1, 2, 3)) + correction
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4)


@pytest.mark.parametrize("name", paths.PATHS)
def test_the_time_of_a_noise_level(name):
    path = paths.path_by_name(name)
    for ratio in (BIN / 6, 0.1, 3.0):
        t = jnp.float32(paths.time_of_noise(path, ratio))
        # Near t=1, neighbouring float32 times differ by up to 0.4 % in sigma.
        assert float(path.sigma(t) / path.alpha(t)) == pytest.approx(ratio, rel=5e-3)


@pytest.fixture
def half_latents(monkeypatch):
    """Replace sd-vae by a codec whose latents are the pixels times the factor 0.5."""
    codec = Codec(
        encode=lambda params, keys_b, records: 0.5 * normalise(records["image"]),
        decode=lambda params, x: 2 * x,
        shape=lambda spec: spec["image"].shape,
        abstract_params={},
        load=dict,
        quantised=False,
        scale=0.5,
    )
    kind = CodecKind(lambda options, per_device: codec, quantised=False)
    monkeypatch.setitem(CODECS, "sd-vae", kind)


def test_latents_are_not_dequantised_and_their_factor_is_taken_out(half_latents):
    log_prob, images, _ = log_prob_of_fresh_weights(latents__codec="sd-vae")
    x = 0.5 * np.asarray(normalise(images), np.float64)
    expected = norm.logpdf(x).sum((1, 2, 3)) + 64 * math.log(0.5)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)


def test_the_output_says_that_log_p_is_the_density_of_latents(half_latents, tmp_path):
    run = tmp_path / "run"
    succeed(*TINY, *flags(latents__codec="sd-vae", log__sheet_every=0), "--workdir", run)
    out = evaluate(run)
    assert (
        "density of the latents, their factor 0.5 taken out; continuous, so not dequantised" in out
    )
    words = (
        "likelihood.dequantisation is 'uniform', but latents.codec 'sd-vae' gives latents, which "
        "are continuous"
    )
    flag = "--config.likelihood.dequantisation=uniform"
    assert words in refusal("--workdir", run, "--mode", "likelihood", flag)


@pytest.mark.slow
def test_an_unreadable_image_is_named_and_may_be_left_out(tmp_path):
    data = tmp_path / "data"
    workdir = tmp_path / "run"
    write_images(data, "a/0.png", "a/1.png", "b/0.png")
    train_flags = flags(data__path=data, train__steps=1, log__sheet_every=0)
    succeed(*TINY, *FOLDER, *train_flags, "--workdir", workdir)
    (data / "a" / "1.png").write_bytes(b"not an image")
    settings = {key: value for key, value in FAST.items() if key != "likelihood__count"}
    settings["likelihood__split"] = "all"
    arguments = ["--workdir", workdir, "--mode", "likelihood", *flags(**settings)]
    assert f"image '{data}/a/1.png' cannot be read" in refusal(*arguments)
    out = succeed(*arguments, "--config.data.skip_unreadable=True")
    assert "2 images, 1 unreadable ones left out" in out
    assert column(folder_of(workdir), "index").tolist() == [0, 2]


def test_rows_of_images_that_changed_are_computed_again(tmp_path):
    data = tmp_path / "data"
    workdir = tmp_path / "run"
    write_images(data, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    train_flags = flags(data__path=data, train__steps=1, log__sheet_every=0)
    succeed(*TINY, *FOLDER, *train_flags, "--workdir", workdir)
    settings = FAST | {"likelihood__count": None, "likelihood__split": "all"}
    evaluate(workdir, **settings)
    results = folder_of(workdir) / "results.jsonl"
    before = rows_of(folder_of(workdir))
    assert [row["index"] for row in before] == [0, 1, 2, 3]
    assert "log p of 0 of 4 images" in evaluate(workdir, **settings)
    # Another image under the name of the second, and under that of the third.
    first = (data / "a" / "0.png").read_bytes()
    (data / "a" / "1.png").write_bytes(first)
    (data / "b" / "0.png").write_bytes(first)
    out = evaluate(workdir, **settings)
    assert "rows of images that have changed since, to be computed again: 2" in out
    assert "log p of 2 of 4 images" in out
    after = {row["index"]: row for row in rows_of(folder_of(workdir))}
    assert sorted(after) == [0, 1, 2, 3] and len(results.read_bytes().splitlines()) == 4
    assert after[0] == before[0] and after[3] == before[3]
    for index in (1, 2):
        assert after[index]["sha256"] != before[index]["sha256"]
        assert after[index]["log_prob"] != before[index]["log_prob"]
    # Rows that are none of this job's, and lines that are no rows, are passed over.
    with results.open("a") as file:
        file.write('{"x": 1}\n{"index": 0}\n[]\n' + "[" * 100_000 + "\n")
    assert "log p of 0 of 4 images" in evaluate(workdir, **settings)
    # An image that moves to another class is another record as well.
    (data / "a" / "1.png").rename(data / "b" / "00.png")
    assert "images that have changed since, to be computed again: 1" in evaluate(
        workdir, **settings
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"sample__cfg_scale": 4},
            "--config.sample.cfg_scale has no effect on --mode likelihood, which integrates the "
            "ungui",
        ),
        ({"sample__solver": "heun"}, "--config.sample.solver has no effect on --mode likelihood"),
        ({"likelihood__cfg_scale": 4}, "unknown config key 'likelihood.cfg_scale'"),
        (
            {"likelihood__solver": "shark"},
            "likelihood.solver 'shark' solves an SDE, which gives no log p; expected one",
        ),
        (
            {"likelihood__solver": "dopri"},
            "unknown likelihood.solver 'dopri'; did you mean 'dopri8' or 'dopri5'",
        ),
        (
            {"likelihood__solver": "heun", "likelihood__steps": None},
            "solver 'heun' takes fixed steps only and ignores atol and rtol; give "
            "likelihood.steps, or one",
        ),
        ({"likelihood__steps": 0}, "likelihood.steps is 0; expected 1 to 1,000,000"),
        ({"likelihood__probes": 0}, "likelihood.probes is 0; expected 1 to 10,000"),
        ({"likelihood__rtol": 0}, "likelihood.rtol is 0.0; expected 1e-30 to 1000"),
        ({"likelihood__seed": -1}, "likelihood.seed is -1; expected 0 to 4,294,967,295"),
        (
            {"likelihood__trace": "hutchison"},
            "unknown likelihood.trace 'hutchison'; did you mean 'hutchinson'?",
        ),
        (
            {"likelihood__probe": "normal"},
            "unknown likelihood.probe 'normal'; known: 'rademacher', 'gaussian'",
        ),
        ({"likelihood__labels": "none"}, "unknown likelihood.labels 'none'"),
        ({"likelihood__weights": "emma"}, "unknown likelihood.weights 'emma'; did you mean 'ema'"),
        (
            {"likelihood__dequantisation": "uniforn"},
            "unknown likelihood.dequantisation 'uniforn'; did you mean 'unifor",
        ),
        ({"likelihood__split": "tset"}, "unknown data.split 'tset'; did you mean 'test'"),
        (
            {"likelihood__count": 899},
            "likelihood.count is 899, but split 'test' of the digits source has 898 images",
        ),
        ({"model__depth": 2}, "is another one: model.depth is 2 but was 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_changes_no_file(trained, settings, words):
    before = snapshot(trained[0])
    assert words in refusal("--workdir", trained[0], "--mode", "likelihood", *flags(**settings))
    assert snapshot(trained[0]) == before


def test_a_batch_not_divisible_by_the_devices_is_one_line(trained, monkeypatch):
    before = snapshot(trained[0])
    monkeypatch.setattr(sharding, "batch_shards", lambda mesh: 4)
    arguments = ["--workdir", trained[0], "--mode", "likelihood", "--config.likelihood.batch=6"]
    message = refusal(*arguments)
    assert "likelihood.batch = 6 is not divisible by the 4 devices it is split over" in message
    assert snapshot(trained[0]) == before


def test_a_run_without_checkpoints_has_no_likelihood(run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    before = snapshot(run_copy)
    message = refusal("--workdir", run_copy, "--mode", "likelihood")
    assert "has no checkpoints; train first, with --mode train" in message
    assert snapshot(run_copy) == before


def test_weights_that_are_not_finite_end_in_one_line(run_copy, monkeypatch):
    restore = likelihood.restore_weights

    def broken(*arguments):
        weights = restore(*arguments)
        params = jax.tree.map(lambda leaf: leaf * np.nan, weights.params)
        return dataclasses.replace(weights, params=params)

    monkeypatch.setattr(likelihood, "restore_weights", broken)
    message = refusal("--workdir", run_copy, "--mode", "likelihood", *flags(**FAST))
    assert re.search(r"log p of images \[(\d+, ){7}\d+\] is not finite", message)
    assert not (folder_of(run_copy) / "results.jsonl").exists()
