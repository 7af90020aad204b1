"""The products of a training step as XLA compiles them for an NVIDIA GPU (none is needed)."""

import os
import subprocess
import sys

import pytest

from sit_jax.jobs.preflight import topology
from tests.commands import ROOT

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
pytestmark = pytest.mark.skipif(not topology.has_cuda(), reason="the CUDA wheels are not installed")


def compiled(**settings):
    """Return the compiled text of the training step of a small network."""
    settings = {
        "model.depth": 2, "model.width": 64, "model.heads": 1, "data.image_size": 8,
        "mesh.fsdp": 1, **settings,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_A_GPU, *(f"{k}={v}" for k, v in settings.items())],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("unroll", "times"), [("none", 2), ("1", 1)])
def test_cublas_applies_gelu_in_the_training_step(unroll, times):
    """Once for each layer, or in the body of a loop over layers; it also gives the product."""
    text = compiled(**{"model.unroll": unroll, "train.batch": 8})
    assert text.count('"epilogue":"BIAS_GELU_AUX"') == times
    assert " tanh(" not in text


def test_tf32_products_take_both_operands_with_the_contracted_axis_contiguous():
    """In the layers, those of the forward pass and the gradients of inputs."""
    text = compiled(**{"precision.compute": "float32", "train.batch": 128})  # 16 tokens: 2048 rows
    products = [
        line for line in text.splitlines()
        if "__cublas" in line and "/blocks/" in line and "(f32[2048," in line
    ]  # fmt: skip
    assert len(products) >= 2 * (4 + 4)  # XLA may merge those of q, k and v
    for line in products:
        assert '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]' in line
