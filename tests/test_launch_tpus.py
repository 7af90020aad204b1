"""launch/tpu_vm.sh and launch/queued_resources.sh: training on Cloud TPUs, through preemptions."""

import pytest

from tests.cloud import GCLOUD, INSTALL, MAIN, MAIN_LINE, STOPPED, TPU, Cloud, commands
from tests.machine import BASH, ROOT, Machine


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def google(cloud):
    cloud.tool("gcloud", GCLOUD)
    return cloud


def tpu_commands(folder, create, delete, place, main):
    """Return the commands that both scripts run, given those that differ."""
    archive = f"{folder}/sit_jax.sit.tar.gz"
    copied = ["configs", "convert", "launch", "sit_jax", "pyproject.toml", "requirements.txt"]
    tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    ssh = [*tpu_vm, "ssh", "sit", *place, "--worker=all"]
    return [
        ["gcloud", "compute", "tpus", *create],
        ["tar", "-czf", archive, "-C", str(ROOT), *copied],
        [*tpu_vm, "scp", archive, "sit:sit_jax.tar.gz", *place, "--worker=all"],
        ["rm", archive],
        [*ssh, f"--command={INSTALL}"],
        [*ssh, f"--command=cd sit_jax && {main}"],
        ["gcloud", "compute", "tpus", *delete],
    ]


def test_a_tpu_vm_dry_run_prints_the_real_commands(cloud):
    result = cloud.run("tpu_vm.sh", *TPU, "--spot", "--delete", "--dry_run", "--", *MAIN)
    zone = "--zone=us-west4-a"
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert commands(result) == tpu_commands(
        cloud.folder,
        create=["tpu-vm", "create", "sit", zone, *kind, "--spot"],
        delete=["tpu-vm", "delete", "sit", zone, "--quiet"],
        place=[zone],
        main=f".venv/bin/python -m sit_jax.main {MAIN_LINE}",
    )


def test_a_queued_resource_dry_run_prints_the_real_commands(cloud):
    flags = cloud.folder / "my.flags"
    flags.write_text("# why\n--xla_one=1 # more\n\n--xla_two=true")
    tpu = ("--name=sit", "--zone=z", "--project=p", "--type=v6e-16")
    options = (*tpu, "--delete", "--dry_run", "--flags=my.flags")
    result = cloud.run("queued_resources.sh", *options, "--", *MAIN, cwd=cloud.folder)
    place = ["--zone=z", "--project=p"]
    kind = ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]
    environment = "env 'LIBTPU_INIT_ARGS=--xla_one=1 --xla_two=true'"
    assert commands(result) == tpu_commands(
        cloud.folder,
        create=["queued-resources", "create", "sit", *place, "--node-id=sit", *kind],
        delete=["queued-resources", "delete", "sit", *place, "--force", "--quiet"],
        place=place,
        main=f"{environment} .venv/bin/python -m sit_jax.main {MAIN_LINE}",
    )


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resources.sh"])
def test_a_preempted_tpu_is_replaced_and_the_same_command_runs_on_it(google, script):
    google.answers(
        runs=[
            "1 PREEMPTED step 4",
            "0 GONE " + STOPPED,
            "255 TERMINATED step 7",
            "0 READY trained to step 9",
        ],
        # The second replacement finds no capacity at first.
        creations=["0 READY", "0 READY", "1 -", "1 -", "0 READY"],
    )
    result = google.run(script, *TPU, "--spot", "--delete", "--", *MAIN)
    assert result.returncode == 0, result.stderr
    verbs, lines = google.calls()
    train = ["scp", "on_tpu_vm", "sit_jax.main"]
    # A VM that is gone leaves nothing to delete, except the request that it was created by.
    delete_request = ["delete"] if script == "queued_resources.sh" else []
    expected = [
        *("create", *train, "delete"),
        *("create", *train, *delete_request),
        *("create", "create", "create", *train, "delete"),
        *("create", *train, "delete"),
    ]
    assert verbs == expected
    runs = {line for line, verb in zip(lines, verbs, strict=True) if verb == "sit_jax.main"}
    assert len(runs) == 1 and MAIN_LINE in runs.pop()
    assert "trained to step 9" in result.stdout
    assert not (google.folder / "sit_jax.sit.tar.gz").exists()


def test_a_queued_resource_is_waited_for(google):
    result = google.run("queued_resources.sh", *TPU, "--", *MAIN)
    states = [line for line in result.stderr.splitlines() if line.startswith("== sit: ")]
    assert states == ["== sit: does not exist", "== sit: WAITING_FOR_RESOURCES", "== sit: READY"]
    delete = "gcloud compute tpus queued-resources delete sit"
    assert f"sit still exists, and is billed, until you run: {delete}" in result.stderr


def test_a_tpu_that_already_exists_is_used(google):
    google.answers(state=["READY"])
    assert google.run("tpu_vm.sh", *TPU, "--", *MAIN).returncode == 0
    assert google.calls()[0] == ["scp", "on_tpu_vm", "sit_jax.main"]


def test_training_that_stopped_early_continues_on_a_tpu_that_still_exists(google):
    google.answers(runs=["0 READY " + STOPPED, "0 READY trained to step 9"])
    assert google.run("tpu_vm.sh", *TPU, "--", *MAIN).returncode == 0
    verbs, _ = google.calls()
    assert verbs.count("sit_jax.main") == 2 and verbs.count("create") == 1


def test_training_that_fails_by_itself_is_not_run_again(google):
    google.answers(runs=["2 READY error: --config is wrong"])
    result = google.run("tpu_vm.sh", *TPU, "--delete", "--", *MAIN)
    verbs, _ = google.calls()
    assert result.returncode == 2 and verbs.count("sit_jax.main") == 1 and "delete" not in verbs
    expected = "error: failed with status 2 (the reason is above); sit still exists: run this again"
    assert expected in result.stderr


def test_a_tpu_that_cannot_be_created_at_first_is_an_error(google):
    google.answers(creations=["1 -"])
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN)
    assert result.returncode == 2 and "error: sit could not be created" in result.stderr
    assert google.calls()[0] == ["create"]


def test_an_unreachable_cloud_is_not_mistaken_for_an_absent_tpu(google):
    google.answers(offline=[""])
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN)
    assert result.returncode == 2 and "no network" in result.stderr
    assert "error: gcloud cannot read the state of sit" in result.stderr
    assert not google.calls()[0]


def test_a_tpu_vm_with_an_old_python_gets_a_newer_one(tmp_path):
    machine = Machine(tmp_path, python=False)
    machine.stand_in(tmp_path / "python3.11")
    sudo = machine.bin / "sudo"
    sudo.write_text(
        f'#!{BASH}\nprintf "%s\\n" "$*" >>"$CALLS"\ncp "{tmp_path}/python3.11" "{machine.bin}"\n'
    )
    sudo.chmod(0o755)
    result = machine.run("on_tpu_vm.sh")
    assert result.returncode == 0, result.stderr
    update, install, pip = machine.calls()
    assert update.endswith("update") and install.endswith("install -y python3.11 python3.11-venv")
    assert pip.endswith("-m pip install --quiet --disable-pip-version-check -e .[tpu]")
