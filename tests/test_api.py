"""sit_jax.load: a run in Python returns the results of the jobs, and refuses the same mistakes."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

import sit_jax
from sit_jax.errors import UserError
from tests.commands import flags, pictures, record_as_trained_with, succeed

pytestmark = pytest.mark.usefixtures("quiet_machine")


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """Return a copy of the run of 4 steps that also has samples and likelihoods."""
    folder = shutil.copytree(trained[0], tmp_path_factory.mktemp("api") / "run")
    succeed("--workdir", folder, "--mode", "sample", *flags(sample__labels="3,1,4,1,5,9,2,6"))
    succeed(
        "--workdir", folder, "--mode", "likelihood",
        *flags(likelihood__batch=128, likelihood__solver="heun", likelihood__steps=2),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return sit_jax.load(workdir)


def test_a_run_knows_its_config_step_and_parameters(run):
    assert run.config.model.width == 16 and run.step == 4
    assert run.params["pos_embed"].shape == (4, 16)
    assert "step 4" in repr(run)


def test_samples_are_those_of_the_sample_job(run, workdir):
    (folder,) = (workdir / "samples").iterdir()
    images = run.sample(labels=[3, 1, 4, 1, 5, 9, 2, 6])
    assert images.shape == (8, 8, 8, 1) and images.dtype == np.uint8
    for index in range(8):
        np.testing.assert_array_equal(images[index, ..., 0], pictures(folder)[f"{index:06d}.png"])


def test_options_are_settings_of_the_sampler(run):
    plain = run.sample(labels=[3, 1])
    assert (run.sample(labels=[3, 1], seed=1) != plain).any()
    assert (run.sample(labels=[3, 1], cfg_scale=8.0) != plain).any()
    np.testing.assert_array_equal(run.sample(labels=[3, 1]), plain)  # they do not persist
    assert run.sample(count=5).shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(run.sample(labels=[3, 1], cfg_scale=np.float64(1.5)), plain)
    assert run.sample(labels=7, frames=3).shape == (1, 3, 8, 8, 1)


def test_samples_start_from_the_given_noise(run):
    noise = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    images = run.sample(labels=[3], noise=noise)
    assert images.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(run.sample(labels=[3, 3, 3], noise=noise), images)
    np.testing.assert_array_equal(run.sample(labels=[3], noise=noise[1:2])[0], images[1])
    assert (images[0] != images[1]).any()


def test_one_euler_step_follows_the_velocity(run):
    noise = np.random.default_rng(1).standard_normal((2, 8, 8, 1)).astype(np.float32)
    options = {"solver": "euler", "steps": 1, "cfg_scale": 1.0}
    velocity = run.velocity(noise, 0.0, labels=[3, 1])
    end = np.clip(127.5 * (noise + velocity) + 128, 0, 255).astype(np.uint8)
    images = run.sample(labels=[3, 1], noise=noise, **options)
    assert np.abs(images.astype(int) - end).max() <= 1  # the two programs round differently
    per_example = run.velocity(noise, np.array([0.0, 0.0]), labels=[3, 1])
    np.testing.assert_allclose(per_example, velocity, rtol=1e-5, atol=1e-5)
    null = run.velocity(noise, 0.0)
    assert null.shape == noise.shape and (np.abs(null - velocity) > 1e-7).any()


def test_tokens_after_the_last_layer_have_their_shape_and_depend_on_x(run):
    x = np.random.default_rng(2).standard_normal((2, 8, 8, 1)).astype(np.float32)
    tokens = run.tokens(x, 0.5, labels=[0, 1], layer=1)
    assert tokens.shape == (2, 4, 16) and np.isfinite(tokens).all()
    assert (tokens != run.tokens(x[::-1], 0.5, labels=[0, 1], layer=1)).any()
    with pytest.raises(UserError, match="layer"):
        run.tokens(x, 0.5, layer=2)


def test_log_prob_is_that_of_the_likelihood_job(run, workdir):
    (folder,) = (workdir / "likelihood").iterdir()
    lines = (folder / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:3]]  # without a count: all images, in order
    digits = load_digits()
    images = np.round(digits.images[1::2] * (255 / 16)).astype(np.uint8)[:3, ..., None]
    labels = digits.target[1::2][:3]
    log_prob = run.log_prob(images, labels, solver="heun", steps=2)
    np.testing.assert_allclose(log_prob, [row["log_prob"] for row in rows], rtol=1e-5)
    bits = -log_prob / (64 * math.log(2))
    np.testing.assert_allclose(bits, [row["bits_per_dim"] for row in rows], rtol=1e-5)
    one_by_one = run.log_prob(images, labels, solver="heun", steps=2, batch=1)
    np.testing.assert_allclose(one_by_one, log_prob, rtol=1e-5)
    null = run.log_prob(images, solver="heun", steps=2)
    assert null.shape == (3,) and (null != log_prob).any()


X = np.zeros((2, 8, 8, 1), np.float32)
IMAGES = np.zeros((2, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.sample(labels=[3, 10]), r"sample.labels holds 10; expected 0 to 9"),
        (lambda r: r.sample(labels=-1), r"sample.labels holds -1; expected 0 to 9"),
        (lambda r: r.sample(labels=[1.5]), r"labels are \[1.5\]; expected one whole number"),
        (lambda r: r.sample(labels=[]), r"labels are \[\]; expected one whole number"),
        (lambda r: r.sample(labels="3"), r"labels are '3'; expected one whole number"),
        (lambda r: r.sample(weights="raw"), r"weights is 'raw'.*sit_jax.load\(workdir, weights="),
        (lambda r: r.sample(columns=3), r"unknown setting of sample 'columns'"),
        (lambda r: r.log_prob(IMAGES, weights="raw"), r"weights is 'raw'.*sit_jax.load"),
        (lambda r: r.log_prob(IMAGES, split="test"), r"unknown setting of likelihood 'split'"),
        (lambda r: r.velocity(X, 0.5, labels=[0.5, 1]), r"labels are .*expected one whole number"),
        (lambda r: r.sample(count=0), r"sample.count is 0; expected 1 to 10,000,000"),
        (lambda r: r.sample(steps=0), r"sample.steps is 0; expected 1 to 1,000,000"),
        (lambda r: r.sample(cfg_scal=2), r"unknown setting of sample 'cfg_scal'; did you mean"),
        (
            lambda r: r.sample(solver="eular"),
            r"unknown sample.solver 'eular'; did you mean 'euler'",
        ),
        (lambda r: r.sample(labels=[1, 2, 3], noise=X), r"2 rows of noise, but 3 labels"),
        (
            lambda r: r.sample(noise=X[..., 0]),
            r"noise has shape \(2, 8, 8\); expected \[n, 8, 8, 1\]",
        ),
        (
            lambda r: r.velocity(X[:, :4], 0.5),
            r"x has shape \(2, 4, 8, 1\); expected \[n, 8, 8, 1\]",
        ),
        (lambda r: r.velocity(X[:0], 0.5), r"x has shape \(0, 8, 8, 1\).* n > 0"),
        (lambda r: r.velocity(X, 1.5), r"t is 1.5; expected one time, or 2, from 0"),
        (lambda r: r.velocity(X, float("nan")), r"t is nan; expected one time"),
        (lambda r: r.velocity(X, []), r"t has shape \(0,\); expected one time"),
        (
            lambda r: r.velocity(X * np.nan, 0.5),
            r"x holds NaN, values beyond float32 or no",
        ),
        (lambda r: r.velocity(np.full(X.shape, 1e300), 0.5), r"x holds NaN, values beyond float32"),
        (lambda r: r.sample(noise=np.full(X.shape, 1e300)), r"noise holds NaN, values beyond"),
        (lambda r: r.tokens(X, 0.5, layer="1"), r"layer is '1'; expected a whole number"),
        (lambda r: r.velocity(X, [0.1, 0.2, 0.3]), r"t has shape \(3,\)"),
        (lambda r: r.velocity(X, 0.5, labels=[1, 2, 3]), r"3 labels for 2 examples"),
        (lambda r: r.velocity(X, 0.5, labels=[1, 11]), r"labels hold \[11\]; expected 0 to 9"),
        (lambda r: r.log_prob(X), r"images are float32; expected uint8"),
        (lambda r: r.log_prob(IMAGES[:, :4]), r"images has shape \(2, 4, 8, 1\)"),
        (lambda r: r.log_prob(IMAGES, step=3), r"unknown setting of likelihood 'step'"),
        (
            lambda r: r.sample(labels=[1, 2], count=3),
            r"count is 3, but labels or noise are given f",
        ),
        (lambda r: r.sample(noise=X, count=1), r"count is 1, but .* for 2 samples; leave count"),
        (lambda r: r.sample(labels=[[1], [2, 3]]), r"labels is \[\[1\], .*lists of equal lengths"),
        (lambda r: r.sample(times=[0.5, [1]]), r"sample.times is \[0.5, \[1\]\]; expected a list"),
        (lambda r: r.sample(rtol=np.inf), r"sample.rtol is inf; expected a finite number"),
        (lambda r: r.sample(guide="$X/run", cfg_scale=2), r"sample.guide is '\$X/run', which does"),
        (lambda r: r.velocity([[1.0], [2.0, 3.0]], 0.5), r"x is \[.*lists of equal lengths"),
        (lambda r: r.velocity(X, [[0.5], [0.1, 0.2]]), r"t is \[.*lists of equal lengths"),
        (lambda r: r.velocity(X, "now"), r"t is 'now'; expected one time, or 2"),
        (lambda r: r.log_prob([[1], [2, 3]]), r"images is \[.*lists of equal lengths"),
    ],
)
def test_a_mistake_is_one_line(run, call, words):
    with pytest.raises(UserError, match=words) as error:
        call(run)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_a_workdir_is_refused(tmp_path, workdir):
    with pytest.raises(UserError, match="is not a workdir: it has no config.json"):
        sit_jax.load(tmp_path)
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoints"):
        sit_jax.load(tmp_path)
    with pytest.raises(UserError, match="unknown weights 'emas'; did you mean 'ema'"):
        sit_jax.load(workdir, weights="emas")


@pytest.mark.parametrize("workdir", [None, 3, ["runs"], "", "~nobody-here/x", "foo://x", "$X/y"])
def test_what_is_not_a_path_is_refused(workdir):
    with pytest.raises(UserError, match=r"workdir.*(expected|give|known)"):
        sit_jax.load(workdir)


def test_refusals_name_no_flags_of_the_command_line(tmp_path, workdir):
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match="has no checkpoints") as caught:
        sit_jax.load(tmp_path)
    assert "--workdir" not in str(caught.value)
    with pytest.raises(UserError, match=r"unknown weights \['ema'\]"):
        sit_jax.load(workdir, weights=["ema"])


def test_a_null_label_that_was_not_trained_is_refused(tmp_path, workdir):
    other = shutil.copytree(workdir, tmp_path / "run")
    record_as_trained_with(other, train__label_dropout=0.0)
    run = sit_jax.load(other)
    words = "train.label_dropout is 0, so that no null label is trained"
    for call in (
        lambda: run.velocity(X, 0.5),
        lambda: run.tokens(X, 0.5, layer=1),
        lambda: run.log_prob(IMAGES, solver="euler", steps=1),
        lambda: run.sample(labels=[1], cfg_scale=2),
    ):
        with pytest.raises(UserError, match=words):
            call()
    assert run.velocity(X, 0.5, labels=[1, 2]).shape == X.shape
    assert np.isfinite(run.log_prob(IMAGES, [1, 2], solver="euler", steps=1)).all()
    assert run.sample(labels=[1], cfg_scale=1, count=1).shape == (1, 8, 8, 1)


def test_a_run_of_another_model_is_refused(tmp_path, workdir):
    other = shutil.copytree(workdir, tmp_path / "run")
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"width": 16', '"width": 32'))
    with pytest.raises(UserError, match="another one: model.width is 32 but was 16 in"):
        sit_jax.load(other)


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = sit_jax.lod


def test_a_diverged_run_gives_no_log_prob(workdir):
    diverged = sit_jax.load(workdir)
    diverged.params = jax.tree.map(lambda leaf: leaf * np.nan, diverged.params)
    with pytest.raises(UserError, match=r"log p of images \[0, 1\] is not finite"):
        diverged.log_prob(IMAGES, [1, 2], solver="euler", steps=1)
