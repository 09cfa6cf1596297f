"""Sums over optimized HLO, on a program small enough to add up by hand."""

from types import SimpleNamespace

import pytest

from rpo_jax.sharding.chips import CHIPS
from rpo_jax.sharding.hlo import Transfer, axes_of, read_group, read_program, sum_by_axes
from rpo_jax.sharding.speed import KERNEL_EFFICIENCY, estimate_seconds, kernel_flops
from rpo_jax.sharding.topology import DCN_BYTES_PER_S, Topology

# A loop of 5 turns: 100 cycles, a kernel, a permutation behind 70 cycles, and a fused
# reduce-scatter; then, once, an all-gather and 1000 cycles.
PROGRAM = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: bf16[8,128]) -> bf16[4,128] {
  %input = bf16[8,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%input), replica_groups={{0,2},{1,3}}, to_apply=%add
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), backend_config={"estimated_cycles":"100"}
  %collective-permute-start.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) \
collective-permute-start(%fusion.1), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %fusion.2 = bf16[8,128]{1,0} fusion(%x), backend_config={"estimated_cycles":"70"}
  %collective-permute-done.1 = bf16[8,128]{1,0} collective-permute-done(%collective-permute-start.1)
  %splash_mha_fwd_segmented.3 = bf16[4,256,128]{2,1,0} custom-call(%q, %k, %v), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, \
bf16[4,256,128]{2,1,0}, bf16[2,512,128]{2,1,0}, bf16[2,512,64]{2,1,0}, s32[8,512]{1,0}}, \
frontend_attributes={kernel_metadata={
  %fusion.3 = bf16[4,128]{1,0} fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter
  ROOT %tuple.1 = (s32[], bf16[8,128]{1,0}) tuple(%i, %fusion.2)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %constant.1 = s32[] constant(5)
  ROOT %compare.1 = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (p: bf16[8,128]) -> f32[16,128] {
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body
  %all-gather.1 = f32[16,128]{1,0} all-gather(%y), replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %fusion.4 = f32[16,128]{1,0} fusion(%z), backend_config={"estimated_cycles":"1000"}
}
"""
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


def test_loops_count_as_often_as_they_turn():
    program = read_program(PROGRAM)
    assert program.cycles == 5 * 170 + 1000
    found = {t.kind: (t.output_bytes, t.between_cycles, t.times) for t in program.transfers}
    assert found == {
        "collective-permute": (2 * 8 * 128, 70, 5),
        "reduce-scatter": (2 * 4 * 128, 0, 5),
        "all-gather": (4 * 16 * 128, 0, 1),
    }
    (kernel,) = program.kernels
    assert kernel.times == 5
    assert kernel.shapes == ((4, 256, 128), (2, 512, 128), (2, 512, 64))
    assert not kernel.fused


# A gather that begins in one fusion, goes on while a second one computes, and ends in a third.
CHAIN = """HloModule jit_step, is_scheduled=true

%begin (p: bf16[4,128]) -> bf16[8,128] {
  %all-gather.1 = bf16[8,128]{1,0} all-gather(%p), replica_groups={{0,2},{1,3}}, \
frontend_attributes={chain_id="7"}
}

%go_on (p: bf16[4,128]) -> bf16[8,128] {
  %all-gather.2 = bf16[8,128]{1,0} all-gather(%p), replica_groups={{0,2},{1,3}}, \
frontend_attributes={chain_id="7"}
}

ENTRY %main (p: bf16[4,128]) -> bf16[8,128] {
  %fusion.1 = bf16[8,128]{1,0} fusion(%p), calls=%begin
  %fusion.2 = bf16[8,128]{1,0} fusion(%x), backend_config={"estimated_cycles":"50"}
  %fusion.3 = bf16[8,128]{1,0} fusion(%p), calls=%go_on, backend_config={"estimated_cycles":"300"}
  ROOT %fusion.4 = bf16[8,128]{1,0} fusion(%p), calls=%go_on
}
"""


def test_a_transfer_that_runs_through_fusions_counts_once():
    program = read_program(CHAIN)
    assert program.cycles == 350
    (transfer,) = program.transfers
    assert (transfer.kind, transfer.output_bytes) == ("all-gather", 2 * 8 * 128)
    assert transfer.between_cycles == 350


# What a layer of nf4 weights puts out on four devices, and the same in other types.
GATHER = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: TYPE[1,2048,512]) -> TYPE[1,8192,512] {
  ROOT %all-gather.1 = TYPE[1,8192,512]{2,1,0:LAYOUT} all-gather(%p), replica_groups=[1,4]<=[4]
}
"""


@pytest.mark.parametrize(
    ("kind", "layout", "bits"),
    [
        ("u4", "T(64,128)(8,1)E(4)", 4),
        ("s4", "T(8,128)(8,1)E(4)S(1)", 4),
        ("pred", "T(8,128)(4,1)", 8),
        ("s8", "T(8,128)(4,1)", 8),
        ("f8e4m3fn", "T(8,128)(4,1)", 8),
        ("s16", "T(8,128)(2,1)", 16),
        ("bf16", "T(8,128)(2,1)", 16),
        ("f32", "T(8,128)", 32),
    ],
)
def test_a_value_has_the_bits_of_its_type(kind, layout, bits):
    program = read_program(GATHER.replace("TYPE", kind).replace("LAYOUT", layout))
    (transfer,) = program.transfers
    assert transfer.output_bytes == 8192 * 512 * bits // 8


CHOICE = """HloModule jit_step, is_scheduled=true

%costly (p: f32[8]) -> f32[8] {
  %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %fusion.1 = f32[8]{0} fusion(%all-reduce.1), backend_config={"estimated_cycles":"30"}
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %fusion.2 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"2"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %conditional.1 = f32[8]{0} conditional(%is_finite, %p, %p), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%cheap, %costly}",
        "true_computation=%costly, false_computation=%cheap",
    ],
)
def test_of_a_choice_the_costliest_branch_counts(branches):
    program = read_program(CHOICE.replace("BRANCHES", branches))
    assert program.cycles == 30
    (transfer,) = program.transfers
    assert (transfer.kind, transfer.output_bytes, transfer.times) == ("all-reduce", 32, 1)


# Three rows: the backward pass in one kernel, which puts out the queries' gradient in two parts.
ROWS = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {
  %splash_mha_dkv_no_residuals.1 = (f32[256,64]{1,0}, bf16[2,3,4,256,64]{4,3,2,1,0}, \
bf16[3,2,256,64]{3,2,1,0}, bf16[3,2,256,64]{3,2,1,0}) custom-call(%q, %k, %v), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, \
bf16[3,4,256,64]{3,2,1,0}, bf16[3,2,256,64]{3,2,1,0}, bf16[3,2,256,64]{3,2,1,0}}, \
frontend_attributes={kernel_metadata={
}
"""


def test_kernels_of_several_rows_and_fused_ones_are_charged():
    (kernel,) = read_program(ROWS).kernels
    assert kernel.fused and kernel.shapes[0] == (12, 256, 64)
    # Five matmuls over the triangle.
    assert kernel_flops(kernel) == 2 * 12 * 256 * 128 * 5 * 64


UNKNOWN = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)
  %copy-done.1 = f32[8]{0} copy-done(%copy-start.1)
  %custom-call.1 = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %custom-call.2 = f32[8]{0} custom-call(%p), custom_call_target="ConcatBitcast"
  %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  %add.1 = f32[] add(%x, %y)
  %fusion.1 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"3"}
  %fusion.2 = (f32[], f32[8]{0}) fusion(%p), kind=kCustom
  %fusion.3 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %sort.1 = f32[8]{0} sort(%p)
}
"""


def test_what_has_no_estimate_is_counted():
    program = read_program(UNKNOWN)
    assert program.cycles == 3
    assert program.unknown == {"fusion": 2, "sort": 1, "ConcatBitcast": 1}


SLICES = """HloModule jit_step, is_scheduled=true

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (bf16[64,32]{1,0}, u32[], token[]) send(%p, %after-all.1), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="sum.1_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[64,32]{1,0}, u32[], token[]) recv(%after-all.1), channel_id=1, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="sum.1_0",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %fusion.1 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"500"}
  %send-done.1 = token[] send-done(%send.1), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv-done.1 = (bf16[64,32]{1,0}, token[]) recv-done(%recv.1), channel_id=1, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %fusion.2 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"7"}
}
"""


def test_what_goes_between_slices_is_charged():
    program = read_program(SLICES)
    assert program.transfers == [Transfer("all-reduce", 4096, (), 500, 1, across_slices=True)]
    assert not program.unknown
    assert sum_by_axes(program, MESH) == {"slices": {"all-reduce": 4096.0}}
    found = estimate_seconds(program, Topology("", CHIPS["v6e"], 3, []), [])
    moved = 4096 * 2 * 2 / 3  # three slices
    assert found.communication == pytest.approx(moved / DCN_BYTES_PER_S - 500 / 1.75e9)
    assert found.compute == 507 / 1.75e9


def test_collectives_are_told_by_mesh_axis():
    assert sum_by_axes(read_program(PROGRAM), MESH) == {
        "tensor": {"collective-permute": 5 * 2048.0},
        "fsdp": {"reduce-scatter": 5 * 1024.0},
        "fsdp*tensor": {"all-gather": 8192.0},
    }


def test_seconds_by_hand():
    """Four chips in a square: two links between neighbours' sides, one to a neighbour."""
    chip = CHIPS["v6e"]
    devices = [SimpleNamespace(coords=(i // 2, i % 2, 0), slice_index=0) for i in range(4)]
    seconds = estimate_seconds(read_program(PROGRAM), Topology("", chip, 1, devices), devices)
    assert seconds.compute == 1850 / 1.75e9
    link = 400e9 / 4
    gather = 8192 * 3 / 4 / (2 * link)
    hidden = max(0.0, 2048 / link - 70 / 1.75e9)
    assert seconds.communication == pytest.approx(5 * (hidden + 1024 / link) + gather)
    # Queries are the last 256 of 512: they see all keys but half of their own.
    flops = 2 * 4 * 256 * (512 - 128) * (128 + 64)
    assert seconds.kernels == pytest.approx(5 * flops / (918e12 * KERNEL_EFFICIENCY))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("source_target_pairs={{0,60},{4,0}}", (0, 60)),
        ("source_target_pairs={{0,0},{1,1},{4,2},{2,4}}, frontend", (4, 2)),
        ("source_target_pairs={{0,0},{1,1}}", ()),
        ("replica_groups={{0,1,2},{3,4,5}}, use", (0, 1, 2)),
        ("replica_groups=[2,2]<=[4], dimensions", (0, 1)),
        ("replica_groups=[4,16]<=[16,4]T(1,0), dim", tuple(range(0, 64, 4))),
        ("replica_groups=mesh['a'=16,'b'=4] {'a'}, dim", tuple(range(0, 64, 4))),
        ("replica_groups=mesh['a'=16,'b'=4] {'b'}, dim", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=16], device_ids=([16,4]T(1,0)) {'a'}, d", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("all-reduce of nobody", ()),
    ],
)
def test_every_notation_of_groups_is_read(text, group):
    assert read_group(text) == group


def test_axes_of_a_group():
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    assert axes_of((0, 1), mesh) == "tensor"
    assert axes_of((0, 2, 4, 6), mesh) == "fsdp"
    assert axes_of((0, 8), mesh) == "data"
    assert axes_of((0, 2, 4, 6, 8, 10, 12, 14), mesh) == "data*fsdp"
    assert axes_of((), mesh) == "none"
