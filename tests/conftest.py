"""Fixtures shared by several test files."""

import os
import pathlib
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sit_jax import report
from tests.commands import TINY, succeed

if os.environ.get("JAX_PLATFORMS", "cpu") != "cpu":
    # The tests compare float32 figures. GPUs and TPUs round the operands of products by default.
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def quiet_machine(tmp_path_factory):
    """Use a compilation cache of the test module's own, and silence the accelerator warning."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def configure(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # otherwise jax reads these settings only once

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])
        patch.setattr(report, "unused_accelerator_warning", lambda: None)
        configure(settings)
        yield
        configure(before)


@pytest.fixture(scope="module")
def trained(quiet_machine, tmp_path_factory):
    """Return the workdir of a finished run of 4 steps, which no test may change, and its stdout."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, succeed(*TINY, "--workdir", workdir)


@pytest.fixture
def run_copy(trained, tmp_path):
    """Return a copy of the trained run that a test may change."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))
