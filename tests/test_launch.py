"""launch/: the scripts' decisions, on a machine that holds only a stand-in for Python; nothing is installed."""

import shutil
import subprocess

import pytest

from tests.machine import BASH, ROOT, Machine, refusal


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


SHARED = " -n auto --maxprocesses 8 --dist loadfile -m not slow"
PIP = "unset: -m pip install --quiet --disable-pip-version-check -e "


@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_bash_can_parse(script):
    assert subprocess.run([BASH, "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("script", ["test.sh", "quickstart.sh", "sample_pretrained.sh"])
def test_help_explains_and_does_nothing(machine, script):
    result = machine.run(script, "--help", cwd=machine.root / "launch")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: bash launch/{script}")
    assert not machine.calls() and not (machine.root / ".venv").exists()


@pytest.mark.parametrize("script", ["test.sh", "quickstart.sh", "sample_pretrained.sh"])
def test_no_python_is_said_plainly(tmp_path, script):
    line = refusal(Machine(tmp_path, python=False).run(script))
    assert (
        "Python 3.11 or newer is needed, found none of: python3.13 python3.12 python3.11 python3"
        in line
    )


def test_an_old_python_is_said_plainly(machine):
    assert "found python3, which is 3.9" in refusal(
        machine.run("test.sh", PREAMBLE="sys.version_info = (3, 9, 18)")
    )


def test_a_missing_venv_module_names_the_package(machine):
    line = refusal(
        machine.run(
            "test.sh", PREAMBLE="sys.modules['ensurepip'] = None; sys.version_info = (3, 12, 1)"
        )
    )
    assert "sudo apt install python3.12-venv" in line


def test_a_full_disk_is_said_plainly(machine):
    line = refusal(
        machine.run(
            "test.sh", PREAMBLE="import shutil; shutil.disk_usage = lambda _: sys; sys.free = 2.9e9"
        )
    )
    assert "less than 3 GB are free" in line and not machine.calls()


def test_python_is_chosen_in_order_and_by_hand(machine, tmp_path):
    (machine.bin / "python3.13").write_text(
        f"#!{BASH}\necho 'pyenv: python3.13: command not found' >&2; exit 127\n"
    )
    (machine.bin / "python3.13").chmod(0o755)
    machine.stand_in(machine.bin / "python3.12")
    assert "making .venv with python3.12\n" in machine.run("test.sh").stderr
    shutil.rmtree(machine.root / ".venv")
    mine = tmp_path / "my python"
    machine.stand_in(mine)
    assert f"making .venv with {mine}\n" in machine.run("test.sh", PYTHON=str(mine)).stderr
    shutil.rmtree(machine.root / ".venv")
    assert "found none of: /nowhere" in refusal(machine.run("test.sh", PYTHON="/nowhere"))


def test_packages_are_installed_once_and_again_when_something_changed(machine):
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", "cpu: -m pytest" + SHARED]
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == ["cpu: -m pytest" + SHARED]
    machine.run("test.sh", "--torch", "--tpu")
    assert machine.calls() == [PIP + ".[test,torch,tpu]", "cpu: -m pytest" + SHARED]
    machine.run("test.sh")
    assert machine.calls() == ["cpu: -m pytest" + SHARED]
    with open(machine.root / "requirements.txt", "a") as file:
        file.write("more\n")
    machine.run("test.sh")
    assert machine.calls() == [PIP + ".[test]", "cpu: -m pytest" + SHARED]
    # The editable installation knows its folder by an absolute path.
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    machine.run("test.sh")
    assert machine.calls() == [PIP + ".[test]", "cpu: -m pytest" + SHARED]


def test_an_installation_that_failed_is_said_plainly_and_redone(machine):
    machine.run("test.sh")
    machine.calls()
    requirements = machine.root / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text(before + "more\n")
    assert "check the network or proxy" in refusal(machine.run("test.sh", FAILS="pip"))
    requirements.write_text(
        before
    )  # what is in .venv now nobody knows, although the stamp of old would match
    machine.calls()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", "cpu: -m pytest" + SHARED]


def test_a_broken_venv_of_ours_is_made_anew(machine):
    machine.run("test.sh")
    machine.calls()
    (machine.root / ".venv" / "bin" / "python").unlink()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", "cpu: -m pytest" + SHARED]


def test_a_broken_venv_of_somebody_else_is_left_alone(machine):
    theirs = machine.root / ".venv" / "precious"
    theirs.parent.mkdir()
    theirs.touch()
    assert "was not made here; remove or rename it" in refusal(machine.run("test.sh"))
    assert theirs.exists()


def test_pytest_gets_its_arguments_and_its_status_is_kept(machine):
    result = machine.run(
        "test.sh", "-m", "slow", "--tpu", "tests/x.py", FAILS="pytest", JAX_PLATFORMS="cuda"
    )
    assert result.returncode == 1
    assert machine.calls()[-1] == "cuda: -m pytest" + SHARED + " -m slow tests/x.py"


def test_the_quickstart_trains_then_draws_where_the_caller_said(machine, tmp_path):
    result = machine.run("quickstart.sh", "my run", cwd=tmp_path)
    workdir = tmp_path / "my run"
    assert result.returncode == 0 and f'--workdir "{workdir}"' in result.stdout
    assert machine.calls() == [
        PIP + ".",
        f"unset: -m sit_jax.main --config configs/digits.py --workdir {workdir}",
        f"unset: tests/benchmarks/digits_quality.py --workdir {workdir}",
    ]
    machine.run("quickstart.sh", "gs://bucket/run", cwd=tmp_path)
    assert machine.calls()[0].endswith("--workdir gs://bucket/run")


def test_the_quickstart_stops_when_training_fails(machine):
    assert machine.run("quickstart.sh", FAILS="sit_jax.main").returncode != 0
    assert machine.calls()[-1].endswith("--workdir runs/digits")


def test_the_quickstart_refuses_an_option_it_does_not_know(machine):
    result = machine.run("quickstart.sh", "--steps=3")
    assert result.returncode == 2 and "usage:" in result.stderr and not machine.calls()
