"""launch/slurm.sh: training in SLURM jobs, with stand-ins for SLURM's tools."""

import functools

import pytest

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
