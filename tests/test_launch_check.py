"""launch/: a command that cannot start is refused before anything is created."""

import shlex
import sys

import pytest

from tests.cloud import GCLOUD, MAIN, TPU, XPK, Cloud, refusal
from tests.machine import BASH, ROOT
from tests.test_readme import commands as commands_of

DATA = ("--data", "gs://bucket/my latents/")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def google(cloud):
    cloud.tool("gcloud", GCLOUD)
    return cloud


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resources.sh"])
def test_a_command_that_cannot_start_creates_nothing(google, script):
    result = google.run(script, *TPU, "--", *MAIN, REFUSES="data.path is empty")
    assert refusal(result) == "error: data.path is empty"
    assert not (google.folder / "calls").exists()


def test_the_check_gets_the_devices_the_manifest_and_the_arguments(google):
    assert google.run("tpu_vm.sh", *TPU, *DATA, "--", *MAIN).returncode == 0
    (line, manifest) = google.checks()
    folder = line.partition("--manifest ")[2].partition(" ")[0]
    expected = f"-m sit_jax.check_command --devices 16 --elsewhere --manifest {folder}"
    path = "--config.data.path=~/sit_data/bucket/my latents"
    assert line == f"{expected} --brings_data -- {' '.join(MAIN)} {path}"
    assert manifest == 'manifest {"stored": 1}'
    first = (google.folder / "calls").read_text().splitlines()[0]
    assert first == "gcloud storage cat gs://bucket/my latents/manifest.json"
    assert not list(google.folder.glob("tmp.*"))


def test_the_dry_run_checks_and_says_that_the_bucket_was_not_read(google):
    result = google.run("tpu_vm.sh", *TPU, *DATA, "--dry_run", "--", *MAIN)
    assert "== --dry_run does not read gs://bucket/my latents\n" in result.stderr
    assert "== checked: train on 16 devices\n" in result.stderr
    assert not (google.folder / "calls").exists() and "--manifest" not in google.checks()[0]
    result = google.run("tpu_vm.sh", *TPU, "--dry_run", "--", *MAIN, REFUSES="train.batch is 0")
    assert refusal(result) == "error: train.batch is 0"


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        ((), "gcloud cannot read gs://bucket/my latents/manifest.json (its reason is above)"),
        (("--mount",), "gcloud cannot list gs://bucket/my latents (its reason is above)"),
    ],
)
def test_a_bucket_without_the_data_creates_nothing(google, mount, expected):
    google.answers(**{"no bucket": [""]})
    result = google.run("tpu_vm.sh", *TPU, *DATA, *mount, "--", *MAIN)
    assert result.returncode == 2
    assert result.stderr.startswith(f"ERROR: matched no objects\nerror: {expected}")
    assert not google.checks() and not google.calls()[0]
    assert not list(google.folder.glob("tmp.*"))


def test_no_check_starts_without_python(google):
    result = google.run("tpu_vm.sh", *TPU, "--no_check", "--", *MAIN, PYTHON="/nowhere")
    assert result.returncode == 0 and not google.checks()
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN, PYTHON="/nowhere")
    assert "/nowhere does not exist, and would check the arguments before" in refusal(result)
    assert "or give --no_check" in refusal(result)


def test_a_python_without_the_packages_creates_nothing(google):
    problem = {"REFUSES": "ModuleNotFoundError: No module named 'jax'", "REFUSAL": "1"}
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN, **problem)
    assert result.returncode == 2 and not google.calls()[0]
    assert "cannot check the arguments (the reason is above); install the" in result.stderr


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        *(("v4-16", 8), ("v5litepod-16", 16), ("v5p-128", 64), ("v6e-4", 4), ("v3-8", 8)),
        ("v2-32", 32),
    ],
)
def test_the_type_says_how_many_devices_there_are(google, kind, devices):
    result = google.run("tpu_vm.sh", *TPU, f"--type={kind}", "--dry_run", "--", *MAIN)
    assert result.returncode == 0
    assert google.checks()[0].startswith(f"-m sit_jax.check_command --devices {devices} ")


def test_a_type_of_unknown_size_is_refused(google):
    for kind in ("v5litepod-", "v5litepod-x", "v5p-0", "v9-8"):
        result = google.run("tpu_vm.sh", *TPU, f"--type={kind}", "--version=v", "--", *MAIN)
        assert f"--type '{kind}' has an unknown number of devices" in refusal(result)
    assert not google.calls()[0] and not google.checks()


def test_the_real_check_refuses_the_documented_command_without_data(google):
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN, PYTHON=sys.executable)
    assert "data.path is empty, but data.source='folder' needs a folder;" in refusal(result)
    assert not google.calls()[0]
    latents = ("--config=configs/latents.py", "--workdir=gs://bucket/run")
    result = google.run(
        "tpu_vm.sh", *TPU, *DATA, "--dry_run", "--", *latents, PYTHON=sys.executable
    )
    assert result.returncode == 0, result.stderr
    assert "== checked: train on 16 devices, data 1 x fsdp 16 x tensor 1" in result.stderr


@pytest.fixture
def xpk(google):
    google.tool("xpk", f'#!{BASH}\necho "xpk $*" >>"$CLOUD/calls"\n')
    return google


def test_a_workload_that_cannot_start_is_not_submitted(xpk):
    result = xpk.run("xpk.sh", *XPK, "--", *MAIN, REFUSES="train.batch is 0")
    assert refusal(result) == "error: train.batch is 0" and not xpk.calls()[0]
    xpk.answers(**{"no bucket": [""]})
    result = xpk.run("xpk.sh", *XPK, *DATA, "--", *MAIN)
    assert result.returncode == 2 and "gcloud cannot read" in result.stderr and not xpk.calls()[0]
    assert xpk.run("xpk.sh", *XPK, "--no_check", "--", *MAIN, PYTHON="/nowhere").returncode == 0
    assert xpk.calls()[0] == ["create"]


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        *(("v5p-2x2x2", 8), ("v5litepod-4x4", 16), ("v6e-16", 16), ("v4-2x2x1", 4)),
        *(("tpu7x-16", 16), ("tpu7x-2x2x1", 8)),
    ],
)
def test_the_devices_of_all_slices_count(xpk, kind, devices):
    xpk.run("xpk.sh", *XPK, f"--type={kind}", "--slices=3", "--dry_run", "--", *MAIN)
    assert xpk.checks()[0].startswith(f"-m sit_jax.check_command --devices {3 * devices} --else")


def test_the_real_check_refuses_a_workload(xpk):
    config = ("--config=configs/latents.py", "--workdir=gs://bucket/run")
    fewer = (*XPK, "--type=v5litepod-256", "--data=gs://b/latents", "--dry_run")
    result = xpk.run("xpk.sh", *fewer, "--", *config, PYTHON=sys.executable)
    assert "mesh.fsdp = 256 does not divide the model's 1152 channels" in refusal(result)
    mesh = ("--config.mesh.fsdp=64", "--config.mesh.data=-1")  # as its --help shows
    result = xpk.run("xpk.sh", *fewer, "--", *config, *mesh, PYTHON=sys.executable)
    assert "== checked: train on 256 devices, data 4 x fsdp 64 x tensor 1" in result.stderr


SCRIPTS = ("tpu_vm.sh", "queued_resources.sh", "xpk.sh")
README = commands_of((ROOT / "launch" / "README.md").read_text())
DOCUMENTED = [
    words[1:]
    for words in map(shlex.split, README)
    if words[0] == "bash" and words[1].removeprefix("launch/") in SCRIPTS and "--" in words
]


@pytest.mark.parametrize("words", DOCUMENTED, ids=lambda words: " ".join(words[:3]))
def test_the_documented_commands_can_start(cloud, words):
    script, *options = [word for word in words if word != "--dry_run"]
    script = script.removeprefix("launch/")
    result = cloud.run(script, "--dry_run", *options, PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert "== checked: train on " in result.stderr


def test_there_are_documented_commands():
    assert {words[0].removeprefix("launch/") for words in DOCUMENTED} == set(SCRIPTS)
