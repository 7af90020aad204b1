"""preflight: what it refuses, what it tries, and, with the TPU compiler, what it finds. No accelerator anywhere."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sit_jax import config as config_lib
from sit_jax import main
from sit_jax.errors import UserError
from sit_jax.jobs.preflight import job as preflight
from sit_jax.jobs.setup import set_up

SMALL = {
    "model.depth": "4", "model.width": "256", "model.heads": "4", "data.image_size": "16", "data.channels": "4",
    "train.batch": "32", "sample.batch": "32", "precision.compute": "bfloat16", "mesh.data": "1", "mesh.fsdp": "-1",
}  # fmt: skip
DIGITS = ["--config", "configs/digits.py"]
has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not has_libtpu, reason="libtpu is not installed (launch/test.sh --tpu)"
)


def refusal(capsys, *flags):
    assert main.main([*flags]) == 2
    return capsys.readouterr().err


def test_flags_that_do_not_belong_together(capsys, tmp_path):
    assert "needs --topology; known: v4:" in refusal(capsys, *DIGITS, "--mode", "preflight")
    assert "needs --config" in refusal(capsys, "--mode", "preflight", "--topology", "v5e:2x2")
    other = [*DIGITS, "--workdir", str(tmp_path / "run")]
    assert "--search is for --mode preflight, not train" in refusal(capsys, *other, "--search")
    assert "required: --workdir" in refusal(capsys, *DIGITS)


@pytest.mark.parametrize(
    "name", ["v5x:4x4", "v5e", "v5e:", "v5e:4by4", "h100:2x2", "h100:0", "v4i:2x2", "cpu"]
)
def test_an_unknown_topology_lists_the_known(name):
    with pytest.raises(
        UserError, match=r"unknown --topology '.*'; known: v4:.*, v5e:1x1 2x2 .*, h100:1 2 4 8$"
    ):
        preflight.open_topology(name)


@pytest.mark.parametrize(
    ("topology", "install"), [("v5e:2x2", r'-e ".\[tpu\]"'), ("h100:8", r'-e ".\[cuda12\]"')]
)
def test_a_missing_compiler_is_named_with_what_to_install(topology, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=install):
        preflight.open_topology(topology)


def test_bytes_of_one_device():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = {"a": jax.ShapeDtypeStruct((6, 2), np.float32, sharding=sharding), "b": jax.ShapeDtypeStruct((), np.int32,
            sharding=NamedSharding(mesh, PartitionSpec()))}  # fmt: skip
    assert preflight.bytes_per_device(tree) == 6 * 2 * 4 + 4


def test_candidates_cover_batches_meshes_and_policies():
    found = preflight.candidates(config_lib.load("configs/digits.py"), 16)
    assert {c.train.batch for c in found} == {64, 128, 256}
    assert {c.model.remat for c in found} == {"none", "dots", "full"}
    meshes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in found}
    assert meshes == {(1, 16, 1), (4, 4, 1), (16, 1, 1), (1, 8, 2), (2, 4, 2), (8, 1, 2)}


def report(batch=128, remat="full", fits=False, mesh=(1, 1, 1), images=0.0):
    mesh = dict(zip(("data", "fsdp", "tensor"), mesh))
    verdict = "" if fits else "RESOURCE_EXHAUSTED: Ran out of memory"
    return preflight.Preflight(
        "train step",
        "v5e:1x1",
        1,
        mesh,
        batch,
        remat,
        fits,
        verdict,
        16e9,
        0,
        0,
        0.0,
        images_per_second_bound=images,
    )


def test_the_search_leaves_out_what_cannot_fit_or_cannot_win():
    chip = next(chip for chip in preflight.CHIPS if chip.name == "v5e")
    setup = set_up(
        config_lib.load("configs/digits.py", [("model.remat", "dots")]), jax.devices()[:1]
    )
    assert not preflight._needs_more(setup, chip, [])
    assert preflight._needs_more(setup, chip, [report(batch=64, remat="full")])
    assert not preflight._needs_more(
        setup, chip, [report(batch=64, remat="none"), report(batch=256)]
    )
    most = chip.peak_flops / setup.train_flops
    assert preflight._cannot_win(setup, chip, [report(fits=True, images=0.995 * most)])
    assert not preflight._cannot_win(setup, chip, [report(fits=True, images=0.98 * most)])


def test_what_does_not_compile_is_not_called_too_large(monkeypatch, capsys):
    """A search goes on to the larger ones, and the advice is not to save memory."""
    broken = dataclasses.replace(
        report(batch=64), verdict="INTERNAL: Mosaic failed to compile TPU kernel"
    )
    chip = next(chip for chip in preflight.CHIPS if chip.name == "v5e")
    assert not preflight._needs_more(
        set_up(config_lib.load("configs/digits.py"), jax.devices()[:1]), chip, [broken]
    )
    monkeypatch.setattr(preflight, "open_topology", lambda name: (chip, jax.devices()[:1]))
    monkeypatch.setattr(preflight, "examine", lambda *_: broken)
    with pytest.raises(
        UserError,
        match="train step does not compile on v5e:1x1; the compiler fails, and not for mem",
    ):
        preflight.run(config_lib.load("configs/digits.py"), "v5e:1x1")
    assert "does not compile: INTERNAL: Mosaic" in capsys.readouterr().out


def run(*flags, **small):
    """Preflight as a user runs it: (exit status, what it printed, the figures)."""
    command = [sys.executable, "-m", "sit_jax.main", *DIGITS, "--mode", "preflight", *flags]
    command += [f"--config.{key}={value}" for key, value in (SMALL | small).items()]
    ours = (
        "JAX_PLATFORMS",
        "XLA_FLAGS",
        "JAX_DISABLE_MOST_OPTIMIZATIONS",
    )  # what launch/test.sh set for the CPU
    env = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env | {"PYTHONPATH": "."}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices"), [("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:2x4", 8)]
)
def test_the_train_step_compiles_for_the_chip(topology, devices, tmp_path):
    status, printed = run("--topology", topology, "--json", str(tmp_path / "found.json"))
    assert status == 0, printed
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (
        found["fits"]
        and found["devices"] == devices
        and found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    )
    assert found["params"] * 3 == pytest.approx(found["optimizer"], rel=1e-3)
    held = found["params"] + found["optimizer"]
    assert (
        held < found["memory"]["arguments"] < 1.3 * held
    )  # and the batch, and what tiles of 8 x 128 pad
    assert (
        0.99 < found["executed_flops"] / found["model_flops"] < 1.05
    )  # dots: nothing of weight is computed twice
    assert "all-to-all" not in found["collectives"]
    layers = found["collectives"]["all-gather"]["in_loop"]
    weights = 2 * 7 / 8 * 4 * 18 * 256**2  # bfloat16, from 7 others, 4 layers of 18 d^2
    assert 1.5 * weights < layers < 3 * weights  # forward, and once more backward
    assert f"train step on {topology}" in printed and "bound by" in printed


@pytest.mark.tpu
@needs_libtpu
def test_devices_add_up_gradients_in_the_type_that_is_asked_for(tmp_path):
    sums = {}
    for dtype in ("float32", "bfloat16"):
        small = {"precision.grad_reduce": dtype}
        status, printed = run("--topology", "v5e:2x4", "--json", str(tmp_path / dtype), **small)
        assert status == 0, printed
        collectives = json.loads((tmp_path / dtype).read_text())[0]["collectives"]
        sums[dtype] = sum(
            moved["in_loop"] for kind, moved in collectives.items() if kind != "all-gather"
        )
    assert sums["float32"] / sums["bfloat16"] == pytest.approx(2, rel=0.01)


@pytest.mark.tpu
@needs_libtpu
def test_what_does_not_fit_is_said_in_the_compilers_words(tmp_path):
    big = {"model.depth": "64", "model.width": "4096", "model.heads": "32", "model.remat": "none"}
    status, printed = run("--topology", "v5e:1x1", "--json", str(tmp_path / "found.json"), **big)
    assert status == 2
    assert "does not fit: RESOURCE_EXHAUSTED" in printed and "of HBM" not in printed.splitlines()[0]
    assert printed.splitlines()[-1].startswith(
        "error: the train step does not fit on v5e:1x1; raise mesh.fsdp"
    )
    assert not json.loads((tmp_path / "found.json").read_text())[0]["fits"]


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("solver", [{}, {"sample.solver": "dopri5", "sample.steps": "none"}])
def test_the_sampler_too(solver):
    status, printed = run("--topology", "v5e:2x2", "--sampler", **{"model.depth": "1", **solver})
    assert status == 0, printed
    assert "sampler on v5e:2x2, 4 devices" in printed


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("small", "message"),
    [
        ({"mesh.fsdp": "3"}, "does not use 4 devices; their product must be 4, with each of them one of 1, 2, 4"),
        ({"train.batch": "30"}, "is not divisible by the 4 devices it is split over; make it a multiple of 4"),
        ({"mesh.fsdp": "1", "mesh.tensor": "4", "model.heads": "2"}, "tensor = 4 does not divide the model's 2 heads"),
        ({"mesh.fsdp": "4", "model.width": "250", "model.heads": "2"}, "width 250 is not divisible by 4"),
    ],
)  # fmt: skip
def test_a_config_that_the_topology_cannot_hold(small, message):
    status, printed = run("--topology", "v5e:2x2", **small)
    assert status == 2 and message in printed and len(printed.splitlines()) == 1


@pytest.mark.tpu
@needs_libtpu
def test_a_layout_that_libtpu_does_not_know():
    status, printed = run("--topology", "v5e:3x3")
    assert (
        status == 2
        and "not divisible" in printed
        and "known: v4:" in printed
        and len(printed.splitlines()) == 1
    )


@pytest.mark.skipif(
    not preflight._has_cuda(),
    reason='the CUDA wheels are not installed (pip install -e ".[cuda12]")',
)
def test_the_train_step_compiles_for_gpus(tmp_path):
    status, printed = run("--topology", "h100:8", "--json", str(tmp_path / "found.json"))
    assert status == 0, printed
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"] and found["devices"] == 8
    assert (
        0.97 < found["executed_flops"] / found["model_flops"] < 1.05
    )  # cuDNN's attention is counted too
    assert "reduce-scatter" in found["collectives"]
