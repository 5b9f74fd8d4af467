"""Where a compiled step's time goes: what an operation is, how often it runs, and which line of code it came from."""

import pytest
from rich.console import Console

from radlads_jax.planning import where
from radlads_jax.planning.chips import CHIPS
from radlads_jax.planning.display import show_where

CHIP = CHIPS["v6e"]
# Six runs of a loop with a product (600 cycles), a copy (90) and a sum (30), then a copy of the compiler's own (7).
PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/site-packages/jax/_src/numpy.py"
2 "/home/me/radlads/radlads_jax/models/rwkv.py"
3 "/home/me/radlads/pallas_kernels/wkv7/api.py"

FunctionNames
1 "einsum"
2 "__call__"

FileLocations
1 {file_name_id=2 function_name_id=2 line=40 end_line=40 column=4 end_column=8}
2 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=4 end_column=8}
3 {file_name_id=3 function_name_id=2 line=99 end_line=99 column=4 end_column=8}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=1}

%fused (x: f32[8,16], y: f32[16,8]) -> f32[8,8] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moved (x: f32[8,16]) -> f32[16,8] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %turned = f32[16,8]{1,0} transpose(%x), dimensions={1,0}
}

%summed (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %twice = f32[8,8]{1,0} add(%x, %x)
}

%body (q: (s32[], f32[8,16], f32[8,8])) -> (s32[], f32[8,16], f32[8,8]) {
  %q = (s32[], f32[8,16]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%q), index=1
  %fusion.1 = f32[16,8]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%moved, metadata={op_name="jit(step)/rwkv/transpose" stack_frame_id=3}, backend_config={"estimated_cycles":"90"}
  %fusion.2 = f32[8,8]{1,0} fusion(%x, %fusion.1), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/rwkv/dot" stack_frame_id=2}, backend_config={"estimated_cycles":"600"}
  %fusion.3 = f32[8,8]{1,0} fusion(%fusion.2), kind=kLoop, calls=%summed, metadata={op_name="jit(step)/rwkv/add" source_file="/a/radlads_jax/distill/step.py" source_line=12}, backend_config={"estimated_cycles":"30"}
  ROOT %t = (s32[], f32[8,16]{1,0}, f32[8,8]{1,0}) tuple(%i, %x, %fusion.3)
}

ENTRY %main (start: (s32[], f32[8,16], f32[8,8])) -> f32[8,8] {
  %start = (s32[], f32[8,16]{1,0}, f32[8,8]{1,0}) parameter(0)
  %while.1 = (s32[], f32[8,16]{1,0}, f32[8,8]{1,0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %z = f32[8,8]{1,0} get-tuple-element(%while.1), index=2
  %whole = f32[16,8]{1,0} all-gather(%z), replica_groups={{0,1}}, dimensions={0}, backend_config={"estimated_cycles":"5000"}
  ROOT %copy.9 = f32[8,8]{0,1} copy(%z), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def told():
    return where.of_program(PROGRAM, CHIP)


def test_seconds_by_kind_are_cycles_times_loops(told):
    cycles = {kind: round(part["seconds"] * CHIP.clock) for kind, part in told["kinds"].items()}
    exposed = cycles.pop("exposed links")
    assert cycles == {"matrix products": 6 * 600, "copies": 6 * 90 + 7, "elementwise, reductions": 6 * 30}
    # What a device has not got of the gathered rows; the collective's own cycles are no operation's.
    assert exposed == round(8 * 8 * 4 / CHIP.link_rate * CHIP.clock)
    copies = told["kinds"]["copies"]
    assert copies["hbm_bytes"] == 6 * 2 * 8 * 16 * 4 + 2 * 8 * 8 * 4 and copies["operations"] == 7
    assert copies["hbm_seconds"] == pytest.approx(copies["hbm_bytes"] / CHIP.hbm_rate)


def test_lines_are_the_innermost_ones_of_this_project(told):
    names = {kind: [line["line"] for line in lines] for kind, lines in told["lines"].items()}
    assert names == {
        "matrix products": ["radlads_jax/models/rwkv.py:40"],
        "copies": ["pallas_kernels/wkv7/api.py:99", "(the compiler's own)"],
        "elementwise, reductions": ["radlads_jax/distill/step.py:12"],
    }
    assert told["lines"]["copies"][0]["largest"].startswith("f32[16,8]")


def test_as_tables(told, capsys):
    show_where({"topology": "v6e:2x4", "stage": "stage2"} | told, Console(width=160))
    said = capsys.readouterr().out
    assert "pallas_kernels/wkv7/api.py:99" in said and "f32[16,8]" in said and "T(8,128)" not in said
