"""launch/: the decisions of the scripts, with a stand-in for Python that installs nothing."""

import re
import shutil
import subprocess

import pytest

from tests.machine import BASH, ROOT, Machine, refusal


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


PYTEST = "cpu: -m pytest -n auto --maxprocesses 8 --dist loadfile -m not slow"
PIP = "unset: -m pip install --quiet --disable-pip-version-check -e "
LINTERS = ["ruff check .", "ruff format --check .", "mypy"]


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
def test_a_missing_python_is_reported_in_one_line(tmp_path, script):
    line = refusal(Machine(tmp_path, python=False).run(script))
    names = "python3.13 python3.12 python3.11 python3.14 python3"
    assert f"Python 3.11 or newer is needed, found none of: {names};" in line


def test_an_old_python_is_reported_with_its_version(machine):
    result = machine.run("test.sh", PREAMBLE="sys.version_info = (3, 9, 18)")
    assert "found python3, which is 3.9" in refusal(result)


def test_a_missing_venv_module_names_the_package(machine):
    preamble = "sys.modules['ensurepip'] = None; sys.version_info = (3, 12, 1)"
    line = refusal(machine.run("test.sh", PREAMBLE=preamble))
    assert "sudo apt install python3.12-venv" in line


def test_a_full_disk_is_reported_before_anything_is_installed(machine):
    preamble = "import shutil; shutil.disk_usage = lambda _: sys; sys.free = 2.9e9"
    line = refusal(machine.run("test.sh", PREAMBLE=preamble))
    assert "less than 3 GB are free" in line and not machine.calls()


def test_python_is_chosen_in_order_or_by_the_user(machine, tmp_path):
    broken = machine.bin / "python3.13"
    broken.write_text(f"#!{BASH}\necho 'pyenv: python3.13: command not found' >&2; exit 127\n")
    broken.chmod(0o755)
    machine.stand_in(machine.bin / "python3.12")
    machine.stand_in(machine.bin / "python3.14")
    assert "making .venv with python3.12\n" in machine.run("test.sh").stderr
    shutil.rmtree(machine.root / ".venv")
    chosen = tmp_path / "my python"
    machine.stand_in(chosen)
    assert f"making .venv with {chosen}\n" in machine.run("test.sh", PYTHON=str(chosen)).stderr
    shutil.rmtree(machine.root / ".venv")
    assert "found none of: /nowhere" in refusal(machine.run("test.sh", PYTHON="/nowhere"))


def test_packages_are_installed_once_and_again_when_something_changed(machine):
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", PYTEST]
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PYTEST]
    machine.run("test.sh", "--torch", "--tpu")
    assert machine.calls() == [PIP + ".[test,torch,tpu]", PYTEST]
    machine.run("test.sh")
    assert machine.calls() == [PYTEST]
    with open(machine.root / "requirements.txt", "a") as file:
        file.write("more\n")
    machine.run("test.sh")
    assert machine.calls() == [PIP + ".[test]", PYTEST]
    # An editable installation refers to its folder by an absolute path.
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    machine.run("test.sh")
    assert machine.calls() == [PIP + ".[test]", PYTEST]


def test_a_failed_installation_is_reported_and_repeated(machine):
    machine.run("test.sh")
    machine.calls()
    requirements = machine.root / "requirements.txt"
    before = requirements.read_text()
    requirements.write_text(before + "more\n")
    assert "check the network or proxy" in refusal(machine.run("test.sh", FAILS="pip"))
    # The failure left .venv in an unknown state, although the first checksum would match again.
    requirements.write_text(before)
    machine.calls()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", PYTEST]


def test_a_broken_venv_of_ours_is_made_again(machine):
    machine.run("test.sh")
    machine.calls()
    (machine.root / ".venv" / "bin" / "python").unlink()
    assert machine.run("test.sh").returncode == 0
    assert machine.calls() == [PIP + ".[test]", PYTEST]


def test_a_broken_venv_of_somebody_else_is_left_untouched(machine):
    theirs = machine.root / ".venv" / "precious"
    theirs.parent.mkdir()
    theirs.touch()
    line = refusal(machine.run("test.sh"))
    assert "was not made by these scripts; remove or rename it" in line
    assert theirs.exists()


def test_pytest_gets_its_arguments_and_its_status_is_returned(machine):
    arguments = ("-m", "slow", "--tpu", "tests/x.py")
    result = machine.run("test.sh", *arguments, FAILS="pytest", JAX_PLATFORMS="cuda")
    assert result.returncode == 1
    expected = PYTEST.replace("cpu:", "cuda:") + " -m slow tests/x.py"
    assert machine.calls()[-1] == expected


def test_lint_installs_and_runs_the_linters_and_no_tests(machine):
    linters = [f"unset: -m {linter}" for linter in LINTERS]
    assert machine.run("test.sh", "--lint").returncode == 0
    assert machine.calls() == [PIP + ".[test,lint]", *linters]
    # The tests need nothing more, and running them does not uninstall the linters.
    machine.run("test.sh")
    machine.run("test.sh", "--lint")
    assert machine.calls() == [PYTEST, *linters]


@pytest.mark.parametrize("linter", ["ruff", "mypy"])
def test_lint_fails_if_one_linter_does_and_runs_the_others_still(machine, linter):
    assert machine.run("test.sh", "--lint", FAILS=linter).returncode == 1
    assert machine.calls()[1:] == [f"unset: -m {linter}" for linter in LINTERS]


def test_lint_refuses_pytest_arguments(machine):
    line = refusal(machine.run("test.sh", "--lint", "tests/x.py"))
    assert "--lint runs no tests, so 'tests/x.py' would be ignored" in line
    assert not machine.calls()


def test_the_commit_hooks_run_the_same_linters():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    hooks = re.findall(r"entry: \.venv/bin/python -m ([a-z ]+[a-z])", text)
    assert hooks == ["ruff check", "ruff format", "mypy"]


def test_the_quickstart_trains_then_draws_in_the_folder_that_the_caller_named(machine, tmp_path):
    result = machine.run("quickstart.sh", "my run", cwd=tmp_path)
    workdir = tmp_path / "my run"
    assert result.returncode == 0 and f'--workdir "{workdir}"' in result.stdout
    assert machine.calls() == [
        PIP + ".",
        f"unset: -m sit_jax.main --config configs/digits.py --workdir {workdir}",
        f"unset: -m sit_jax.main --mode quality --workdir {workdir}"
        " --config.sample.count=200 --minimum 0.97,0.95",
    ]
    machine.run("quickstart.sh", "gs://bucket/run", cwd=tmp_path)
    assert machine.calls()[0].endswith("--workdir gs://bucket/run")


def test_the_quickstart_stops_when_training_fails(machine):
    assert machine.run("quickstart.sh", FAILS="sit_jax.main").returncode != 0
    expected = "unset: -m sit_jax.main --config configs/digits.py --workdir runs/digits"
    assert machine.calls()[-1] == expected


def test_the_quickstart_refuses_an_unknown_option(machine):
    result = machine.run("quickstart.sh", "--steps=3")
    assert result.returncode == 2 and "usage:" in result.stderr and not machine.calls()
