"""preflight: its refusals, its search, and with a chip's compiler, its figures. Needs no chip."""

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
from sit_jax.jobs.preflight import job, report, search, topology
from sit_jax.jobs.preflight.chips import CHIPS
from sit_jax.jobs.preflight.estimate import Estimate, KernelTime, KindTime
from sit_jax.jobs.setup import set_up

SMALL = {
    "model.depth": "4", "model.width": "256", "model.heads": "4",
    "data.image_size": "16", "data.channels": "4", "train.batch": "32", "sample.batch": "32",
    "precision.compute": "bfloat16", "mesh.data": "1", "mesh.fsdp": "-1",
}  # fmt: skip
DIGITS = ["--config", "configs/digits.py"]
V5E, H200 = (next(chip for chip in CHIPS if chip.name == name) for name in ("v5e", "h200"))
has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
    not has_libtpu, reason="libtpu is not installed (launch/test.sh --tpu)"
)


def refusal(capsys, *flags):
    assert main.main([*flags]) == 2
    return capsys.readouterr().err


def test_flags_that_are_missing_or_of_another_mode_are_refused(capsys, tmp_path):
    assert "needs --topology; known: v4:" in refusal(capsys, *DIGITS, "--mode", "preflight")
    assert "needs --config" in refusal(capsys, "--mode", "preflight", "--topology", "v5e:2x2")
    train = [*DIGITS, "--workdir", str(tmp_path / "run")]
    assert "--search is for --mode preflight, not train" in refusal(capsys, *train, "--search")
    assert "required: --workdir" in refusal(capsys, *DIGITS)


@pytest.mark.parametrize(
    "name", ["v5x:4x4", "v5e", "v5e:", "v5e:4by4", "h100:2x2", "h100:0", "v4i:2x2", "a100:1", "cpu"]
)
def test_the_error_for_an_unknown_topology_lists_the_known_ones(name):
    known = "v4:.*, v5e:1x1 2x2 .*, h100:1 2 4 8, .*b200:1 2 4 8$"
    with pytest.raises(UserError, match=rf"unknown --topology '.*'; known: {known}"):
        topology.open_topology(name)


@pytest.mark.parametrize(
    ("name", "install"),
    [("v5e:2x2", r'-e ".\[tpu\]"'), ("h100:8", r'-e ".\[cuda13\]" or ".\[cuda12\]"')],
)
def test_a_missing_compiler_is_named_with_the_command_that_installs_it(name, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=install):
        topology.open_topology(name)


@pytest.mark.parametrize(
    ("plugin", "found"), [("xla_cuda12", True), ("xla_cuda13", True), ("xla_rocm7", False)]
)
def test_either_cuda_plugin_compiles_for_gpus(plugin, found, monkeypatch):
    installed = ("jax_plugins", f"jax_plugins.{plugin}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    assert topology.has_cuda() == found


def test_kernels_are_listed_of_one_configuration_on_a_measured_chip(capsys, monkeypatch):
    flags = [*DIGITS, "--mode", "preflight", "--topology", "v5e:1x1", "--kernels"]
    assert "--kernels lists the kernels of one configuration" in refusal(capsys, *flags, "--search")
    monkeypatch.setattr(job, "open_topology", lambda name: (V5E, jax.devices()[:1]))
    with pytest.raises(
        UserError, match="how fast kernels are on v5e has not been measured; known: h100, h200$"
    ):
        job.preflight(config_lib.load("configs/digits.py"), "v5e:1x1", kernels=True)


def test_an_adaptive_sampler_is_refused_for_a_gpu_that_is_absent(monkeypatch):
    monkeypatch.setattr(job, "open_topology", lambda name: (H200, jax.devices()[:1]))
    config = config_lib.load(
        "configs/digits.py", [("sample.solver", "dopri5"), ("sample.steps", "none")]
    )
    with pytest.raises(UserError, match="does not compile for a GPU that is absent .*sample.steps"):
        job.preflight(config, "h200:1", sampler=True)


def test_bytes_per_device_counts_the_shards():
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    replicated = NamedSharding(mesh, PartitionSpec())
    tree = {
        "a": jax.ShapeDtypeStruct((6, 2), np.float32, sharding=split),
        "b": jax.ShapeDtypeStruct((), np.int32, sharding=replicated),
    }
    assert report.bytes_per_device(tree) == 6 * 2 * 4 + 4


def test_candidates_cover_batches_meshes_and_policies():
    candidates = search.candidates(config_lib.load("configs/digits.py"), 16)
    assert {c.train.batch for c in candidates} == {64, 128, 256}
    assert {c.model.remat for c in candidates} == {"none", "dots", "operands", "full"}
    meshes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in candidates}
    assert meshes == {(1, 16, 1), (4, 4, 1), (16, 1, 1), (1, 8, 2), (2, 4, 2), (8, 1, 2)}


@pytest.mark.parametrize("count", [1, 3])
def test_an_odd_number_of_devices_is_not_split_in_two(count):
    for candidate in search.candidates(config_lib.load("configs/digits.py"), count):
        mesh = candidate.mesh
        assert (mesh.data * mesh.fsdp, mesh.tensor) == (count, 1)


def tried(batch=128, remat="full", fits=False, images_per_second=0.0):
    """Return the report of a candidate that the search has compiled."""
    return report.Preflight(
        program="train step",
        topology="v5e:1x1",
        devices=1,
        mesh={"data": 1, "fsdp": 1, "tensor": 1},
        batch=batch,
        remat=remat,
        fits=fits,
        verdict="" if fits else "RESOURCE_EXHAUSTED: Ran out of memory",
        hbm=16e9,
        params=0,
        optimizer=0,
        compile_seconds=0.0,
        memory={"peak": 0} if fits else {},
        roofline={"compute": 0.0},
        model_flops=10**12,
        mfu_bound=0.5,
        images_per_second_bound=images_per_second,
    )


def with_estimate(candidate, images_per_second):
    """Return a candidate's report as it is on a chip with measured rates."""
    seconds = candidate.batch / images_per_second
    kinds = {"products": KindTime(0.75 * seconds, 400), "copies": KindTime(0.25 * seconds, 100)}
    largest = [
        KernelTime("dot.1", "products", seconds / 2, 28, 10**6, 10**9, "jit(f)/while/body/mlp")
    ]
    return dataclasses.replace(
        candidate,
        estimate=Estimate(seconds, kinds, largest, "measured on a card"),
        mfu_estimate=0.25,
        images_per_second_estimate=images_per_second,
    )


def search_among(reports, chip, monkeypatch):
    """Run a search in which these are the reports of the candidates."""
    monkeypatch.setattr(job, "open_topology", lambda name: (chip, jax.devices()[:1]))
    monkeypatch.setattr(job, "find_fastest", lambda *_: iter(reports))
    job.preflight(config_lib.load("configs/digits.py"), f"{chip.name}:1", search=True)


def test_the_search_ranks_by_the_estimate_where_there_is_one(monkeypatch, capsys):
    fast_by_bound = tried(batch=64, fits=True, images_per_second=900.0)
    fast = tried(batch=128, fits=True, images_per_second=800.0)
    search_among([fast_by_bound, fast], V5E, monkeypatch)
    printed = capsys.readouterr().out
    assert "the fastest that fits, by the bound: the kernels' speed was not measured" in printed
    assert "none: how fast kernels are on" in printed
    assert "--config.train.batch=64 " in printed
    both = [with_estimate(fast_by_bound, 400.0), with_estimate(fast, 500.0)]
    search_among(both, H200, monkeypatch)
    printed = capsys.readouterr().out
    assert "the fastest that fits, by the estimate" in printed
    assert "256.0 ms, 500 images/s, MFU 25.0%; kernels' rates: measured on a card" in printed
    assert "    products             192.0 ms  75.0%  400 kernels" in printed
    assert "--config.train.batch=128 " in printed
    assert "estimated 500 images/s, MFU 25.0%" in search._line(both[1])
    assert "at most 800 images/s, MFU 50.0%" in search._line(fast)


def test_the_table_of_kernels_has_a_line_for_each(monkeypatch):
    estimated = with_estimate(tried(), 500.0).estimate
    _, line = report.kernel_table(estimated).splitlines()
    words = "128.00 ms 28 x 4.571 ms 1.0 MB products dot.1 jit(f)/mlp"
    assert " ".join(line.split()) == words


def test_the_search_skips_candidates_that_cannot_fit_or_cannot_win():
    config = config_lib.load("configs/digits.py", [("model.remat", "dots")])
    devices = jax.devices()[:1]
    setup = set_up(config, devices)
    assert not search._needs_more(setup, V5E, [])
    assert search._needs_more(setup, V5E, [tried(batch=64, remat="full")])
    assert not search._needs_more(setup, V5E, [tried(batch=64, remat="none"), tried(batch=256)])
    assert not search._needs_more(setup, V5E, [tried(batch=64, remat="operands")])
    without_remat = set_up(config_lib.load("configs/digits.py", [("model.remat", "none")]), devices)
    assert search._needs_more(without_remat, V5E, [tried(batch=64, remat="dots")])
    assert not search._needs_more(without_remat, V5E, [tried(batch=64, remat="operands")])
    peak = V5E.peak_flops / setup.train_flops
    assert search._cannot_win(setup, V5E, [tried(fits=True, images_per_second=0.995 * peak)])
    assert not search._cannot_win(setup, V5E, [tried(fits=True, images_per_second=0.98 * peak)])


def test_a_compiler_that_fails_is_not_taken_for_a_lack_of_memory(monkeypatch, capsys):
    """A search still tries larger candidates, and the remedy does not speak of memory."""
    broken = dataclasses.replace(
        tried(batch=64), verdict="INTERNAL: Mosaic failed to compile TPU kernel"
    )
    devices = jax.devices()[:1]
    setup = set_up(config_lib.load("configs/digits.py"), devices)
    assert not search._needs_more(setup, V5E, [broken])
    monkeypatch.setattr(job, "open_topology", lambda name: (V5E, devices))
    monkeypatch.setattr(job, "examine", lambda *_: broken)
    with pytest.raises(
        UserError,
        match="train step does not compile on v5e:1x1; the compiler fails, and not for lack of mem",
    ):
        job.preflight(config_lib.load("configs/digits.py"), "v5e:1x1")
    assert "does not compile: INTERNAL: Mosaic" in capsys.readouterr().out


def run(*flags, **small):
    """Run preflight of a small model as a user does: (exit status, output)."""
    return run_command(*DIGITS, *flags, **(SMALL | small))


def run_command(*flags, **settings):
    """Run preflight as a user does: (exit status, output)."""
    command = [sys.executable, "-m", "sit_jax.main", "--mode", "preflight", *flags]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    # Without the variables that launch/test.sh sets for the CPU.
    of_tests = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {key: value for key, value in os.environ.items() if key not in of_tests}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=env | {"PYTHONPATH": "."}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(("name", "devices"), [("v5e:2x4", 8), ("v5p:2x2x2", 8), ("v6e:2x4", 8)])
def test_the_train_step_compiles_for_the_chip(name, devices, tmp_path):
    status, printed = run("--topology", name, "--json", str(tmp_path / "reports.json"))
    assert status == 0, printed
    (figures,) = json.loads((tmp_path / "reports.json").read_text())
    assert figures["fits"] and figures["devices"] == devices
    assert figures["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert figures["params"] * 3 == pytest.approx(figures["optimizer"], rel=1e-3)
    state = figures["params"] + figures["optimizer"]
    # Arguments are the state, the batch, and the padding to tiles of 8 x 128.
    assert state < figures["memory"]["arguments"] < 1.3 * state
    # remat=dots: nothing that counts is computed twice.
    assert 0.99 < figures["executed_flops"] / figures["model_flops"] < 1.05
    assert "all-to-all" not in figures["collectives"]
    layers = figures["collectives"]["all-gather"]["in_loop"]
    weights = 2 * 7 / 8 * 4 * 18 * 256**2  # bfloat16, from 7 others, 4 layers of 18 d^2
    assert 1.5 * weights < layers < 3 * weights  # forward, and again backward
    assert f"train step on {name}" in printed and "bound by" in printed


@pytest.mark.tpu
@needs_libtpu
def test_devices_add_up_gradients_in_the_configured_dtype(tmp_path):
    sums = {}
    for dtype in ("float32", "bfloat16"):
        small = {"precision.grad_reduce": dtype}
        status, printed = run("--topology", "v5e:2x4", "--json", str(tmp_path / dtype), **small)
        assert status == 0, printed
        collectives = json.loads((tmp_path / dtype).read_text())[0]["collectives"]
        sums[dtype] = sum(
            sent["in_loop"] for kind, sent in collectives.items() if kind != "all-gather"
        )
    assert sums["float32"] / sums["bfloat16"] == pytest.approx(2, rel=0.01)


@pytest.mark.tpu
@needs_libtpu
def test_a_program_that_does_not_fit_is_reported_in_the_compilers_words(tmp_path):
    big = {"model.depth": "64", "model.width": "4096", "model.heads": "32", "model.remat": "none"}
    status, printed = run("--topology", "v5e:1x1", "--json", str(tmp_path / "reports.json"), **big)
    assert status == 2
    assert "does not fit: RESOURCE_EXHAUSTED" in printed and "of HBM" not in printed.splitlines()[0]
    assert printed.splitlines()[-1].startswith(
        "error: the train step does not fit on v5e:1x1; raise mesh.fsdp"
    )
    assert not json.loads((tmp_path / "reports.json").read_text())[0]["fits"]


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("solver", [{}, {"sample.solver": "dopri5", "sample.steps": "none"}])
def test_the_sampler_compiles_too(solver):
    status, printed = run("--topology", "v5e:2x2", "--sampler", **{"model.depth": "1", **solver})
    assert status == 0, printed
    assert "sampler on v5e:2x2, 4 devices" in printed


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("small", "message"),
    [
        (
            {"mesh.fsdp": "3"},
            "does not use 4 devices; their product must be 4, so each of them is one of 1, 2, 4",
        ),
        (
            {"train.batch": "30"},
            "is not divisible by the 4 devices it is split over; make it a multiple of 4",
        ),
        (
            {"mesh.fsdp": "1", "mesh.tensor": "4", "model.heads": "2"},
            "tensor = 4 does not divide the model's 2 heads",
        ),
        (
            {"mesh.fsdp": "4", "model.width": "250", "model.heads": "2"},
            "width 250 is not divisible by 4",
        ),
    ],
)
def test_a_config_that_does_not_divide_over_the_topology_is_refused(small, message):
    status, printed = run("--topology", "v5e:2x2", **small)
    assert status == 2 and message in printed and len(printed.splitlines()) == 1


@pytest.mark.tpu
@needs_libtpu
def test_a_layout_that_libtpu_does_not_know_is_refused():
    status, printed = run("--topology", "v5e:3x3")
    assert status == 2 and len(printed.splitlines()) == 1
    assert "libtpu does not know --topology v5e:3x3" in printed
    assert "not divisible" in printed and "known: v4:" in printed


needs_cuda = pytest.mark.skipif(
    not topology.has_cuda(),
    reason='the CUDA wheels are not installed (pip install -e ".[cuda13]")',
)


@needs_cuda
@pytest.mark.parametrize("name", ["h100:8", "h200:1", "a100-80gb:2", "b200:8"])
def test_the_train_step_compiles_for_gpus(name, tmp_path):
    status, printed = run("--topology", name, "--json", str(tmp_path / "reports.json"))
    assert status == 0, printed
    (figures,) = json.loads((tmp_path / "reports.json").read_text())
    devices = int(name.partition(":")[2])
    assert figures["fits"] and figures["devices"] == devices
    # Includes cuDNN's attention.
    assert 0.97 < figures["executed_flops"] / figures["model_flops"] < 1.05
    assert ("reduce-scatter" in figures["collectives"]) == (devices > 1)
    assert (figures["estimate"] is not None) == name.startswith("h")


@needs_cuda
def test_the_sampler_compiles_for_gpus():
    status, printed = run("--topology", "h200:1", "--sampler", "--kernels", **{"model.depth": "1"})
    assert status == 0, printed
    assert "sampler on h200:1, 1 device\n" in printed and "the longest kernels" in printed


@needs_cuda
def test_unrolled_layers_on_a_gpu_attend_once_and_keep_no_stacks(tmp_path):
    """A loop over layers copies what it keeps into stacked buffers, after filling them."""

    def kinds(unroll):
        reports = tmp_path / f"{unroll}.json"
        flags = ("--config", "configs/latents.py", "--topology", "h200:1", "--json", str(reports))
        settings = {"model.depth": "4", "train.batch": "64", "model.unroll": unroll}
        status, printed = run_command(*flags, **settings)
        assert status == 0, printed
        return json.loads(reports.read_text())[0]["estimate"]["kinds"]

    def moved(found):
        return found["copies"]["seconds"] + found["fills"]["seconds"]

    scanned, unrolled = kinds("1"), kinds("none")
    # Each layer's attention runs forward and backward: once, as its statistics are kept.
    assert scanned["attention"]["count"] == unrolled["attention"]["count"] == 8
    assert moved(unrolled) < 0.5 * moved(scanned)
