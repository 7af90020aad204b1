"""What tests of several files stand on."""

import pathlib
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sit_jax import report
from tests.commands import TINY, succeed


@pytest.fixture(scope="module")
def quiet_machine(tmp_path_factory):
    """Compile each program once for all tests of a file, outside the user's cache.

    The warning of an unused accelerator is silenced.
    """
    settings = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
                "jax_persistent_cache_min_compile_time_secs": 0.1}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", settings["jax_compilation_cache_dir"])
        patch.setattr(report, "unused_accelerator_warning", lambda: None)
        for values in (settings, before):
            for name, value in values.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # jax looks at these settings once
            if values is settings:
                yield


@pytest.fixture(scope="module")
def trained(quiet_machine, tmp_path_factory):
    """A workdir with a finished run of 4 steps, not to be written, and what the run printed."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, succeed(*TINY, "--workdir", workdir)


@pytest.fixture
def run_copy(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))
