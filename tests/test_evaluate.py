"""Evaluation through main, in the space of pixels, which needs no weights."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.jobs.evaluation import scores
from tests.commands import call, flags, refusal

DIGITS = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
PIXELS = flags(evaluate__features="pixels", sweep__components=8)


@pytest.fixture
def real(tmp_path):
    np.savez(tmp_path / "real.npz", DIGITS[::2])
    return tmp_path / "real.npz"


def write_folder(folder, images):
    """Write PNG files as another program might."""
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(np.repeat(image, 3, -1)).convert("L").save(folder / f"img_{number:05d}.png")
    return folder


def evaluate(*arguments):
    """Run the mode; return its summary and the folder it wrote."""
    status, out, err = call("--mode", "evaluate", *PIXELS, *arguments)
    assert status == 0, err
    folder = re.search("report: (.*)/report.html", out)[1]
    with open(f"{folder}/summary.json") as file:
        return json.load(file), folder, out, err


def noisy(images, scale):
    noise = np.random.default_rng(0).normal(0, scale, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_a_folder_and_an_npz_of_the_same_images_have_the_same_numbers(tmp_path, real):
    images = noisy(DIGITS[1::2], 10)
    np.savez(tmp_path / "samples.npz", images)
    folder = write_folder(tmp_path / "samples", images)
    out = ["--reference", real, "--out", tmp_path / "out"]
    from_npz, *_ = evaluate("--samples", tmp_path / "samples.npz", *out)
    from_folder, *_ = evaluate("--samples", folder, *out)
    assert from_npz["scores"] == from_folder["scores"]
    for part in ("samples", "reference"):
        assert from_npz["recipe"][part]["digest"] == from_folder["recipe"][part]["digest"]


def test_a_reference_of_grey_images_counts_once_however_it_is_stored(tmp_path, real):
    np.savez(tmp_path / "colour.npz", np.repeat(DIGITS[::2], 3, axis=-1))
    np.savez(tmp_path / "x.npz", noisy(DIGITS[1:401:2], 10))
    arguments = ["--samples", tmp_path / "x.npz", "--out", tmp_path]
    grey, *_ = evaluate(*arguments, "--reference", real)
    colour, *_ = evaluate(*arguments, "--reference", tmp_path / "colour.npz")
    assert colour["scores"] == grey["scores"]


def test_numbers_order_samples_by_their_quality(tmp_path, real):
    distances = []
    for scale in (0.5, 10, 40):
        images = noisy(DIGITS[1::2], scale)
        np.savez(tmp_path / f"{scale}.npz", images)
        arguments = ["--samples", tmp_path / f"{scale}.npz", "--reference", real]
        summary, *_ = evaluate(*arguments, "--out", tmp_path)
        scores = summary["scores"]["pixels"]
        distances.append(scores["frechet"]["value"])
        assert scores["frechet"]["standard_error"] < 0.2 * distances[-1] + 0.02
    # Real images against other real images are about as far as two halves of the reference.
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] < 3 * scores["frechet"]["real_halves"]


def test_the_reference_may_be_the_data_source_of_a_config(tmp_path):
    np.savez(tmp_path / "x.npz", noisy(DIGITS[:600], 5))
    arguments = ["--samples", tmp_path / "x.npz", "--out", tmp_path]
    summary, *_ = evaluate(*arguments, "--config", "configs/digits.py")
    assert summary["recipe"]["reference"]["count"] == 899  # the training half
    all_digits = [*arguments, "--config", "configs/digits.py", "--config.data.split=all"]
    summary, *_ = evaluate(*all_digits)
    np.savez(tmp_path / "all.npz", DIGITS)
    again, *_ = evaluate(*arguments, "--reference", tmp_path / "all.npz")
    assert again["recipe"]["reference"]["digest"] == summary["recipe"]["reference"]["digest"]
    assert again["scores"] == summary["scores"]


def test_a_report_is_one_file_and_its_command_makes_the_numbers_again(tmp_path, real):
    labels = np.arange(200) % 10
    np.savez(tmp_path / "x.npz", arr_0=noisy(DIGITS[1:401:2], 20), labels=labels)
    arguments = ["--samples", tmp_path / "x.npz", "--reference", real, "--out", tmp_path / "out"]
    summary, folder, out, _ = evaluate(*arguments)
    html, markdown = (pathlib.Path(folder, f"report.{kind}").read_text() for kind in ("html", "md"))
    for report in (html, markdown):
        assert report.count("data:image/png;base64,") == 1
        assert "http" not in report
        for key in ("samples.digest", "reference.digest", "features[0].digest", "versions.jax"):
            assert key in report
        assert f"{summary['scores']['pixels']['frechet']['value']:.4g}" in report
    assert Image.open(f"{folder}/sheet.png").size == (10 * 10 + 2, 10 * 10 + 2)  # a class a row
    command = summary["recipe"]["command"]
    assert command in markdown
    status, out, _ = call(*command.split()[3:], "--out", tmp_path / "again")
    assert status == 0
    again_folder = re.search("report: (.*)/report.html", out)[1]
    with open(f"{again_folder}/summary.json") as file:
        assert json.load(file)["scores"] == summary["scores"]


def test_a_command_of_relative_paths_works_from_any_folder(tmp_path, real, monkeypatch):
    np.savez(tmp_path / "x.npz", noisy(DIGITS[1:401:2], 20))
    monkeypatch.chdir(tmp_path)
    summary, *_ = evaluate("--samples", "x.npz", "--reference", real.name, "--out", "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, *_ = evaluate(*summary["recipe"]["command"].split()[5:])
    assert again["scores"] == summary["scores"]
    assert not list((tmp_path / "elsewhere").iterdir())  # it goes where it was


def test_few_of_many_real_images_may_be_kept(tmp_path, real):
    np.savez(tmp_path / "x.npz", noisy(DIGITS[1:401:2], 20))
    arguments = ["--samples", tmp_path / "x.npz", "--reference", real, "--out", tmp_path]
    summary, *_ = evaluate(*arguments, *flags(evaluate__kept=4))
    assert summary["recipe"]["reference"]["kept"] == 4


def test_sets_that_are_too_small_are_named(tmp_path, real):
    np.savez(tmp_path / "few.npz", noisy(DIGITS[1:7:2], 20))
    np.savez(tmp_path / "one.npz", DIGITS[:1])
    base = ["--mode", "evaluate", *PIXELS, "--out", tmp_path]
    message = refusal(*base, "--samples", tmp_path / "few.npz", "--reference", real)
    assert "few.npz' holds 3 images; expected 4 samples or more" in message
    message = refusal(*base, "--samples", real, "--reference", tmp_path / "one.npz")
    assert "one.npz' holds one image" in message
    np.savez(tmp_path / "eight.npz", DIGITS[:8])
    arguments = ["--samples", tmp_path / "few4.npz", "--out", tmp_path]
    np.savez(tmp_path / "few4.npz", noisy(DIGITS[1:101:2], 20))
    *_, err = evaluate(*arguments, "--reference", tmp_path / "eight.npz")
    assert "8 reference images are few for 8 features" in err


def test_copies_and_repeats_are_noticed(tmp_path, real):
    out = ["--reference", real, "--out", tmp_path]
    np.savez(tmp_path / "half.npz", np.concatenate([DIGITS[:50:2], noisy(DIGITS[1:400:2], 9)]))
    *_, err = evaluate("--samples", tmp_path / "half.npz", *out)
    assert "25 of the 225 samples are exact copies of reference images" in err
    np.savez(tmp_path / "repeat.npz", noisy(DIGITS[[1] * 30], 0.0))
    *_, err = evaluate("--samples", tmp_path / "repeat.npz", *out)
    assert "29 of the 30 samples repeat another sample exactly" in err
    message = refusal("--mode", "evaluate", *PIXELS, "--samples", real, *out)
    assert "all 899 samples are images of the reference" in message


def test_few_samples_are_warned_of_with_the_size_of_the_bias(tmp_path, real):
    np.savez(tmp_path / "x.npz", noisy(DIGITS[1:41:2], 0.5))
    arguments = ["--samples", tmp_path / "x.npz", "--reference", real, "--out", tmp_path]
    summary, *_, err = evaluate(*arguments)
    frechet = summary["scores"]["pixels"]["frechet"]
    assert f"would have Frechet distance (principal components) {frechet['bias']:.3g}" in err
    assert 0.3 < frechet["bias"] / frechet["value"] < 3


def test_bad_input_is_refused_in_one_line(tmp_path, real):
    base = ["--mode", "evaluate", *PIXELS, "--out", tmp_path]
    assert "--workdir (or --samples)" in refusal(*base)
    np.savez(tmp_path / "x.npz", DIGITS[1::2])
    samples = ["--samples", tmp_path / "x.npz"]
    assert "does not exist" in refusal(*base, *samples, "--reference", tmp_path / "none.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    message = refusal(*base, *samples, "--reference", tmp_path / "stats.npz")
    assert "statistics of a network's features, which pixels cannot" in message
    np.savez(tmp_path / "large.npz", np.repeat(DIGITS[:99], 2, 1))
    message = refusal(*base, *samples, "--reference", tmp_path / "large.npz")
    assert "the samples are 8 x 8 pixels" in message
    message = refusal(*base, *samples, "--reference", real, *flags(evaluate__features="inceptoin"))
    assert "did you mean 'inception'" in message
    assert not list(tmp_path.rglob("summary.json"))


def test_a_number_of_a_run_is_made_again_from_its_recipe(run_copy):
    sampler = flags(sample__count=40, sample__format="npz", sample__labels="3,1", sample__seed=7)
    arguments = ["--workdir", run_copy, *sampler, *flags(sample__checkpoint=2)]
    summary, folder, *_ = evaluate(*arguments)
    made = summary["recipe"]
    assert made["run"]["step"] == 2 and made["run"]["checkpoint"]
    assert made["run"]["evaluations"] == 4  # two steps of Heun
    report = pathlib.Path(folder, "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2  # samples, and the curves of training
    assert made["samples"]["count"] == 40 and made["run"]["sample"]["seed"] == 7
    # The run is trained on; the recipe names the checkpoint, which is drawn from again.
    for part in ("samples", "evaluations"):
        shutil.rmtree(run_copy / part, ignore_errors=True)
    (pathlib.Path(folder).parent.parent / "kept").mkdir(exist_ok=True)
    config = run_copy / "kept" / "config.json"
    config.write_text(json.dumps(made["config"]))
    command = made["command"].replace(f"{folder}/config.json", str(config)).split()[3:]
    again, *_ = evaluate(*command)
    assert again["scores"] == summary["scores"]
    assert again["recipe"]["samples"] == made["samples"]


def test_only_sample_count_images_are_evaluated_and_grey_ones_in_every_format(run_copy):
    arguments = ["--workdir", run_copy]
    more, *_ = evaluate(*arguments, *flags(sample__count=48))
    first, *_ = evaluate(*arguments, *flags(sample__count=40))
    assert first["recipe"]["samples"]["count"] == 40 < more["recipe"]["samples"]["count"]
    assert first["recipe"]["config"]["sample"]["checkpoint"] == 4  # the newest one, by its step
    npz, *_ = evaluate(*arguments, *flags(sample__count=40, sample__format="npz"))
    assert npz["scores"] == first["scores"]
    assert npz["recipe"]["samples"]["digest"] == first["recipe"]["samples"]["digest"]


def test_the_inception_score_of_samples_sorted_by_class_is_that_of_random_parts(capsys):
    logits = np.repeat(9 * np.eye(10), 30, axis=0)
    mean, _ = scores._inception_score(logits)
    assert mean > 8 and "the samples are sorted by class" in capsys.readouterr().err
    mixed, _ = scores._inception_score(np.tile(9 * np.eye(10), (30, 1)))
    assert mixed > 9 and capsys.readouterr().err == ""
