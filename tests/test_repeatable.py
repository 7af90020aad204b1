"""The training step has no kernel that is known not to repeat its results on a GPU.

tests/benchmarks/repeat.py trains twice on a GPU and compares.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from sit_jax import config as config_lib
from sit_jax.jobs.preflight import report, topology
from sit_jax.jobs.setup import set_up
from tests.commands import ROOT
from tests.unrepeatable import unrepeatable

SMALL = {
    "model.depth": "2", "model.width": "64", "model.heads": "1", "train.batch": "8",
    "data.image_size": "8", "mesh.fsdp": "1",
}  # fmt: skip
SCATTER = "%s = f32[9,4]{1,0} scatter(%table, %rows, %g), indices_are_sorted=true, "
BACKWARD = '%b = (bf16[8,4]) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", '


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (SCATTER + "to_apply=%add", ["scatter"]),
        (SCATTER + "unique_indices=false, to_apply=%add", ["scatter"]),
        (SCATTER + "unique_indices=true, to_apply=%add", []),
        (SCATTER.replace("scatter", "reduce-scatter"), []),
        ("%s = f32[8]{0} select-and-scatter(%x, %y, %z), select=%ge", ["select-and-scatter"]),
        (BACKWARD + '{"force_deterministic":false}', ["cuDNN's gradient of attention"]),
        (BACKWARD + '{"force_deterministic": true}', []),
        (BACKWARD.replace("Backward", "") + '{"force_deterministic":false}', []),
        ("\tatom.relaxed.sys.global.cas.b32 \t%r1, [%rd4], %r2, %r3;", ["atomics"]),
        ("\t@%p1 red.global.add.f32 \t[%rd4], %f2;", ["atomics"]),
        ("\tredux.sync.add.s32 \t%r1, %r2, -1;\n\tadd.f32 %f1, %f2, %f3;", []),
    ],
)
def test_the_list_knows_each_kernel_from_its_neighbours(text, names):
    assert unrepeatable("ENTRY %main\n" + text + "\n") == names


def test_the_gradient_of_a_plain_lookup_is_on_the_list():
    gradient = jax.grad(lambda table, rows: jnp.take(table, rows, axis=0).sum())
    lowered = jax.jit(gradient).lower(jnp.zeros((5, 3)), jnp.zeros(4, int))
    assert unrepeatable(lowered.as_text(dialect="hlo")) == ["scatter"]
    assert unrepeatable(lowered.compile().as_text()) == ["scatter"]


@pytest.mark.parametrize("accumulation", ["1", "2"])
@pytest.mark.parametrize("name", ["digits", "latents"])  # float32, and bfloat16 with dropped labels
def test_the_training_step_has_no_kernel_of_the_list(name, accumulation):
    small = SMALL | {"train.accumulation": accumulation}
    config = config_lib.load(f"configs/{name}.py", [*small.items()])
    program = report._train_step(set_up(config, jax.devices()[:1]))
    lowered = program.function.lower(*program.arguments)
    assert unrepeatable(lowered.as_text(dialect="hlo")) == []
    if accumulation == "2":
        assert unrepeatable(lowered.compile().as_text()) == []


COMPILE_FOR_A_GPU = """
import sys
from sit_jax import config
from sit_jax.jobs.preflight import report, topology
from sit_jax.jobs.setup import set_up
topology.leave_devices_alone()
_, devices = topology.open_topology("h100:1")
settings = [flag.split("=") for flag in sys.argv[1:]]
program = report._train_step(set_up(config.load("configs/latents.py", settings), devices))
print(program.function.lower(*program.arguments).compile().as_text())
"""


@pytest.mark.skipif(not topology.has_cuda(), reason="the CUDA wheels are not installed")
def test_the_training_step_for_a_gpu_has_no_atomics(tmp_path):
    dump = tmp_path / "dump"
    settings = [f"{k}={v}" for k, v in (SMALL | {"precision.deterministic": "true"}).items()]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_A_GPU, *settings],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_dump_to={dump}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "fmhaSoftmaxBackward" in done.stdout and unrepeatable(done.stdout) == []
    kernels = [path for path in pathlib.Path(dump).glob("*.ptx") if "train_step" in path.name]
    assert kernels
    assert {path.name: unrepeatable(path.read_text()) for path in kernels} == {
        path.name: [] for path in kernels
    }
