"""report: the devices in one line, and a warning if jax does not use the accelerator."""

import collections

import jax
import pytest

from sit_jax import report

_Device = collections.namedtuple("_Device", "device_kind")


def test_the_devices_of_a_pod_are_counted_by_kind(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [_Device("TPU v5 lite")] * 8)
    assert report.devices_line() == "devices: 8 x TPU v5 lite"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert report.devices_line() == "devices: 8 x TPU v5 lite, 2 processes"


def test_a_cpu_is_named(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    cpus = [f"processor\t: {number}\nmodel name\t: AMD EPYC: 7B13\n" for number in range(2)]
    info.write_text("".join(cpus))
    monkeypatch.setattr(report, "_CPU_INFO", str(info))
    monkeypatch.setattr(jax, "devices", lambda: [_Device("cpu")])
    assert report.devices_line() == "devices: 1 x cpu (AMD EPYC: 7B13)"
    monkeypatch.setattr(report, "_CPU_INFO", str(tmp_path / "not Linux"))
    assert report.devices_line().startswith("devices: 1 x cpu (")


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """A machine without an accelerator, on which jax uses the CPU: the folder of device files."""
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(report, "_NVIDIA_DEVICE", str(tmp_path / "nvidia0"))
    monkeypatch.setattr(report, "_TPU_DEVICES", (str(tmp_path / "accel0"), str(tmp_path / "vfio0")))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    yield tmp_path
    jax.config.update("jax_platforms", platforms)


def test_without_an_accelerator_there_is_no_warning(bare_machine):
    assert report.unused_accelerator_warning() is None


@pytest.mark.parametrize(
    "file, extra", [("nvidia0", "cuda13"), ("accel0", "tpu"), ("vfio0", "tpu")]
)
def test_an_unused_accelerator_is_named_with_what_to_install(bare_machine, file, extra):
    (bare_machine / file).touch()
    warning = report.unused_accelerator_warning()
    assert f'pip install -e ".[{extra}]"' in warning and "\n" not in warning


@pytest.mark.parametrize(
    "script, warns", [("echo 'GPU 0: H200'", True), ("echo 'No devices'; exit 6", False)]
)
def test_nvidia_smi_counts_only_if_it_lists_a_gpu(bare_machine, script, warns):
    tool = bare_machine / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    assert (report.unused_accelerator_warning() is not None) == warns


def test_no_warning_when_the_accelerator_is_used_or_the_cpu_was_asked_for(
    bare_machine, monkeypatch
):
    (bare_machine / "nvidia0").touch()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        assert report.unused_accelerator_warning() is None
    jax.config.update("jax_platforms", "cpu")
    assert report.unused_accelerator_warning() is None
