"""--mode quality: the share of samples that a classifier of real images reads as their label."""

import json
import re

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.jobs import quality
from sit_jax.metrics import pixels
from tests.commands import flags, refusal, succeed

pytestmark = pytest.mark.usefixtures("quiet_machine")


def test_it_reports_both_scales_and_writes_them(run_copy):
    out = succeed("--workdir", run_copy, "--mode", "quality")
    accuracy = float(re.search(r"reads ([\d.]+)% of the real images it was not", out)[1])
    assert accuracy > 90  # an SVC on 8x8 digits
    shares = re.findall(r"^cfg ([\d.]+): ([\d.]+)% of 8 samples are read as their label", out, re.M)
    assert [scale for scale, _ in shares] == ["1.5", "1"]
    (folder,) = (run_copy / "quality").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples"] == 8 and summary["real_images"] == 899
    for scale, share in shares:
        assert summary["agreement"][f"cfg {scale}"] == pytest.approx(float(share) / 100, abs=6e-4)
    assert (folder / "sheet.png").exists() and f"sheet: {folder / 'sheet.png'}" in out


def test_too_few_samples_read_as_their_label_fail(run_copy, monkeypatch):
    class Never:
        def predict(self, features):
            return np.full(len(features), -1)

    monkeypatch.setattr(quality, "fit_classifier", lambda features, labels: Never())
    message = refusal("--workdir", run_copy, "--mode", "quality", "--minimum", "0.5,0.25")
    assert "cfg 1.5: 0.0% of the samples are read as their label, below --minimum 0.5" in message


@pytest.mark.parametrize("text", ["97", "high", "0.9,x", "-0.1"])
def test_a_minimum_that_is_not_a_fraction_is_refused(run_copy, text):
    message = refusal("--workdir", run_copy, "--mode", "quality", f"--minimum={text}")
    assert f"--minimum is {text!r}; expected one or two fractions from 0 to 1" in message


def test_a_class_with_few_images_cannot_be_judged():
    features = np.random.default_rng(0).uniform(size=(9, 4))
    with pytest.raises(UserError, match="a class has 4 images; expected 5 or more"):
        pixels.cross_validated_accuracy(features, np.repeat([0, 1], [5, 4]))


def test_another_count_or_other_real_images_have_a_folder_of_their_own(run_copy):
    for change in ({}, {"sample__count": 4}, {"sweep__reference_count": 500}):
        succeed("--workdir", run_copy, "--mode", "quality", *flags(**change))
    summaries = [
        json.loads(path.read_text()) for path in (run_copy / "quality").glob("*/summary.json")
    ]
    figures = sorted((summary["samples"], summary["real_images"]) for summary in summaries)
    assert figures == [(4, 899), (8, 500), (8, 899)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--minimum", "0,0,0"],
            "--minimum is '0,0,0', but samples are drawn at 2",
        ),
        (
            ["--minimum", "0,1", "--config.sample.cfg_scale=1"],
            "--minimum is '0,1', but samples are drawn at 1 guidance scale; give as many",
        ),
    ],
)
def test_a_minimum_that_nothing_is_compared_with_is_refused(run_copy, arguments, words):
    assert words in refusal("--workdir", run_copy, "--mode", "quality", *arguments)


def test_classes_without_a_readable_image_are_named(run_copy):
    few = flags(sweep__reference_count=3)
    message = refusal("--workdir", run_copy, "--mode", "quality", *few)
    assert "have no image among the 3 that were read; raise sweep.reference_count" in message
