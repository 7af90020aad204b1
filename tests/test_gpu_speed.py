"""The parts of tests/benchmarks/gpu_speed.py that need neither a GPU nor PyTorch."""

import argparse
import contextlib
import io
import json
import sys
import time

import pytest

from tests.benchmarks import gpu_kernels, gpu_report, gpu_speed
from tests.benchmarks.gpu_sides import Child, ChildEnded, Task


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x160_64x5_1x1_h_bz_TNT", "products"),
        ("gemm_fusion_dot_general_37", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_nn_align4>", "products"),
        ("void splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("void cudnn::fusion::compute_dot_do_o<true>(void const*)", "attention"),
        ("fmha_cutlassF_f32_aligned_64x128_rf_sm80", "attention"),
        ("loop_convert_fusion_12", "elementwise"),
        ("input_add_multiply_reduce_fusion", "elementwise"),
        ("loop_add_dynamic_slice_fusion", "elementwise"),
        ("fusion_152", "elementwise"),
        ("triton_red_fused__to_copy_add_native_layer_norm_3", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDA>", "elementwise"),
        ("loop_slice_fusion_1", "copies"),
        ("input_concatenate_fusion", "copies"),
        ("loop_dynamic_update_slice_fusion_7", "copies"),
        ("memcpy128", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused__to_copy_0", "copies"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("loop_broadcast_fusion_13", "fills"),
        ("Memset (Device)", "fills"),
        ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>", "fills"),
    ],
)
def test_kernels_are_sorted_by_name(name, kind):
    assert gpu_kernels.kind_of(name) == kind


def test_busy_counts_overlaps_once_and_gaps_not():
    kernels = [("c", 30.0, 40.0), ("a", 0.0, 10.0), ("b", 5.0, 15.0), ("in b", 6.0, 7.0)]
    assert gpu_kernels.busy(kernels) == 25.0


def test_summary_is_per_step():
    kernels = [
        ("nvjet_1", 0, 4e6),
        ("fusion_2", 5e6, 6e6),
        ("nvjet_1", 10e6, 14e6),
        ("fusion_2", 15e6, 16e6),
    ]
    summary = gpu_kernels.summary(kernels, units=2)
    largest = summary.pop("largest")
    assert summary == {
        "total": 8.0,
        "idle": 3.0,
        "products": 4.0,
        "attention": 0.0,
        "elementwise": 1.0,
        "copies": 0.0,
        "fills": 0.0,
    }
    assert [(one["name"], one["ms"], one["runs"]) for one in largest] == [
        ("nvjet_1", 4.0, 1.0),
        ("fusion_2", 1.0, 1.0),
    ]


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(ValueError, match="no kernel"):
        gpu_kernels.summary([], 1)


def _row(side, form, batch, ms, part="training"):
    return Task(side, part, form, batch, "SiT-XL/2")._asdict() | {
        "ms": ms,
        "visits_s": [],
        "compile_s": 10.0,
        "peak_gib": 5.0,
    }


def _results(*rows):
    card = {"device": "a card", "memory_gib": 80.0, "jax": "1", "torch": "2", "python": "3"}
    return {"model": "SiT-XL/2", "card": card, "rows": list(rows), "notes": ["something"]}


def test_ratios_are_of_images_a_second_in_pairs():
    ours = _row("ours", "bfloat16", 256, [400.0, 500.0, 400.0])
    theirs = _row("torch.compile", "bfloat16", 128, [300.0, 200.0])
    # 640 and 512 images a second against 426.7 and 640.
    assert gpu_report.ratios(theirs, ours) == pytest.approx([1.5, 0.8])


def test_a_rival_has_the_same_format_before_the_same_batch():
    rows = [
        _row("ours", "bfloat16", 64, [1.0], "sampling"),
        _row("ours", "TF32", 64, [2.0], "sampling"),
        _row("ours", "TF32", 8, [3.0], "sampling"),
    ]
    eager = _row("torch eager", "TF32", 8, [1.0], "sampling")
    assert gpu_report.rival(eager, rows) is rows[2]
    trained = [_row("ours", "bfloat16", batch, [1.0]) for batch in (64, 256, 128)]
    assert gpu_report.rival(_row("torch eager", "TF32", 128, [1.0]), trained) is trained[2]
    assert gpu_report.rival(_row("torch eager", "TF32", 32, [1.0]), trained) is trained[1]
    assert gpu_report.rival(eager, trained) is None


def test_the_report_has_rates_ratios_and_notes():
    ours = _row("ours", "bfloat16", 128, [250.0, 250.0])
    theirs = _row("torch.compile", "bfloat16", 128, [200.0, 250.0])
    failed = _row("torch eager", "TF32", 128, [])
    ours["profile"] = {"total": 250.0, "idle": 1.5} | dict.fromkeys(gpu_kernels.KINDS, 2.0)
    text = gpu_report.report(_results(ours, theirs, failed))
    # 512 images a second, each 3 x 2 x 118.6e9 operations.
    assert "| ours bfloat16 | 128 | 250.00 (250.00..250.00) | 512.0 | 364." in text
    assert "| 0.90 (0.85..0.95) |" in text
    assert "| ours training bfloat16 @128 | 250.00 | 2.00 |" in text
    assert "- something\n" in text
    assert "torch eager" not in text


def _run(tmp_path, **options):
    defaults = {"budget": 100, "out": tmp_path, "model": "SiT-XL/2", "batches": [64, 128, 256]}
    defaults |= {"format": "bfloat16", "remat": "dots"}
    return gpu_speed.Run(argparse.Namespace(**defaults | options), str(tmp_path), io.StringIO())


def test_a_batch_that_cannot_fit_is_not_tried(tmp_path):
    run = _run(tmp_path)
    run.results["card"] = {"memory_gib": 79.0, "device": "", "jax": "", "torch": "", "python": ""}
    assert gpu_speed.possible_batches(run, "torch.compile") == [128, 64]
    assert gpu_speed.possible_batches(run, "torch eager") == [64]
    assert run.results["notes"][0] == (
        "torch.compile training batch 256: not tried, as it needs about 97 GiB"
    )


def test_only_our_training_takes_the_remat_policy(tmp_path, monkeypatch):
    run = _run(tmp_path, remat="operands")
    run.results["card"] = {"memory_gib": None}
    monkeypatch.setattr(gpu_speed, "visit", lambda *_: "ok")
    ours, theirs = gpu_speed.largest(run, ["ours", "torch.compile"], "bfloat16", 1, False)
    assert str(ours) == "ours training bfloat16 batch 256 remat operands"
    assert str(theirs) == "torch.compile training bfloat16 batch 256"
    row = ours._asdict() | {"ms": [1.0], "visits_s": [], "compile_s": 1.0, "peak_gib": 1.0}
    assert "| ours bfloat16, remat operands | 256 |" in gpu_report.report(_results(row))


def test_the_next_smaller_batch_is_taken(tmp_path, monkeypatch):
    run = _run(tmp_path, model="SiT-S/2")
    run.results["card"] = {"memory_gib": 9.0, "device": "", "jax": "", "torch": "", "python": ""}
    tried = []

    def visit(run, task, repeats, profile):
        tried.append((task.side, task.batch))
        return "memory" if task.batch == 256 and task.side == "torch.compile" else "ok"

    monkeypatch.setattr(gpu_speed, "visit", visit)
    tasks = gpu_speed.largest(run, ["ours", "torch.compile"], "bfloat16", 1, False)
    assert [(task.side, task.batch) for task in tasks] == [("ours", 128), ("torch.compile", 128)]
    assert tried[:2] == [("ours", 256), ("torch.compile", 256)]
    assert "does not fit; the next smaller batch is taken" in run.results["notes"][0]


class _FakeChild:
    """Answers as a child does, at once."""

    asked: list = []

    def __init__(self, tasks, fails=lambda do, task: None):
        self._tasks, self._fails = [Task(*task) for task in tasks], fails

    def answer(self):
        return self._answer("prepare", self._tasks.pop(0))

    def ask(self, do, task):
        return self._answer(do, task)

    def _answer(self, do, task):
        self.asked.append((do, task.side, task.format, task.batch))
        if error := self._fails(do, task):
            if isinstance(error, Exception):
                raise error
            return {"error": error, "memory": error == "out of memory"}
        if do == "profile":
            return {"total": 1.0, "idle": 0.5, "largest": []} | dict.fromkeys(gpu_kernels.KINDS, 0)
        return {"ms": 2.0} if do == "time" else {"make_s": 1.0, "compile_s": 3.0, "peak_gib": 4.0}


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """A function that gives a run whose children fail as asked, and what they are asked."""

    def make(fails=lambda do, task: None):
        run = _run(tmp_path, model="SiT-S/2", budget=1000)
        run.results["card"] = _results()["card"]
        monkeypatch.setattr(_FakeChild, "asked", [])
        monkeypatch.setattr(
            run,
            "child",
            lambda arguments, alone: contextlib.nullcontext(
                _FakeChild(json.loads(arguments[0]), fails)
            ),
        )
        return run

    return make


def _times(run):
    return {
        (row["side"], row["format"], row["batch"]): len(row["ms"])
        for row in run.results["rows"]
        if row["ms"]
    }


def test_training_takes_turns(faked):
    run = faked()
    gpu_speed.training(run, repeats=3, rounds=2, profile=True)
    assert [ask[1] for ask in _FakeChild.asked if ask[0] == "prepare"] == [
        *("ours", "torch.compile", "torch eager", "torch.compile", "ours")
    ]
    assert _times(run) == {
        ("ours", "bfloat16", 256): 6,
        ("torch.compile", "bfloat16", 256): 6,
        ("torch eager", "TF32", 256): 3,
    }
    assert all("profile" in row for row in run.results["rows"])


def test_training_in_tf32_is_compared_with_eager_pytorch(faked):
    run = faked()
    run.options.format = "TF32"
    gpu_speed.training(run, repeats=1, rounds=2, profile=False)
    assert _times(run) == {("ours", "TF32", 256): 2, ("torch eager", "TF32", 256): 2}


def test_training_goes_on_after_a_side_failed(faked):
    run = faked(
        lambda do, task: ChildEnded("ended with code 1") if task.side == "torch.compile" else None
    )
    gpu_speed.training(run, repeats=1, rounds=2, profile=False)
    assert _times(run) == {("ours", "bfloat16", 256): 2, ("torch eager", "TF32", 256): 1}
    assert run.results["notes"] == ["torch.compile training bfloat16 batch 256: ended with code 1"]


def test_sampling_takes_turns(faked):
    run = faked()
    gpu_speed.sampling(run, repeats=2, profile=True)
    times = _times(run)
    assert len(times) == 8 and set(times.values()) == {2}
    turns = [ask[1:] for ask in _FakeChild.asked if ask[0] == "time"]
    assert turns[:8] == [
        (side, form, batch)
        for form, theirs in (("TF32", "torch eager"), ("bfloat16", "torch.compile"))
        for batch in (8, 64)
        for side in ("ours", theirs)
    ]
    assert all("profile" in row for row in run.results["rows"])


def test_sampling_goes_on_without_what_fails(faked):
    def fails(do, task):
        if do == "prepare" and (task.side, task.batch) == ("ours", 64):
            return "out of memory"
        if do == "time" and task.side == "torch.compile":
            return ChildEnded("ended with code -9")
        return None

    run = faked(fails)
    gpu_speed.sampling(run, repeats=2, profile=False)
    # The child that ended held the eager ones too, which had their first turn before.
    assert _times(run) == {
        ("ours", "TF32", 8): 2,
        ("ours", "bfloat16", 8): 2,
        ("torch eager", "TF32", 8): 1,
        ("torch eager", "TF32", 64): 1,
    }


def test_what_takes_longer_than_the_rest_of_the_budget_is_left_out(tmp_path):
    run = _run(tmp_path)
    assert run.enough(90, "this")
    assert not run.enough(110, "that")
    assert run.results["notes"][0].startswith("that: left out, as it takes about 110 s and")
    assert (tmp_path / "gpu_speed.json").exists()


def test_a_child_that_hangs_is_stopped(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with open(tmp_path / "log", "w") as log:
        start = time.monotonic()
        child = Child([], {}, log, seconds=0)
        with pytest.raises(ChildEnded, match="its time was up"):
            child.answer()
        child.end()
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "SiT-XXL/2"], "unknown model 'SiT-XXL/2'"),
        ([], "PyTorch is not installed"),
    ],
)
def test_bad_input_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_speed.py", "--out", str(tmp_path), *arguments])
    monkeypatch.setattr(gpu_speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        gpu_speed.main()
    assert str(raised.value).startswith("error: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
