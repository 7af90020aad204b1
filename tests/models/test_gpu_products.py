"""The products of a training step and a sampler as XLA compiles them for a GPU (none is needed)."""

import pytest

from sit_jax.jobs.preflight import hlo, products, topology
from tests.processes import run_python

COMPILE_FOR_A_GPU = """
import sys
from sit_jax import config
from sit_jax.jobs.preflight import report, topology
from sit_jax.jobs.setup import set_up
topology.leave_devices_alone()
_, devices = topology.open_topology("h100:1")
settings = [flag.split("=") for flag in sys.argv[2:]]
program = getattr(report, sys.argv[1])(set_up(config.load("configs/latents.py", settings), devices))
print(program.function.lower(*program.arguments).compile().as_text())
"""
pytestmark = pytest.mark.skipif(not topology.has_cuda(), reason="the CUDA wheels are not installed")


def compiled(program, **settings):
    """Return the compiled text of a program of a small network."""
    settings = {
        "model.depth": 2, "model.width": 64, "model.heads": 1, "data.image_size": 8,
        "mesh.fsdp": 1, **settings,
    }  # fmt: skip
    flags = (f"{key}={value}" for key, value in settings.items())
    return run_python("-c", COMPILE_FOR_A_GPU, program, *flags, devices=1)


@pytest.mark.parametrize("remat", ["dots", "operands"])
@pytest.mark.parametrize(("unroll", "times"), [("none", 2), ("1", 1)])
def test_cublas_applies_gelu_in_the_training_step(unroll, times, remat):
    """Once for each layer, or in the body of a loop over layers; it also gives the product."""
    settings = {"model.unroll": unroll, "model.remat": remat, "train.batch": 8}
    text = compiled("_train_step", **settings)
    assert text.count('"epilogue":"BIAS_GELU_AUX"') == times
    assert " tanh(" not in text


def test_tf32_products_of_a_sampler_take_the_contracted_axis_contiguous():
    """Those of the layers. Without a transposition of W they would not."""
    settings = {"precision.compute": "float32", "sample.batch": 64, "sample.cfg_scale": 2}
    program = hlo.Program(compiled("_sampler", **settings))  # 2 x 64 images of 16 tokens
    found = [
        e for e in program.executions
        if products.call_target(e.instruction).startswith("__cublas")
        and "/blocks/" in e.instruction.text
        and e.instruction.arrays[0].shape[0] == 2048
    ]  # fmt: skip
    assert len(found) >= 4  # XLA may merge those of q, k and v
    for e in found:
        assert products.reads_along_contraction(e.instruction, program.operands(e))
