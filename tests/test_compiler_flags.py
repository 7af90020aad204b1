"""launch/compiler_flags: each file is understood by the compiler that it is for."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def flags_of(chip):
    result = subprocess.run(
        [
            shutil.which("bash"),
            "-c",
            '. launch/cluster.sh; read_flags "$1"',
            "-",
            f"launch/compiler_flags/{chip}.flags",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


TINY_PROGRAM = """
import jax, sys
from jax.experimental import topologies
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_of_the_chip_knows_its_flags(topology):
    pytest.importorskip("libtpu", reason="libtpu is not installed: launch/test.sh --tpu")
    flags = flags_of(topology.partition(":")[0])
    for arguments, works in ((flags, True), (flags + " --xla_no_such_flag=1", False)):
        environment = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "LIBTPU_INIT_ARGS": arguments,
        }
        result = subprocess.run(
            [sys.executable, "-c", TINY_PROGRAM, topology],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (result.returncode == 0) == works, result.stderr


def test_the_gpu_flags_are_known_to_xla():
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags_of("h100"),
    }  # XLA's CPU client reads and refuses them too
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
