"""launch/xpk.sh and launch/in_pod.sh: training in the pods of a GKE cluster."""

import os
import shutil
import signal
import subprocess

import pytest

from tests.cloud import MAIN, MAIN_LINE, STOPPED, XPK, Cloud, commands
from tests.machine import BASH, ROOT


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_an_xpk_dry_run_prints_the_real_command(cloud):
    options = ("--zone", "z", "--restarts", "5", "--dry_run")
    (words,) = commands(cloud.run("xpk.sh", *XPK, *options, "--", *MAIN))
    assert words == [
        "xpk",
        "workload",
        "create",
        "--cluster=c",
        "--workload=sit",
        "--tpu-type=v5litepod-16",
        "--num-slices=1",
        "--docker-image=gcr.io/p/sit",
        "--max-restarts=5",
        "--termination-grace-period-seconds=120",
        "--zone=z",
        f"--command=exec bash launch/in_pod.sh {MAIN_LINE}",
    ]


@pytest.mark.parametrize(("stops", "status"), [(True, 42), (False, 0)])
def test_a_pod_that_is_deleted_does_not_count_as_finished(cloud, stops, status):
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
            output, _ = process.communicate(timeout=20)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == status and output == (STOPPED + "\n" if stops else "")


def test_a_pod_returns_the_status_of_an_error(cloud):
    cloud.tool("python", f"#!{BASH}\nexit 2\n")
    assert cloud.run("in_pod.sh", *MAIN).returncode == 2
