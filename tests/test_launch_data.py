"""launch/: the data on every host before the start, and launch/data.sh, which brings them."""

import re
import shutil

import pytest

from tests.cloud import GCLOUD, INSTALL, MAIN, MAIN_LINE, TPU, XPK, Cloud, commands, refusal
from tests.machine import BASH, Machine

DATA = ("--data", "gs://bucket/my latents/")
COPY = "cd sit_jax && bash launch/data.sh copy 'gs://bucket/my latents' "
COPY += "'~/sit_data/bucket/my latents'"
DATA_LINE = f"{MAIN_LINE} '--config.data.path=~/sit_data/bucket/my latents'"


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def google(cloud):
    cloud.tool("gcloud", GCLOUD)
    return cloud


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resources.sh"])
def test_data_are_copied_on_every_host_between_the_installation_and_the_start(cloud, script):
    words = commands(cloud.run(script, *TPU, *DATA, "--dry_run", "--", *MAIN))
    ssh = [command for command in words if "ssh" in command]
    assert [command[-1] for command in ssh] == [
        f"--command={INSTALL}",
        f"--command={COPY}",
        f"--command=cd sit_jax && .venv/bin/python -m sit_jax.main {DATA_LINE}",
    ]
    assert all("--worker=all" in command for command in ssh)
    words = commands(cloud.run(script, *TPU, *DATA, "--scratch=/mnt", "--dry_run", "--", *MAIN))
    assert words[5][-1].endswith("/data.sh copy 'gs://bucket/my latents' '/mnt/bucket/my latents'")
    assert words[6][-1].endswith("'--config.data.path=/mnt/bucket/my latents'")


def test_a_bucket_can_be_mounted_instead(cloud):
    result = cloud.run(
        "tpu_vm.sh", *TPU, "--data=gs://b/train", "--mount", "--dry_run", "--", *MAIN
    )
    mount, train = [command[-1] for command in commands(result) if "ssh" in command][1:]
    line = "bash launch/data.sh mount --install gs://b/train '~/sit_mounts/b/train'"
    assert mount == f"--command=cd sit_jax && {line}"
    assert train.endswith("'--config.data.path=~/sit_mounts/b/train'")


def test_data_are_copied_again_after_a_preemption(google):
    google.answers(
        runs=["1 PREEMPTED step 4", "0 READY trained to step 9"],
        copies=["0 READY", "255 GONE", "0 READY"],
    )
    result = google.run("tpu_vm.sh", *TPU, *DATA, "--", *MAIN)
    assert result.returncode == 0, result.stderr
    verbs, lines = google.calls()
    assert verbs == [
        *("create", "scp", "on_tpu_vm", "data.sh", "sit_jax.main", "delete"),
        *("create", "scp", "on_tpu_vm", "data.sh"),  # lost while it copied
        *("create", "scp", "on_tpu_vm", "data.sh", "sit_jax.main"),
    ]
    assert {line for line, verb in zip(lines, verbs, strict=True) if verb == "data.sh"} == {
        f"gcloud compute tpus tpu-vm ssh sit --zone=us-west4-a --worker=all --command={COPY}"
    }


def test_data_that_cannot_be_copied_start_nothing_and_leave_the_tpu(google):
    google.answers(copies=["2 READY"])
    result = google.run("tpu_vm.sh", *TPU, *DATA, "--delete", "--", *MAIN)
    assert result.returncode == 2 and "failed with status 2 (the reason is above)" in result.stderr
    assert google.calls()[0] == ["create", "scp", "on_tpu_vm", "data.sh"]


def test_a_pod_copies_the_data_and_then_becomes_the_script_that_hears_sigterm(cloud):
    (words,) = commands(cloud.run("xpk.sh", *XPK, *DATA, "--dry_run", "--", *MAIN))
    copy = COPY.removeprefix("cd sit_jax && ")
    assert words[-1] == f"--command={copy} && exec bash launch/in_pod.sh {DATA_LINE}"


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("tpu_vm.sh", (*TPU, "--data", "/here"), "--data '/here' is not in a bucket, where the"),
        ("queued_resources.sh", (*TPU, "--data", "gs://b"), "--data 'gs://b' is not in a bucket"),
        ("xpk.sh", (*XPK, "--data", "here"), "--data 'here' is not in a bucket"),
        ("xpk.sh", (*XPK, "--data", "gs://b/c", "--mount"), "unknown option --mount"),
        ("tpu_vm.sh", (*TPU, "--mount"), "--mount and --scratch need --data"),
        ("xpk.sh", (*XPK, "--scratch=/x"), "--mount and --scratch need --data"),
        ("slurm.sh", ("--data", "/shared"), "needs a folder on the disk of each node; give --scra"),
    ],
)
def test_data_that_the_hosts_cannot_get_are_refused(cloud, script, options, expected):
    assert expected in refusal(cloud.run(script, *options, "--dry_run", "--", *MAIN))


@pytest.mark.parametrize("path", [("--config.data.path=/x",), ("--config.data.path", "/x")])
def test_data_and_a_path_are_not_both_taken(cloud, path):
    result = cloud.run("tpu_vm.sh", *TPU, *DATA, "--dry_run", "--", *MAIN, *path)
    assert refusal(result) == (
        "error: --data and --config.data.path are both given; give one of them"
    )


@pytest.fixture
def host(tmp_path):
    """A machine with .venv and a home folder, and stand-ins for the tools that mount a bucket."""
    machine = Machine(tmp_path)
    (machine.root / ".venv" / "bin").mkdir(parents=True)
    machine.stand_in(machine.root / ".venv" / "bin" / "python")
    machine.home = tmp_path / "home"
    log = f'#!{BASH}\nprintf "%s\\n" "${{0##*/}} $*" >>"$CALLS"\n'
    tools = {
        "findmnt": 'printf "%s" "${MOUNTED:-}"',
        "fusermount": "",
        "curl": "echo the key",
        "gcsfuse": 'mkdir -p "${@: -1}/images/train"',
        "sudo": 'if [ "$1" = tee ]; then cat >>"$CALLS"; fi',
    }
    for name, body in tools.items():
        (machine.bin / name).write_text(log + body)
        (machine.bin / name).chmod(0o755)
    machine.bring = lambda *words, **more: machine.run(
        "data.sh", *words, HOME=str(machine.home), **more
    )
    return machine


TRAIN = "gs://bucket/images/train"


def test_data_sh_explains_itself(host):
    result = host.bring("--help")
    assert result.returncode == 0 and result.stdout.startswith("usage: bash launch/data.sh copy")
    for words, expected in [
        ((), "expected copy or mount, not ''"),
        (("move", "a", "b"), "expected copy or mount, not 'move'"),
        (("copy", "a"), "expected SRC and DST"),
        (("mount", "/x", "/y"), "'/x' cannot be mounted; expected gs://BUCKET/FOLDER"),
        (("mount", TRAIN, "~/other/images/train"), "does not end in bucket/images/train"),
    ]:
        assert expected in refusal(host.bring(*words))


def test_a_copy_goes_to_the_home_folder_of_the_host(host):
    assert host.bring("copy", "gs://b/my latents/", "~/sit_data/b/my latents").returncode == 0
    assert host.bring("copy", "/shared/latents", "/scratch/latents").returncode == 0
    assert host.calls() == [
        f"unset: -m sit_jax.data.fetch gs://b/my latents {host.home}/sit_data/b/my latents",
        "unset: -m sit_jax.data.fetch /shared/latents /scratch/latents",
    ]


def test_a_failed_copy_is_an_error(host):
    assert host.bring("copy", "gs://b/c", "~/d", FAILS="sit_jax.data.fetch").returncode == 1


def test_a_bucket_is_mounted_read_only_once(host):
    place = f"{host.home}/sit_mounts/bucket"
    look = f"findmnt --noheadings --output SOURCE --mountpoint {place}"
    mount = f"gcsfuse --implicit-dirs -o ro bucket {place}"
    words = ("mount", "--install", TRAIN, "~/sit_mounts/bucket/images/train")
    result = host.bring(*words)
    assert result.returncode == 0 and "every read goes to the bucket" in result.stderr
    assert host.calls() == [look, mount]
    assert host.bring(*words, MOUNTED="bucket").returncode == 0
    assert host.calls() == [look]
    # The mount of a gcsfuse that died cannot be read.
    (host.home / "sit_mounts/bucket/images/train").rmdir()
    assert host.bring(*words, MOUNTED="bucket").returncode == 0
    assert host.calls() == [look, f"fusermount -u {place}", mount]
    assert f"{place} has /dev/sdb mounted" in refusal(host.bring(*words, MOUNTED="/dev/sdb"))
    missing = ("mount", "gs://bucket/images/val", "~/sit_mounts/bucket/images/val")
    assert "gs://bucket has no folder images/val" in refusal(host.bring(*missing))


def test_gcsfuse_is_installed_only_if_it_is_missing_and_wanted(host):
    gcsfuse = host.bin / "gcsfuse"
    text = gcsfuse.read_text()
    gcsfuse.unlink()
    words = (TRAIN, "~/sit_mounts/bucket/images/train")
    assert "gcsfuse is not installed; see https://" in refusal(host.bring("mount", *words))
    sudo = host.bin / "sudo"
    sudo.write_text(
        sudo.read_text() + f'\n[ "${{@: -1}}" != gcsfuse ] || {{ cat >"{gcsfuse}" <<"END"\n{text}\n'
        f'END\n{shutil.which("chmod")} 755 "{gcsfuse}"; }}\n'
    )
    assert not host.calls()
    result = host.bring("mount", "--install", *words)
    assert result.returncode == 0, result.stderr
    assert "installing gcsfuse from Google's apt repository" in result.stderr
    calls = "\n".join(host.calls())
    source = r"deb \[signed-by=\S+\] https://packages.cloud.google.com/apt gcsfuse-\w+ main\n"
    assert re.search(source, calls) and "the key" in calls
    assert re.search(r"install -y gcsfuse\n.*gcsfuse --implicit-dirs -o ro bucket", calls, re.S)
