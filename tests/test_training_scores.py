"""Scores of samples during training, and the best checkpoint, which is kept."""

import json
import shutil

import numpy as np
import pytest

from sit_jax.jobs import loop, training_scores
from tests.commands import TINY, call, flags, refusal, succeed

SCORES = [
    *TINY,
    *flags(
        train__steps=12, checkpoint__every=4, checkpoint__keep_last=1, log__sheet_every=0,
        log__scores_every=2, log__scores_count=16, evaluate__features="pixels",
        sweep__components=4, optimizer__schedule="constant",
    ),
]  # fmt: skip


def rows(workdir):
    """Return the rows of metrics.jsonl that hold scores, by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in lines if "pixels/frechet" in row}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scores") / "run"
    return workdir, succeed(*SCORES, "--workdir", workdir)


def test_scores_go_to_the_logs_and_the_best_checkpoint_is_kept(scored):
    workdir, out = scored
    found = rows(workdir)
    assert list(found) == [2, 4, 6, 8, 10, 12]
    assert "scores every 2 steps: 16 EMA samples against 899 images" in out
    values = {step: row["pixels/frechet"] for step, row in found.items()}
    assert all(0 <= row["pixels/precision"] <= 1 for row in found.values())
    best = json.loads((workdir / "best.json").read_text())
    assert best["value"] == min(values.values()) == values[best["step"]]
    assert best["measure"] == "frechet"
    assert out.count("(the best so far)") >= 1
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert steps == {best["step"], 12}
    # It can be used like any other.
    succeed(
        "--workdir", workdir, "--mode", "sample", "--out", workdir / "out",
        *flags(sample__checkpoint=best["step"]),
    )  # fmt: skip


def test_scores_are_those_of_evaluate(scored, tmp_path):
    workdir, _ = scored
    arguments = ["--workdir", workdir, "--mode", "evaluate", "--out", tmp_path]
    status, _, _ = call(*arguments, *flags(sample__count=16))
    assert status == 0
    (folder,) = (tmp_path / "evaluations").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    found = summary["scores"]["pixels"]
    for name in ("frechet", "precision", "recall"):
        np.testing.assert_allclose(
            found[name]["value"], rows(workdir)[12][f"pixels/{name}"], rtol=1e-6
        )


@pytest.mark.slow
def test_a_stopped_run_has_the_scores_of_an_undisturbed_one(scored, tmp_path):
    workdir = tmp_path / "run"
    # As if it had been stopped between two scores, and once at a step that was due.
    for steps in (3, 6, 12):
        succeed(*SCORES, "--workdir", workdir, *flags(train__steps=steps))
    mine, theirs = rows(workdir), rows(scored[0])
    del mine[3]  # the last step of a run has scores as well
    assert mine.keys() == theirs.keys()
    for step, row in mine.items():
        assert row == theirs[step]


def test_a_run_that_stops_at_a_due_step_scores_it_when_it_goes_on(scored, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_must_stop", lambda step, stop: step == 6)
        assert "stopped at step 6 of 12" in succeed(*SCORES, "--workdir", workdir)
    assert list(rows(workdir)) == [2, 4]
    succeed(*SCORES, "--workdir", workdir)
    assert rows(workdir) == rows(scored[0])


def test_without_weights_pixels_serve_and_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(training_scores.weight_files, "cached_path", lambda _: "/nowhere")
    out = succeed(*SCORES, "--workdir", tmp_path, *flags(evaluate__features="inception"))
    assert "the weights of inception are not in the cache folder, so scores in training" in out
    assert "python -m convert.inception" in out
    assert list(rows(tmp_path)) == [2, 4, 6, 8, 10, 12]


def test_bad_references_stop_the_run_before_it_starts(tmp_path):
    base = [*SCORES, "--workdir", tmp_path / "run"]
    message = refusal(*base, *flags(evaluate__reference=tmp_path / "none.npz"))
    assert "does not exist" in message
    np.savez(
        tmp_path / "large.npz", np.random.default_rng(0).integers(0, 9, (9, 16, 16, 1), np.uint8)
    )
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    message = refusal(*base, *flags(evaluate__reference=tmp_path / "large.npz"))
    assert "the samples are 8 x 8 pixels in 1 channels, but the reference is 16 x 16" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_best_checkpoint_outlives_training_without_scores(scored, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(scored[0], workdir)
    best = json.loads((workdir / "best.json").read_text())
    succeed("--workdir", workdir, *flags(train__steps=16, log__scores_every=0))
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert steps == {best["step"], 16}


@pytest.mark.slow
def test_scores_of_another_sampler_are_not_compared(scored, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(scored[0], workdir)
    before = json.loads((workdir / "best.json").read_text())
    succeed("--workdir", workdir, *flags(train__steps=14, sample__steps=1, sample__cfg_scale=9.0))
    after = json.loads((workdir / "best.json").read_text())
    assert after["step"] == 14 and after["space"] != before["space"]


def test_too_few_labels_are_refused(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(9))
    labels = flags(sample__labels_file=tmp_path / "labels.npy")
    message = refusal(*SCORES, "--workdir", tmp_path / "run", *labels)
    assert "holds 9 labels, but log.scores_count is 16" in message
