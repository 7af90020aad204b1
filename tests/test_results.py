"""Folders of results: they may lie outside of the workdir, and one job at a time fills one."""

import hashlib
import json
import os

import pytest
from etils import epath

from sit_jax import lock
from tests.commands import flags, pictures, refusal, snapshot, succeed

pytestmark = pytest.mark.usefixtures("quiet_machine")


def test_results_may_lie_outside_of_a_workdir_that_stays_as_it_is(run_copy, tmp_path):
    before = snapshot(run_copy)
    out = succeed("--workdir", run_copy, "--mode", "sample", "--out", tmp_path / "out")
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    assert str(folder) in out and len(pictures(folder)) == 8
    assert snapshot(run_copy) == before
    message = refusal("--workdir", run_copy, "--out", tmp_path / "out")
    assert (
        "--out is for --mode sample, evaluate, stats, sweep, invert, likelihood, quality, "
        "excess, encode, data, not train" in message
    )
    assert "--out is empty" in refusal("--workdir", run_copy, "--mode", "sample", "--out=")


def test_one_job_at_a_time_fills_a_folder_of_results(run_copy):
    likelihood = ["--workdir", run_copy, "--mode", "likelihood"]
    likelihood += flags(likelihood__solver="heun", likelihood__steps=1, likelihood__count=4)
    succeed(*likelihood)
    (folder,) = (run_copy / "likelihood").iterdir()
    (folder / "results.jsonl").unlink()
    (folder / ".000004.png.f8e3ce9e.tmp").write_bytes(b"")
    os.utime(folder / ".000004.png.f8e3ce9e.tmp", (1, 1))
    with lock.hold(epath.Path(folder)):
        assert f"{str(folder)!r} is in use by process {os.getpid()}" in refusal(*likelihood)
    # It is for training only, so the results are the same.
    succeed(*likelihood, *flags(precision__deterministic="true"))
    assert list((run_copy / "likelihood").iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == [
        "results.jsonl",
        "settings.json",
        "summary.json",
    ]


def test_images_of_two_precisions_lie_in_two_folders(run_copy):
    """The images of an earlier version, whose settings say null for "highest", are continued."""
    sample = ["--workdir", run_copy, "--mode", "sample"]
    succeed(*sample)
    (high,) = (run_copy / "samples").iterdir()
    settings = json.loads((high / "settings.json").read_text())
    assert settings["precision"]["matmul"] == "high"
    settings["precision"]["matmul"] = None
    earlier = hashlib.sha256(json.dumps(settings, indent=2).encode()).hexdigest()[:6]
    highest = [*sample, *flags(precision__matmul="highest")]
    assert "sampling 8 of 8 images" in succeed(*highest)
    (folder,) = set((run_copy / "samples").iterdir()) - {high}
    assert folder.name.endswith(f"-{earlier}")
    assert json.loads((folder / "settings.json").read_text())["precision"]["matmul"] == "highest"
    assert "sampling 0 of 8 images" in succeed(*highest)
    assert "sampling 0 of 8 images" in succeed(*sample)
