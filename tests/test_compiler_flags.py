"""launch/compiler_flags: each compiler accepts the flags of its chip."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def flags_of(chip):
    """Return the flags of a chip's file as the launch scripts read them."""
    script = '. launch/cluster.sh; read_flags "$1"'
    result = subprocess.run(
        [shutil.which("bash"), "-c", script, "-", f"launch/compiler_flags/{chip}.flags"],
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
sharding = jax.sharding.SingleDeviceSharding(devices[0])
x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=sharding)
jax.jit(lambda x: x @ x).lower(x).compile()
"""


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_compiler_of_the_chip_accepts_its_flags(topology):
    pytest.importorskip("libtpu", reason="libtpu is not installed: launch/test.sh --tpu")
    flags = flags_of(topology.partition(":")[0])
    for arguments, accepted in ((flags, True), (flags + " --xla_no_such_flag=1", False)):
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
        assert (result.returncode == 0) == accepted, result.stderr


def test_xla_accepts_the_gpu_flags():
    # XLA's CPU client parses them too, and rejects unknown ones.
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_of("h100")}
    result = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
