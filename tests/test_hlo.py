"""hlo: FLOPs, memory traffic and collectives of a hand-written and of a really compiled program."""

import json

import pytest

from sit_jax.jobs.preflight import hlo, hlo_text
from tests.processes import run_python

# As the TPU compiler writes it: a layer loop of 3 iterations and in it a loop that counts to 8 in
# twos, one all-gather (one channel) in two fusions, a batched product as a dilated convolution, and
# arrays that are held on the chip, S(1).
PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_gather (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,4]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
}

%fused_gather.2 (p: bf16[2,4]) -> bf16[8,4] {
  %p.2 = bf16[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,4]{1,0:T(8,128)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
}

%fused_update (p0: f32[3,16], p1: f32[16], p2: s32[]) -> f32[3,16] {
  %p0 = f32[3,16]{1,0} parameter(0)
  %p1 = f32[16]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,16]{1,0} bitcast(%p1)
  ROOT %update = f32[3,16]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%window_condition (w: (s32[], bf16[2,4])) -> pred[] {
  %w = (s32[], bf16[2,4]{1,0}) parameter(0)
  %eight = s32[] constant(8)
  %j = s32[] get-tuple-element(%w), index=0
  ROOT %less = pred[] compare(%j, %eight), direction=LT
}

%window_body (w.1: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %w.1 = (s32[], bf16[2,4]{1,0}) parameter(0)
  %j.1 = s32[] get-tuple-element(%w.1), index=0
  %two = s32[] constant(2)
  %j.2 = s32[] add(%j.1, %two)
  %j.3 = s32[] copy(%j.2)
  %chunk = bf16[2,4]{1,0} get-tuple-element(%w.1), index=1
  %permute-start = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[], u32[]) collective-permute-start(%chunk), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %permute-done = bf16[2,4]{1,0} collective-permute-done(%permute-start)
  ROOT %out = (s32[], bf16[2,4]{1,0}) tuple(%j.3, %permute-done)
}

%layer_condition (l: (s32[], f32[3,16])) -> pred[] {
  %l = (s32[], f32[3,16]{1,0}) parameter(0)
  %three = s32[] constant(3)
  %i = s32[] get-tuple-element(%l), index=0
  ROOT %below = pred[] compare(%i, %three), direction=LT
}

%layer_body (l.1: (s32[], f32[3,16])) -> (s32[], f32[3,16]) {
  %l.1 = (s32[], f32[3,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%l.1), index=0
  %one = s32[] constant(1)
  %i.2 = s32[] add(%i.1, %one)
  %kept = f32[3,16]{1,0} get-tuple-element(%l.1), index=1
  %shard = bf16[2,4]{1,0:S(1)} constant({...})
  %gather-start = bf16[8,4]{1,0:S(1)} fusion(%shard), kind=kCustom, calls=%fused_gather
  %gather-done = bf16[8,4]{1,0:S(1)} fusion(%shard), kind=kCustom, calls=%fused_gather.2
  %x = bf16[16,8]{1,0:S(1)} constant({...})
  %dot = f32[16,4]{1,0:S(1)} dot(%x, %gather-done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %q = bf16[2,6,256,64]{3,2,1,0:S(1)} constant({...})
  %logits = f32[2,6,256,256]{3,2,1,0:S(1)} convolution(%q, %q), window={size=2x6 stride=1x5 lhs_dilate=2x6}, dim_labels=01bf_01oi->01bf
  %row.1 = f32[16]{0:S(1)} constant({...})
  %updated = f32[3,16]{1,0} fusion(%kept, %row.1, %i.1), kind=kLoop, calls=%fused_update
  %start = (s32[], bf16[2,4]{1,0}) tuple(%i.1, %shard)
  %loop = (s32[], bf16[2,4]{1,0}) while(%start), condition=%window_condition, body=%window_body
  ROOT %next = (s32[], f32[3,16]{1,0}) tuple(%i.2, %updated)
}

ENTRY %main (a: f32[3,16]) -> f32[3,16] {
  %a = f32[3,16]{1,0} parameter(0)
  %nought = s32[] constant(0)
  %reduced = (f32[3,16]{1,0}, f32[]) all-reduce(%a, %scalar), channel_id=1, replica_groups=[2,2]<=[4], to_apply=%sum
  %scalar = f32[] constant(1)
  %begin = (s32[], f32[3,16]{1,0}) tuple(%nought, %a)
  %layers = (s32[], f32[3,16]{1,0}) while(%begin), condition=%layer_condition, body=%layer_body
  ROOT %result = f32[3,16]{1,0} get-tuple-element(%layers), index=1
}

%sum (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %added = f32[] add(%x.1, %y.1)
}
"""  # noqa: E501 - an instruction is one line


@pytest.fixture(scope="module")
def program():
    return hlo.Program(PROGRAM)


def test_products_count_once_per_iteration_of_their_loops(program):
    dot = 2 * 16 * 4 * 8
    logits = 2 * (2 * 6) * 256 * 256 * 64
    assert program.flops == program.bfloat16_flops == 3 * (dot + logits)
    assert not program.unknown_loops


def test_precise_float32_products_take_several_passes():
    program = hlo.Program(
        PROGRAM.replace(
            "rhs_contracting_dims={0}",
            "rhs_contracting_dims={0}, operand_precision={highest,highest}",
        )
    )
    assert program.bfloat16_flops - program.flops == 5 * 3 * 2 * 16 * 4 * 8


def test_a_kernel_counts_the_flops_of_its_cost_estimate():
    text = PROGRAM.replace(
        "dot(%x, %gather-done), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        'custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000"}}}',
    )
    assert hlo.Program(PROGRAM).flops - hlo.Program(text).flops == 3 * (2 * 16 * 4 * 8 - 1000)


@pytest.mark.parametrize(
    ("kernel", "target", "products"),
    [
        ("splash_mha_dkv_no_residuals.1", "tpu_custom_call", 5),
        ("any_name", "__cudnn$fmhaSoftmax", 2),
    ],
)
def test_attention_kernels_count_their_products(kernel, target, products):
    result = "(f32[2,6,256], bf16[2,6,256,64])"
    call = f'%{kernel} = {result} custom-call(%q), custom_call_target="{target}"'
    text = PROGRAM.replace("  ROOT %next =", f"  {call}\n  ROOT %next =")
    added = hlo.Program(text).flops - hlo.Program(PROGRAM).flops
    assert added == 3 * products * 2 * (2 * 6 * 256 * 64) * 256


def test_a_convolution_of_cudnn_counts_where_its_window_meets_the_image():
    text = """\
ENTRY %main (x: f32[2,5,5,3], k: f32[4,3,3,3]) -> f32[2,5,5,4] {
  %x = f32[2,5,5,3]{3,2,1,0} parameter(0)
  %k = f32[4,3,3,3]{3,2,1,0} parameter(1)
  ROOT %conv = (f32[2,5,5,4]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
}
"""  # noqa: E501
    meets = 3 * 5 - 2  # of 3 window positions for 5 outputs, two are padding
    assert hlo.Program("HloModule conv\n\n" + text).flops == 2 * 2 * meets**2 * 3 * 4


def test_collectives_have_their_bytes_and_counts(program):
    by_kind = {c.kind: c for c in program.collectives}
    assert len(program.collectives) == 3  # the two parts of the all-gather count as one
    gather = by_kind["all-gather"]
    permute = by_kind["collective-permute"]
    reduce = by_kind["all-reduce"]
    assert (gather.times, gather.group, gather.sent, gather.in_background) == (3, 4, 3 * 16, True)
    assert (permute.times, permute.group, permute.sent, permute.in_background) == (
        3 * 4,
        4,
        16,
        True,
    )
    assert (reduce.times, reduce.group, reduce.sent, reduce.in_loop) == (
        1,
        2,
        3 * 16 * 4 + 4,
        False,
    )
    table = hlo.by_kind(program.collectives)
    assert table["all-gather"] == {"in_loop": 3 * 48, "outside": 0, "count": 3}
    assert table["collective-permute"] == {"in_loop": 12 * 16, "outside": 0, "count": 12}
    assert table["all-reduce"] == {"in_loop": 0, "outside": 196, "count": 1}


def test_traffic_counts_the_hbm_that_kernels_read_and_write(program):
    traffic = {}
    for execution in program.executions:
        if not execution.fused and (size := program.traffic(execution)):
            traffic[execution.instruction.name] = size
    # The row of f32[3,16] that is written, and its index; the new row was on the chip.
    assert traffic["updated"] == 4 * 16 + 4
    assert traffic["reduced"] == 2 * (3 * 16 * 4 + 4)
    assert not {"dot", "logits", "gather-done", "layers"} & set(traffic)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_group_sizes(groups, size):
    assert hlo_text.group_size(f"(%x), channel_id=1, {groups}, dimensions={{0}}", 8) == size


def test_a_loop_whose_length_depends_on_the_data_counts_once():
    text = PROGRAM.replace(
        "%eight = s32[] constant(8)", "%eight = s32[] get-tuple-element(%w), index=0"
    )
    program = hlo.Program(text)
    assert program.unknown_loops == 1
    assert {c.kind: c.times for c in program.collectives}["collective-permute"] == 3


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 1), ("bf16", 2), ("f32", 4), ("s8", 1), ("f8e4m3fn", 1), ("u64", 8), ("c64", 8)],
)
def test_sizes_of_dtypes(dtype, size):
    assert hlo_text.Array(dtype, (3, 5)).bytes == 15 * size
    assert hlo_text.Array(dtype, (), "T(128)S(1)").hbm_bytes == 0


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sit_jax.jobs.preflight import hlo

mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
rows, stacked = P(("data", "fsdp")), P(None, "fsdp")

def layers(x, weights):
    def layer(x, w):
        return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None
    return jax.lax.psum(jax.lax.scan(layer, x, weights)[0].sum(), ("data", "fsdp"))

mapped = jax.shard_map(layers, mesh=mesh, in_specs=(rows, stacked), out_specs=P())
x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, rows))
w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32, sharding=NamedSharding(mesh, stacked))
text = jax.jit(mapped).lower(x, w).compile().as_text()
program = hlo.Program(text)
table = hlo.by_kind(program.collectives)
print(json.dumps({"flops": program.flops, "table": table, "hbm": program.hbm_bytes}))
"""


def test_a_compiled_program_of_eight_devices():
    costs = json.loads(run_python("-c", COMPILE, devices=8).splitlines()[-1])
    assert costs["flops"] == 5 * 2 * (64 // 8) * 32 * 32
    shard = 32 * 32 * 4 // 4
    assert costs["table"]["all-gather"] == {"in_loop": 5 * 3 * shard, "outside": 0, "count": 5}
    reduce = costs["table"]["all-reduce"]
    assert reduce["count"] == 1 and reduce["outside"] == 2 * 4 * 7 // 8
    assert costs["hbm"] > 5 * 32 * 32 * 4  # at least the weights of each layer
