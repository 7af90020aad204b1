"""estimate: the time of hand-written programs, as XLA writes them for a GPU, from given rates."""

import dataclasses

import pytest

from sit_jax.jobs.preflight import estimate as estimate_lib
from sit_jax.jobs.preflight import hlo, kernels
from sit_jax.jobs.preflight.chips import CHIPS, Attainable
from sit_jax.jobs.preflight.estimate import estimate

# Round rates, so that a test's arithmetic shows: a TFLOP takes 1 s, 2 s or 4 s, a GB 1 s.
RATES = Attainable(
    flops={
        "bfloat16": 1e12,
        "bfloat16 to float32": 0.8e12,
        "tf32": 0.5e12,
        "tf32 transposed": 0.4e12,
        "float32": 0.25e12,
        "attention forward": 0.1e12,
        "attention backward": 0.2e12,
    },
    bandwidth={"elementwise": 1e9, "sums": 0.5e9, "copies": 0.25e9},
    elements={"operations": 3e8, "rows": 2e8, "fills": 1e7},
    launch=1e-6,
    iteration=1e-5,
    source="made up",
)
CHIP = dataclasses.replace(CHIPS[0], link_bandwidth=1e9, attainable=RATES)

# Fused computations, which the programs below call.
FUSIONS = """\
%dot_computation (p0: bf16[1024,512], p1: bf16[512,256]) -> bf16[1024,256] {
  %p0 = bf16[1024,512]{1,0} parameter(0)
  %p1 = bf16[512,256]{1,0} parameter(1)
  ROOT %dot = bf16[1024,256]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%one_layer (p2: bf16[28,1000,10], p3: s32[]) -> bf16[1000,10] {
  %p2 = bf16[28,1000,10]{2,1,0} parameter(0)
  %p3 = s32[] parameter(1)
  %last = s32[] constant(27)
  %index = s32[] subtract(%last, %p3)
  %zero = s32[] constant(0)
  %slice = bf16[1,1000,10]{2,1,0} dynamic-slice(%p2, %index, %zero, %zero), dynamic_slice_sizes={1,1000,10}
  ROOT %row = bf16[1000,10]{1,0} bitcast(%slice)
}

%keep (p4: bf16[28,1000,10], p5: s32[], p6: bf16[1000,10]) -> bf16[28,1000,10] {
  %p4 = bf16[28,1000,10]{2,1,0} parameter(0)
  %p6 = bf16[1000,10]{1,0} parameter(2)
  %layer = bf16[1,1000,10]{2,1,0} bitcast(%p6)
  %p5 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %update = bf16[28,1000,10]{2,1,0} dynamic-update-slice(%p4, %layer, %p5, %zero.1, %zero.1)
}

%gelu (p7: bf16[1000,1000]) -> bf16[1000,1000] {
  %p7 = bf16[1000,1000]{1,0} parameter(0)
  %wide = f32[1000,1000]{1,0} convert(%p7)
  %tanh = f32[1000,1000]{1,0} tanh(%wide)
  ROOT %narrow = bf16[1000,1000]{1,0} convert(%tanh)
}

%gelu_of_one_layer (p11: bf16[28,1000,10]) -> bf16[1000,10] {
  %p11 = bf16[28,1000,10]{2,1,0} parameter(0)
  %all_wide = f32[28,1000,10]{2,1,0} convert(%p11)
  %first = f32[1,1000,10]{2,1,0} slice(%all_wide), slice={[0:1], [0:1000], [0:10]}
  %one = f32[1000,10]{1,0} bitcast(%first)
  %tanh.1 = f32[1000,10]{1,0} tanh(%one)
  ROOT %narrow.1 = bf16[1000,10]{1,0} convert(%tanh.1)
}

%add (p8: f32[], p9: f32[]) -> f32[] {
  %p8 = f32[] parameter(0)
  %p9 = f32[] parameter(1)
  ROOT %sum = f32[] add(%p8, %p9)
}

%norm (p10: f32[1000,1000]) -> f32[1000,1000] {
  %p10 = f32[1000,1000]{1,0} parameter(0)
  %nought = f32[] constant(0)
  %total = f32[1000]{0} reduce(%p10, %nought), dimensions={1}, to_apply=%add
  %spread = f32[1000,1000]{1,0} broadcast(%total), dimensions={0}
  ROOT %centred = f32[1000,1000]{1,0} subtract(%p10, %spread)
}

%norm_back (p12: f32[1000,1000], p13: f32[1000]) -> (f32[1000,1000], f32[1000]) {
  %p12 = f32[1000,1000]{1,0} parameter(0)
  %p13 = f32[1000]{0} parameter(1)
  %figure = f32[1000,1000]{1,0} broadcast(%p13), dimensions={0}
  %scaled = f32[1000,1000]{1,0} multiply(%p12, %figure)
  %nought.2 = f32[] constant(0)
  %columns = f32[1000]{0} reduce(%scaled, %nought.2), dimensions={0}, to_apply=%add
  ROOT %pair = (f32[1000,1000]{1,0}, f32[1000]{0}) tuple(%scaled, %columns)
}

%zeros () -> (f32[1000,1000], f32[1000,1000]) {
  %nought.1 = f32[] constant(0)
  %empty = f32[1000,1000]{1,0} broadcast(%nought.1), dimensions={}
  %again = f32[1000,1000]{1,0} copy(%empty)
  ROOT %both = (f32[1000,1000]{1,0}, f32[1000,1000]{1,0}) tuple(%empty, %again)
}

"""  # noqa: E501 - an instruction is one line


def program(*lines, before="", fusions=FUSIONS):
    """Return the program of an entry computation with these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.Program(
        f"HloModule jit_step\n\n{fusions}{before}ENTRY %main () -> f32[] {{\n{body}\n}}"
    )


def only_kernel(*lines):
    """Return the kernel of the last line, the only one of the program that costs anything."""
    (kernel,) = kernels.kernels(program(*lines))
    return kernel


def seconds(kernel):
    """Return its time without the launch."""
    return estimate_lib.seconds_of(kernel, RATES) - RATES.launch


A = "%a = bf16[1024,512]{1,0} parameter(0)"
B = "%b = bf16[512,256]{1,0} parameter(1)"
TRITON = (
    "%fusion = bf16[1024,256]{1,0} fusion(%a, %b), kind=kCustom, calls=%dot_computation, "
    'backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}'
)
CUBLAS = (
    "%custom-call.1 = (bf16[1024,256]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
    '"dot_dimension_numbers":{"lhs_batch_dimensions":[],"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["DEFAULT",'
    '"DEFAULT"]}}}'
)


@pytest.mark.parametrize("call", [TRITON, CUBLAS, CUBLAS.replace("$lt$matmul", "$gemm")])
def test_a_product_takes_its_flops_or_its_bytes(call):
    """Leave out the workspace that cuBLAS is given: it is not traffic."""
    kernel = only_kernel(A, B, call)
    assert kernel.kind == "products"
    assert kernel.flops == {"bfloat16": 2 * 1024 * 512 * 256}
    assert kernel.bytes == 2 * (1024 * 512 + 512 * 256 + 1024 * 256)
    assert seconds(kernel) == pytest.approx(kernel.bytes / 1e9)  # 1.8 ms, and 0.27 of arithmetic
    fast = dataclasses.replace(RATES, bandwidth={"elementwise": 1e12})
    assert estimate_lib.seconds_of(kernel, fast) == pytest.approx(0.2684e-3 + 1e-6, rel=1e-3)


@pytest.mark.parametrize("call", [TRITON, CUBLAS])
def test_gradients_of_weights_have_a_rate_of_their_own(call):
    """Take a float32 result of bfloat16 arrays for such a gradient."""
    kernel = only_kernel(
        A, B, call.replace(" bf16[1024,256]", " f32[1024,256]").replace("(bf16", "(f32")
    )
    assert kernel.flops == {"bfloat16 to float32": 2 * 1024 * 512 * 256}


def test_the_operand_of_gelu_is_written_beside_a_product():
    """Count its bytes twice: as traffic, and as time that the product does not hide."""
    kept = CUBLAS.replace("= (bf16[1024,256]{1,0}", "= (bf16[1024,256]{1,0}, bf16[1024,256]{1,0}")
    plain, kernel = only_kernel(A, B, CUBLAS), only_kernel(A, B, kept)
    assert (plain.beside, kernel.beside) == (0, 2 * 1024 * 256)
    assert kernel.bytes == plain.bytes + 2 * 1024 * 256
    slow = dataclasses.replace(RATES, flops={"bfloat16": 1e9})  # 0.27 s of arithmetic
    added = estimate_lib.seconds_of(kernel, slow) - estimate_lib.seconds_of(plain, slow)
    assert added == pytest.approx(2 * 1024 * 256 / 1e9)


@pytest.mark.parametrize(
    ("a_layout", "b_layout", "tf32"),
    [
        ("{1,0}", "{0,1}", "tf32"),
        ("{1,0}", "{1,0}", "tf32 transposed"),
        ("{0,1}", "{0,1}", "tf32 transposed"),
    ],
)
def test_float32_products_have_the_rate_of_their_precision(a_layout, b_layout, tf32):
    """Give TF32 a lower one where the contracted axis of an operand is not contiguous."""
    for asked, rate in (("DEFAULT", tf32), ("HIGHEST", "float32")):
        lines = (
            A.replace("{1,0}", a_layout),
            B.replace("{1,0}", b_layout),
            CUBLAS.replace("DEFAULT", asked),
        )
        kernel = only_kernel(*(line.replace("bf16", "f32") for line in lines))
        assert kernel.flops == {rate: 2 * 1024 * 512 * 256}


def test_a_batched_product_of_cublas_counts_its_batch():
    kernel = only_kernel(
        "%x = f32[8,32,16]{2,1,0} parameter(0)",
        "%y = f32[8,16,64]{1,2,0} parameter(1)",
        CUBLAS.replace("bf16[1024,256]{1,0}", "f32[8,32,64]{2,1,0}")
        .replace("(%a, %b)", "(%x, %y)")
        .replace('"lhs_contracting_dimensions":["1"]', '"lhs_contracting_dimensions":["2"]')
        .replace('"rhs_contracting_dimensions":["0"]', '"rhs_contracting_dimensions":["1"]'),
    )
    assert kernel.flops == {"tf32": 2 * 8 * 32 * 16 * 64}


@pytest.mark.parametrize(
    ("target", "direction", "products"),
    [("__cudnn$fmhaSoftmax", "forward", 2), ("__cudnn$fmhaSoftmaxBackward", "backward", 5)],
)
def test_attention_of_cudnn_has_a_rate_for_each_direction(target, direction, products):
    kernel = only_kernel(
        "%q = bf16[2,256,4,72]{3,2,1,0} parameter(0)",
        f"%attend = (bf16[2,4,256,72]{{3,1,2,0}}, f32[2,4,256]{{2,1,0}}, u8[256]{{0}}) "
        f'custom-call(%q, %q, %q), custom_call_target="{target}"',
    )
    assert kernel.kind == "attention"
    assert kernel.flops == {f"attention {direction}": products * 2 * (2 * 4 * 256 * 72) * 256}


STACK = "%stack = bf16[28,1000,10]{2,1,0} parameter(0)"
INDEX = "%i = s32[] parameter(1)"
LAYER = "%layer = bf16[1000,10]{1,0} parameter(2)"
STARTED = (
    "%start = ((bf16[28,1000,10]{2,1,0}, s32[], bf16[1000,10]{1,0}), bf16[28,1000,10]{2,1,0}, "
    "u32[]) fusion-start(%stack, %i, %layer), kind=kLoop, calls=%keep"
)


GET = "%get = bf16[1000,10]{1,0} fusion(%stack, %i), kind=kLoop, calls=%one_layer"
PUT = "%put = bf16[28,1000,10]{2,1,0} fusion(%stack, %i, %layer), kind=kCustom, calls=%keep"


@pytest.mark.parametrize(
    "lines",
    [[GET], [PUT], [STARTED, "%done = bf16[28,1000,10]{2,1,0} fusion-done(%start)"]],
    ids=["get", "put", "started"],
)
def test_a_copy_of_one_layer_moves_that_layer(lines):
    """As a kernel, as a copy by the driver, and in the background, as jax 0.11.2 writes it."""
    kernel = only_kernel(STACK, INDEX, LAYER, *lines)
    assert (kernel.kind, kernel.access) == ("copies", "copies")
    assert kernel.bytes == 2 * (1000 * 10 * 2) + 4  # read, written, and the index
    assert seconds(kernel) == pytest.approx(kernel.bytes / 0.25e9)


X = "%x = bf16[1000,1000]{1,0} parameter(0)"
GELU = "%y = bf16[1000,1000]{1,0} fusion(%x), kind=kLoop, calls=%gelu"


def test_operations_and_fills_have_rates_of_their_own():
    gelu = only_kernel(X, GELU)  # two conversions and tanh
    assert (gelu.kind, gelu.bytes) == ("elementwise", 4 * 10**6)
    assert gelu.elements == {"operations": 3 * 10**6}
    assert seconds(gelu) == pytest.approx(0.01)  # and 4 ms of bytes
    pair = "(f32[1000,1000]{1,0}, f32[1000,1000]{1,0})"
    zeros = only_kernel(f"%z = {pair} fusion(), kind=kLoop, calls=%zeros")
    assert (zeros.kind, zeros.elements, zeros.bytes) == ("fills", {"fills": 10**6}, 8 * 10**6)
    assert seconds(zeros) == pytest.approx(0.1)


def test_a_call_without_a_result_counts_its_bytes():
    call = '%call = () custom-call(%x), custom_call_target="xla_ffi_python_gpu_callback"'
    kernel = only_kernel(X, call)
    assert (kernel.bytes, kernel.elements) == (2 * 10**6, {"operations": 0})


def test_only_what_is_used_of_an_operation_counts():
    """The conversion before the slice is computed for one layer of 28."""
    call = "%one = bf16[1000,10]{1,0} fusion(%stack), kind=kLoop, calls=%gelu_of_one_layer"
    assert only_kernel(STACK, call).elements == {"operations": 3 * 10**4}


def test_a_reduction_over_rows_in_triton_has_a_rate_for_its_elements():
    """Those that it reads and writes, whatever their width; another kernel has its operations."""
    x = "%x = f32[1000,1000]{1,0} parameter(0)"
    loop = "%y = f32[1000,1000]{1,0} fusion(%x), kind=kInput, calls=%norm"
    triton = loop.replace("kInput", "kCustom") + (
        ', backend_config={"fusion_backend_config":{"kind":"__triton"}}'
    )
    operations = 2 * 10**6  # a subtraction, and an addition for each element that is read
    assert only_kernel(x, loop).elements == {"operations": operations}
    assert seconds(only_kernel(x, loop)) == pytest.approx(8e6 / 1e9)
    assert only_kernel(x, triton).elements == {"operations": operations, "rows": 2 * 10**6}
    assert seconds(only_kernel(x, triton)) == pytest.approx(2e6 / 2e8)
    mixed = only_kernel(x, triton.replace("%y = f32", "%y = bf16"))
    assert (mixed.bytes, mixed.elements["rows"]) == (6 * 10**6, 2 * 10**6)


def test_a_kernel_that_broadcasts_statistics_and_sums_over_rows_has_its_own_bandwidth():
    x, figures = "%x = f32[1000,1000]{1,0} parameter(0)", "%f = f32[1000]{0} parameter(1)"
    call = "%y = (f32[1000,1000]{1,0}, f32[1000]{0}) fusion(%x, %f), kind=kInput, calls=%norm_back"
    kernel = only_kernel(x, figures, call)
    assert (kernel.access, kernel.bytes) == ("sums", 8 * 10**6 + 2 * 4000)
    assert seconds(kernel) == pytest.approx(kernel.bytes / 0.5e9)
    neighbours = [  # figures of columns are spread, or columns are summed: as fast as other loops
        FUSIONS.replace("broadcast(%p13), dimensions={0}", "broadcast(%p13), dimensions={1}"),
        FUSIONS.replace("%nought.2), dimensions={0}", "%nought.2), dimensions={1}"),
    ]
    for fusions in neighbours:
        assert fusions != FUSIONS
        (neighbour,) = kernels.kernels(program(x, figures, call, fusions=fusions))
        assert neighbour.access == "elementwise"


LOOP = """\
%condition (c: (s32[], bf16[1000,1000])) -> pred[] {
  %c = (s32[], bf16[1000,1000]{1,0}) parameter(0)
  %limit = s32[] constant(28)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%command_buffer (x: bf16[1000,1000]) -> bf16[1000,1000] {
  %x = bf16[1000,1000]{1,0} parameter(0)
  ROOT %gelu_fusion = bf16[1000,1000]{1,0} fusion(%x), kind=kLoop, calls=%gelu, metadata={op_name="jit(step)/while/body/mlp/gelu"}
}

%body (l: (s32[], bf16[1000,1000])) -> (s32[], bf16[1000,1000]) {
  %l = (s32[], bf16[1000,1000]{1,0}) parameter(0)
  %k = s32[] get-tuple-element(%l), index=0
  %h = bf16[1000,1000]{1,0} get-tuple-element(%l), index=1
  %next = bf16[1000,1000]{1,0} call(%h), to_apply=%command_buffer
  ROOT %out = (s32[], bf16[1000,1000]{1,0}) tuple(%k, %next)
}

"""  # noqa: E501
WHILE = (
    "%start = (s32[], bf16[1000,1000]{1,0}) parameter(0)",
    "%loop = (s32[], bf16[1000,1000]{1,0}) while(%start), condition=%condition, body=%body, "
    'backend_config={"known_trip_count":{"n":"28"}}',
)


def test_the_kernels_of_a_loop_count_once_per_iteration():
    """Also those of a command buffer, which the body calls."""
    total = estimate(program(*WHILE, before=LOOP), CHIP)
    gelu, condition = 0.01 + 1e-6, 9e-9 + 1e-6
    seconds = {"elementwise": 28 * (gelu + condition), "loops": 28 * 1e-5}
    assert {kind: cost.seconds for kind, cost in total.kinds.items()} == pytest.approx(seconds)
    assert [cost.count for cost in total.kinds.values()] == [56, 28]
    assert total.seconds == pytest.approx(sum(seconds.values()))
    largest = total.largest[0]
    assert (largest.name, largest.count, largest.bytes) == ("gelu_fusion", 28, 4 * 10**6)


def test_kinds_are_sorted_and_equal_kernels_are_one_line():
    gelus = [
        f"%y{n} = bf16[1000,1000]{{1,0}} fusion(%x), kind=kLoop, calls=%gelu, "
        f'metadata={{op_name="{line}"}}'
        for n, line in enumerate(("mlp/gelu", "mlp/gelu", "head/gelu"))
    ]
    x = "%x = bf16[1000,1000]{1,0} parameter(3)"
    total = estimate(program(A, B, x, CUBLAS, *gelus), CHIP)
    assert list(total.kinds) == ["elementwise", "products"]
    assert [(time.count, time.origin) for time in total.largest[:2]] == [
        (2, "mlp/gelu"),
        (1, "head/gelu"),
    ]
    assert total.seconds == pytest.approx(sum(time.seconds for time in total.largest))


REDUCE = (
    "%g = f32[1000,1000]{1,0} parameter(0)",
    "%all = f32[1000,1000]{1,0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add",
)


def test_transfers_count_unless_they_hide_behind_kernels():
    waiting = estimate(program(*REDUCE), CHIP)
    assert waiting.kinds == {"links": estimate_lib.KindTime(pytest.approx(4e6 / 1e9), 1)}
    background = REDUCE[1].replace("all-reduce(", "all-reduce-start(")
    gelu = GELU.replace("%x", "%x.1")
    hidden = estimate(program(REDUCE[0], X.replace("%x", "%x.1"), background, gelu), CHIP)
    assert hidden.seconds == pytest.approx(0.01 + 1e-6)
    assert hidden.kinds["links"].count == 1 and hidden.kinds["links"].seconds == 0


def test_a_chip_without_measured_rates_has_no_estimate():
    v5e = next(chip for chip in CHIPS if chip.name == "v5e")
    assert estimate(program(A, B, CUBLAS), v5e) is None


def test_every_attainable_figure_is_below_the_makers():
    chips = [chip for chip in CHIPS if chip.attainable]
    assert {chip.name for chip in chips} == {"h100", "h200"}
    for chip in chips:
        assert max(chip.attainable.flops.values()) < chip.peak_flops
        assert max(chip.attainable.bandwidth.values()) < chip.hbm_bandwidth
        # The tests' rates have the same names as the chips'.
        assert chip.attainable.flops.keys() == RATES.flops.keys()
        assert chip.attainable.bandwidth.keys() == RATES.bandwidth.keys()
        assert chip.attainable.elements.keys() == RATES.elements.keys()
