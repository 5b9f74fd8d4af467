"""What is counted in a program's text, and how long a step of such counts takes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from radlads_jax.models import MIXERS
from radlads_jax.planning import chips, cost, hlo
from radlads_jax.planning.hlo import Counts

# A loop of four steps; in each a slice of a stack is brought together, multiplied and summed over two groups of four.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_slice (param_0: f32[4,16,8], param_1: s32[]) -> bf16[16,8] {
  %param_0 = f32[4,16,8]{2,1,0} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %dynamic-slice.1 = f32[1,16,8]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,16,8}
  ROOT %convert.1 = bf16[16,8]{1,0} convert(%dynamic-slice.1)
}

%body (state: (s32[], bf16[32,64], f32[4,16,8])) -> (s32[], bf16[32,64], f32[4,16,8]) {
  %state = (s32[], bf16[32,64]{1,0}, f32[4,16,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[32,64]{1,0} get-tuple-element(%state), index=1
  %w = f32[4,16,8]{2,1,0} get-tuple-element(%state), index=2
  %slice = bf16[16,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"100"}
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%slice), replica_groups=[2,4]<=[8], dimensions={0}
  %dot.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} dot(%x, %all-gather.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-reduce.1 = bf16[32,8]{1,0} all-reduce(%dot.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %tuple.1 = (s32[], bf16[32,64]{1,0}, f32[4,16,8]{2,1,0}) tuple(%i, %x, %w)
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

ENTRY %main (start: (s32[], bf16[32,64], f32[4,16,8])) -> bf16[64,64] {
  %start = (s32[], bf16[32,64]{1,0}, f32[4,16,8]{2,1,0}) parameter(0)
  %while.1 = (s32[], bf16[32,64], f32[4,16,8]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %y = bf16[32,64]{1,0} get-tuple-element(%while.1), index=1
  %ag-start = (bf16[32,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%y), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %ag-done = bf16[64,64]{1,0} all-gather-done(%ag-start)
}
"""


def test_a_program_is_counted_with_its_loops():
    counts = hlo.count(PROGRAM)
    assert counts.flops == 4 * 2 * 32 * 8 * 64
    assert counts.cycles == 4 * 100
    gathered, reduced = 4 * 64 * 8 * 2 * 3 / 4, 4 * 2 * 32 * 8 * 2 * 3 / 4
    assert counts.link_bytes == {"all-gather": gathered + 64 * 64 * 2 / 2, "all-reduce": reduced}
    assert counts.exposed_link_bytes == gathered + reduced
    # Of the stack one slice is read, and the product lies in another memory than HBM.
    fusion, gather = 16 * 8 * 4 + 4 + 16 * 8 * 2, 2 * (16 * 8 + 64 * 8)
    dot, reduce = 2 * (32 * 64 + 64 * 8), 2 * 32 * 8
    start = 2 * (32 * 64 + 64 * 64)
    assert counts.hbm_bytes == 4 * (fusion + gather + dot + reduce) + start
    assert counts.unknown_loops == 0


def test_an_array_that_goes_to_vmem_in_slices_is_read_once():
    slices = "".join(
        f"  %slice-start.{i} = ((s8[4096]{{0:T(1024)}}), s8[1024]{{0:T(1024)S(1)}}, s32[]{{:S(2)}}) "
        f"slice-start(%bytes), slice={{[{1024 * i}:{1024 * i + 1024}]}}\n"
        for i in range(4)
    )
    text = "ENTRY %main (bytes: s8[4096]) -> s8[4096] {\n  %bytes = s8[4096]{0} parameter(0)\n" + slices + "}\n"
    assert hlo.count(text).hbm_bytes == 4096


def test_a_loop_whose_length_stands_in_its_condition():
    without = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"4"}}', "")
    assert hlo.count(without).unknown_loops == 1
    condition = """%until (state.1: (s32[], bf16[32,64], f32[4,16,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(4), metadata={op_name="n"}
  %state.1 = (s32[], bf16[32,64]{1,0}, f32[4,16,8]{2,1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY"""
    text = without.replace("ENTRY", condition).replace("body=%body", "condition=%until, body=%body")
    assert hlo.count(text) == hlo.count(PROGRAM)


def test_an_unrolled_loop_counts_by_its_stride():
    """A windowed product that the compiler unrolled runs its body half as often as its bound says."""
    text = """%body (q: (u32[], f32[8,16], f32[16,8])) -> (u32[], f32[8,16], f32[16,8]) {
  %q = (u32[], f32[8,16]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%q), index=0
  %copy.1 = u32[]{:T(128)S(6)} copy(%i)
  %two = u32[]{:T(128)} constant(2), metadata={op_name="n"}
  %next = u32[]{:T(128)} add(%copy.1, %two)
  %x = f32[8,16]{1,0} get-tuple-element(%q), index=1
  %y = f32[16,8]{1,0} get-tuple-element(%q), index=2
  %dot.1 = f32[8,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (u32[], f32[8,16]{1,0}, f32[16,8]{1,0}) tuple(%next, %x, %y)
}

%until (p: (u32[], f32[8,16], f32[16,8])) -> pred[] {
  %n = u32[]{:T(128)} constant(7)
  %p = (u32[], f32[8,16]{1,0}, f32[16,8]{1,0}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: (u32[], f32[8,16], f32[16,8])) -> (u32[], f32[8,16], f32[16,8]) {
  %a = (u32[], f32[8,16]{1,0}, f32[16,8]{1,0}) parameter(0)
  ROOT %while.1 = (u32[], f32[8,16]{1,0}, f32[16,8]{1,0}) while(%a), condition=%until, body=%body
}
"""
    assert hlo.count(text).flops == 4 * 2 * 8 * 8 * 16
    assert hlo.count(text.replace("constant(2)", "constant(1)")).flops == 7 * 2 * 8 * 8 * 16


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    text = """%all-reduce-scatter.1 (p: bf16[8,16]) -> bf16[2,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[2,16]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (a: bf16[8,16]) -> bf16[2,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %fusion.1 = bf16[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert hlo.count(text).link_bytes == {"reduce-scatter": 8 * 16 * 2 * 3 / 4}


def test_what_is_scheduled_between_a_collectives_start_and_end():
    """By a sparse core, called: 300 cycles run beside the gather, in each of five turns."""
    text = """%gather (p: bf16[8,16]) -> bf16[8,64] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %ag = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={1}
}, execution_thread="sparsecore"

%other (r: bf16[8,16]) -> bf16[8,16] {
  %r = bf16[8,16]{1,0} parameter(0)
  ROOT %n = bf16[8,16]{1,0} negate(%r)
}

%body (q: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%q), index=1
  %call-start.1 = ((), (), s32[]{:S(2)}) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %before = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"50"}
  %call-update.1 = ((bf16[8,16]{1,0}), bf16[8,64]{1,0}) call-update(%call-start.1, %x)
  %beside = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"300"}
  %call-done.1 = bf16[8,64]{1,0} call-done(%call-update.1)
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%q)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,64] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %while.1 = (s32[], bf16[8,16]) while(%a), body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    counts, received = hlo.count(text), 8 * 64 * 2 * 3 / 4
    assert counts.link_bytes == {"all-gather": 5 * received} and counts.exposed_link_bytes == 0
    assert counts.begun == [(received, 300.0, 5.0)] and counts.cycles == 5 * 350
    # 768 bytes take 153.6 s, of which 150 s pass beside the 300 cycles.
    timed = cost.step_time(CHIP, dataclasses.replace(counts, hbm_bytes=0.0))
    assert timed.step == pytest.approx(5 * 350 / 2 + 5 * (received / 5 - 300 / 2))


def test_a_collective_in_several_fusions_is_one():
    """Started before a loop, stepped in it and ended after it: counted once, beside the loop's own work."""
    text = """%gather (p: bf16[8,16]) -> bf16[8,64] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %ag = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=8] {'fsdp':(1)4}
}

%body (q: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%q), index=1
  %fusion.1 = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%gather
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%q)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,64] {
  %a = bf16[8,16]{1,0} parameter(0)
  %async-collective-start.1 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%gather
  %while.1 = (s32[], bf16[8,16]) while(%a), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %async-collective-done.1 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%gather
}
"""
    counts = hlo.count(text)
    assert counts.link_bytes == {"all-gather": 8 * 64 * 2 * 3 / 4}
    assert counts.exposed_link_bytes == 0


@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "flops"),
    [
        ("8,16", "16,4", "8,4", "dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
        # A batch of 6 products [8,16] x [16,4], as windows over the batch.
        (
            "6,8,16",
            "6,16,4",
            "6,8,4",
            "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            6 * 2 * 8 * 16 * 4,
        ),
        # A true convolution: 10 places, window 3 with a border of 1, so that the two outermost places miss one each.
        ("10,8,16", "3,16,4", "10,8,4", "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf", 28 * 2 * 8 * 16 * 4),
    ],
)
def test_convolutions(left, right, out, rest, flops):
    text = f"""ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}]{{1,0}} parameter(0)
  %b = f32[{right}]{{1,0}} parameter(1)
  ROOT %c = f32[{out}]{{1,0}} convolution(%a, %b), {rest}
}}"""
    assert hlo.count(text).flops == flops


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match=r"\bENTRY\b.*as_text"):
        hlo.count("HloModule nothing\n")


def test_a_compiled_loop_on_this_machine():
    def run(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    shapes = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    text = jax.jit(run).lower(*shapes).compile().as_text()
    assert hlo.count(text).flops == 5 * 2 * 16 * 32 * 32


CHIP = chips.Chip(flops=100.0, hbm_rate=10.0, link_rate=5.0, clock=2.0, usable=1e9, price=3.0)


@pytest.mark.parametrize(
    ("cycles", "hbm_bytes", "link_bytes", "exposed", "step", "bound"),
    [
        (0.0, 20.0, 0.0, 0.0, 10.0, "compute"),
        (40.0, 20.0, 0.0, 0.0, 20.0, "compute"),  # the compiler's own estimate is slower than the peak
        (0.0, 300.0, 0.0, 0.0, 30.0, "memory"),
        (0.0, 20.0, 40.0, 0.0, 10.0, "compute"),  # 8 s beside 10 s
        (0.0, 20.0, 40.0, 40.0, 18.0, "compute"),
        (0.0, 20.0, 90.0, 20.0, 18.0, "network"),  # 4 s alone, of 14 s more 10 s beside the computation
    ],
)
def test_the_time_of_a_step(cycles, hbm_bytes, link_bytes, exposed, step, bound):
    counts = Counts(1000.0, hbm_bytes, cycles, exposed, 0, {"all-gather": link_bytes})
    timed = cost.step_time(CHIP, counts)
    assert (timed.step, timed.bound) == (step, bound)


# As jax names it inside a loop, and outside of all: within what it is differentiated by.
@pytest.mark.parametrize("scope", ["jit(step)/wkv7_forward", "jit(step)/transpose(jvp(wkv7_forward))", "wkv7_forward"])
def test_a_kernel_is_counted_by_its_first_result(scope):
    line = (
        "  %wkv7_forward.1 = (bf16[2,16,512]{2,1,0:T(8,128)(2,1)}, f32[2,4,128,128]{3,2,1,0}) custom-call(%x), "
        'custom_call_target="tpu_custom_call", metadata={op_name="SCOPE/pallas_call"}\n'
    ).replace("SCOPE", scope)
    counts = hlo.count(PROGRAM.replace("  %slice = bf16", f"{line}  %slice = bf16"))
    assert counts.kernels == {"wkv7_forward": 4 * 2 * 16 * 512}
    # 10 tokens and heads, at twice a v6e's cycles, two cycles a second.
    cycles = MIXERS["rad_rwkv7"].operator.cycles["wkv7_forward"]
    assert cost.step_time(CHIP, Counts(kernels={"wkv7_forward": 1280.0})).compute == pytest.approx(2 * cycles * 10 / 2)


def test_attention_is_counted_by_its_scores():
    """As the library names its kernels: with results of one block, and metadata of a line of its own."""

    def line(name, results):
        return (
            f"  %{name}.1 = ({results}) custom-call(%x), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"xprof":"{}"\n}}, '
            f'metadata={{op_name="jit(step)/{name}/{name}/pallas_call"}}\n'
        )

    forward = "f32[2,128,128]{2,1,0}, bf16[2,3,4096,64]{3,2,1,0}"
    lines = line("splash_mha_fwd_segmented_residuals", forward) + line("splash_mha_dq_no_residuals", forward)
    counts = hlo.count(PROGRAM.replace("  %slice = bf16", f"{lines}  %slice = bf16"))
    elements = 2 * 3 * 4096 * 64
    assert counts.kernels == dict.fromkeys(("splash_mha_fwd", "splash_mha_dq"), 4 * elements * 4096)
    assert counts.cycles == hlo.count(PROGRAM).cycles
    # Two products forward and seven backward of half of all pairs, at 45% of the peak.
    expected = 4 * (2 + 7) * 2 * elements * 4096 / 2 / (0.45 * CHIP.flops)
    assert cost.step_time(CHIP, Counts(kernels=counts.kernels)).compute == pytest.approx(expected)
