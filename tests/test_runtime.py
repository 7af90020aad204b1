"""How $XLA_FLAGS is completed, so that GPU kernels repeat their results."""

import os
import subprocess
import sys

import pytest

from sit_jax import runtime
from tests.commands import ROOT, refusal

OURS = "--xla_gpu_exclude_nondeterministic_ops=true"


def completed(monkeypatch, flags):
    """Return $XLA_FLAGS after the call, given its value before; None means unset."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    runtime.use_repeatable_kernels()
    return os.environ.get("XLA_FLAGS")


@pytest.mark.parametrize("flags", [None, "", "  "])
def test_repeatable_kernels_are_asked_for(monkeypatch, flags):
    assert completed(monkeypatch, flags) == OURS
    runtime.use_repeatable_kernels()
    assert os.environ["XLA_FLAGS"] == OURS  # not twice


def test_other_flags_stay(monkeypatch, tmp_path):
    other = "--xla_force_host_platform_device_count=3"
    assert completed(monkeypatch, other) == f"{other} {OURS}"
    file = tmp_path / "flags"
    file.write_text(other + "\n")
    assert completed(monkeypatch, str(file)) == f"{other} {OURS}"


@pytest.mark.parametrize("flag", ["exclude_nondeterministic_ops", "deterministic_ops"])
@pytest.mark.parametrize("value", ["=false", "=true", ""])
def test_a_choice_of_the_users_stays(monkeypatch, tmp_path, flag, value):
    chosen = f"--xla_gpu_{flag}{value}"
    assert completed(monkeypatch, chosen) == chosen
    file = tmp_path / "flags"
    file.write_text(chosen)
    assert completed(monkeypatch, str(file)) == str(file)


def test_a_missing_file_of_flags_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "xla_gpu_autotune_level=0")  # without its dashes
    message = refusal("--config", "configs/digits.py", "--workdir", tmp_path / "w")
    assert "XLA_FLAGS=xla_gpu_autotune_level=0 cannot be read as a file of flags (No such file" in (
        message
    )
    assert "flags that start with --" in message


def test_the_flag_is_known_to_this_xla_and_read_after_jax_is_imported():
    """An XLA that did not know it would end the process."""
    program = (
        "import jax; from sit_jax import runtime; runtime.use_repeatable_kernels(); "
        "import os; os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=3'; "
        "print(len(jax.devices()))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
