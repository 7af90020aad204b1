"""launch/slurm.sh: training in SLURM jobs, with stand-ins for SLURM's tools."""

import functools
import sys

import pytest

from tests.caches import make_plan, write
from tests.cloud import MAIN, STOPPED, Cloud, commands, refusal
from tests.machine import BASH, ROOT

SRUN = f"""#!{BASH}
printf 'srun %s\\n' "$*" >>"$CLOUD/calls"
printf '%s\\n' "XLA_FLAGS=${{XLA_FLAGS:-}}" "$SAYS"
exit "${{STATUS:-0}}"
"""
# The environment of a job on 2 nodes with 4 GPUs each, and the last line that training prints.
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_NTASKS": "8",
    "SLURM_CPUS_PER_TASK": "12",
    "SAYS": "trained to step 9",
}


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def slurm(cloud):
    cloud.tool("srun", SRUN)
    cloud.tool("squeue", f"#!{BASH}\necho ${{STATE:-RUNNING}}\n")
    cloud.tool("scontrol", f'#!{BASH}\necho "scontrol $*" >>"$CLOUD/calls"\n')
    cloud.run = functools.partial(cloud.run, "slurm.sh", cwd=cloud.folder)
    cloud.submit = lambda *arguments, **changes: cloud.run(*arguments, **(JOB | changes))
    cloud.lines = lambda: (cloud.folder / "calls").read_text().splitlines()
    return cloud


def test_a_dry_run_prints_the_real_command(cloud):
    words = [
        "srun",
        "--kill-on-bad-exit=1",
        "--cpus-per-task=8",
        ".venv/bin/python",
        "-m",
        "sit_jax.main",
    ]
    result = cloud.run("slurm.sh", "--dry_run", "--", *MAIN, "it's")
    assert commands(result) == [[*words, *MAIN, "it's"]]
    flags = "--flags=launch/compiler_flags/h100.flags"
    result = cloud.run("slurm.sh", "--dry_run", flags, "--", *MAIN)
    assert commands(result)[0] == [
        "export",
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true",
    ]


def test_one_process_per_gpu_is_started(slurm):
    flags = "--flags=launch/compiler_flags/h100.flags"
    result = slurm.submit(flags, "--", *MAIN, XLA_FLAGS="--mine=1")
    assert result.returncode == 0
    assert "XLA_FLAGS=--mine=1 --xla_gpu_enable_latency_hiding_scheduler=true\n" in result.stdout
    expected = "srun --kill-on-bad-exit=1 --cpus-per-task=12 .venv/bin/python -m sit_jax.main "
    assert slurm.lines() == [expected + " ".join(MAIN)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"SLURM_NTASKS": "2"}, "2 tasks for 8 GPUs (2 nodes of 4)"),
        ({"SLURM_NTASKS": ""}, "add --ntasks-per-node=4 to sbatch"),
        ({"SLURM_NTASKS": "16"}, "16 tasks for 8 GPUs"),
        ({"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs; add --gpus-per-node=N"),
        ({"SLURM_JOB_ID": ""}, "not in a SLURM job; submit it with: sbatch launch/slurm.sh"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the root of this repository; run sbatch from there"),
    ],
)
def test_a_job_of_the_wrong_shape_is_refused_in_one_line(slurm, changes, expected):
    assert expected in refusal(slurm.submit("--", *MAIN, **changes))


def test_the_job_is_queued_again_when_training_stopped_early(slurm):
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
def test_a_job_that_ended_otherwise_is_not_queued_again(slurm, changes, status):
    assert slurm.submit("--", *MAIN, **changes).returncode == status
    assert len(slurm.lines()) == 1


def test_the_sbatch_lines_ask_for_one_task_per_gpu_and_an_early_signal():
    lines = (ROOT / "launch" / "slurm.sh").read_text().splitlines()
    sbatch = [line for line in lines if line.startswith("#SBATCH")]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in sbatch)
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120" and "requeue" in options
    # sbatch ignores the lines after the first command.
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


COPY_ONCE = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=12 "


def test_data_are_copied_once_on_each_node_before_the_start(slurm):
    result = slurm.submit("--data", "/shared/my latents/", "--", *MAIN, SLURM_TMPDIR="/local/7")
    assert result.returncode == 0, result.stderr
    copy, run = slurm.lines()
    target = "/local/7/shared/my latents"
    assert copy == f"{COPY_ONCE}bash launch/data.sh copy /shared/my latents {target}"
    assert run.endswith(f"-m sit_jax.main {' '.join(MAIN)} --config.data.path={target}")
    result = slurm.submit("--data=gs://b/c", "--scratch=/nvme", "--", *MAIN, SLURM_TMPDIR="/local")
    assert slurm.lines()[2] == f"{COPY_ONCE}bash launch/data.sh copy gs://b/c /nvme/b/c"
    assert result.returncode == 0 and len(slurm.lines()) == 4


def test_nothing_starts_if_the_data_cannot_be_copied(slurm):
    assert slurm.submit("--data=/x", "--scratch=/y", "--", *MAIN, STATUS="2").returncode == 2
    assert len(slurm.lines()) == 1


def test_a_job_that_cannot_start_runs_nothing(slurm):
    result = slurm.submit("--data=/x", "--scratch=/y", "--", *MAIN, REFUSES="'/x' holds no stored")
    assert refusal(result) == "error: '/x' holds no stored"
    assert not (slurm.folder / "calls").exists()
    expected = "-m sit_jax.check_command --devices 8 --manifest /x --brings_data -- "
    assert slurm.checks()[0] == f"{expected}{' '.join(MAIN)} --config.data.path=/y/x"
    assert slurm.submit("--no_check", "--", *MAIN, PYTHON="/nowhere").returncode == 0


def test_a_dry_run_checks_for_a_number_of_gpus(cloud):
    assert cloud.run("slurm.sh", "--dry_run", "--", *MAIN).returncode == 0
    assert cloud.run("slurm.sh", "--dry_run", "--gpus=32", "--", *MAIN).returncode == 0
    counts = [line.split()[3] for line in cloud.checks()]
    assert counts == ["8", "32"]


def test_gpus_are_not_given_in_a_job(slurm):
    assert "--gpus is for --dry_run outside of a job" in refusal(
        slurm.submit("--gpus=4", "--", *MAIN)
    )


def test_the_real_check_reads_the_cache_on_shared_storage(cloud, tmp_path):
    write(tmp_path / "cache", make_plan())
    words = ("slurm.sh", "--dry_run", f"--data={tmp_path}/cache", "--scratch=/local", "--")
    main = ("--config=configs/latents.py", f"--workdir={tmp_path}/run")
    line = refusal(cloud.run(*words, *main, PYTHON=sys.executable))
    assert "data.image_size=32, but the latents in" in line and "are 4x4" in line
