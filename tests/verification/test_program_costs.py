"""Products, traffic and collectives of programs, counted by hand in text as XLA writes it."""

import pytest

from nested_reft.verification.hlo import executed, parse
from nested_reft.verification.program_costs import program_costs

MESH = {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}

PROGRAM = """HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%dot (w: bf16[16,128], x: bf16[8,16]) -> f32[8,128] {
  %w = bf16[16,128]{1,0} parameter(0)
  %x = bf16[8,16]{1,0} parameter(1)
  ROOT %convolution = f32[8,128]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%layer_condition (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]{1,0}) parameter(0)
  %layers = s32[] constant(5)
  %at = s32[] get-tuple-element(%p), index=0
  ROOT %more = pred[] compare(%at, %layers), direction=LT
}

%layer_body (q: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %q = (s32[], f32[8,128]{1,0}) parameter(0)
  %at.1 = s32[] get-tuple-element(%q), index=0
  %state = f32[8,128]{1,0} get-tuple-element(%q), index=1
  %reduced = f32[8,128]{1,0} all-reduce(%state), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  ROOT %out = (s32[], f32[8,128]{1,0}) tuple(%at.1, %reduced)
}

%token_condition (r: (s32[], f32[8,128], pred[])) -> pred[] {
  %r = (s32[], f32[8,128]{1,0}, pred[]) parameter(0)
  ROOT %running = pred[] get-tuple-element(%r), index=2
}

%token_body (s: (s32[], f32[8,128], pred[])) -> (s32[], f32[8,128], pred[]) {
  %s = (s32[], f32[8,128]{1,0}, pred[]) parameter(0)
  %start = (s32[], f32[8,128]{1,0}) copy(%s)
  %layers_done = (s32[], f32[8,128]{1,0}) while(%start), condition=%layer_condition, body=%layer_body
  ROOT %next = (s32[], f32[8,128]{1,0}, pred[]) copy(%layers_done)
}

ENTRY %main (W: bf16[8,128], X: bf16[8,16], T: (s32[], f32[8,128], pred[])) -> f32[8,128] {
  %W = bf16[8,128]{1,0} parameter(0)
  %X = bf16[8,16]{1,0} parameter(1)
  %T = (s32[], f32[8,128]{1,0}, pred[]) parameter(2)
  %whole = bf16[16,128]{1,0} all-gather(%W), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %y = f32[8,128]{1,0} fusion(%whole, %X), kind=kOutput, calls=%dot
  %sent = f32[8,128]{1,0} all-reduce(%y), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%sum
  %decoded = (s32[], f32[8,128]{1,0}, pred[]) while(%T), condition=%token_condition, body=%token_body
  ROOT %last = f32[8,128]{1,0} get-tuple-element(%decoded), index=1
}
"""


def test_every_instruction_counts_as_often_as_it_runs():
    costs = program_costs(PROGRAM, MESH, open_loops=[3])
    assert costs.flops == 2 * 8 * 16 * 128
    gathered, between, layers = costs.collectives
    # Devices are numbered slice, fsdp, tensor: 0 and 2 differ in fsdp.
    assert (gathered.kind, gathered.over, gathered.times, gathered.loops) == ("all-gather", ("fsdp",), 1, 0)
    assert gathered.ici_bytes == 16 * 128 * 2 / 2  # each device has half already
    assert (between.kind, between.over, between.slices) == ("all-reduce", ("slice",), 2)
    assert (between.ici_bytes, between.dcn_bytes) == (0, 8 * 128 * 4)  # half of it twice: scattered, then gathered
    assert (layers.over, layers.times, layers.loops) == (("tensor",), 3 * 5, 2)
    assert layers.ici_bytes == 15 * 8 * 128 * 4 and layers.dcn_bytes == 0


def test_a_group_over_slices_and_devices_sends_its_share():
    text = PROGRAM.replace("replica_groups=mesh['a'=2,'b'=4] {'a'}", "replica_groups={}")
    between = program_costs(text, MESH, open_loops=[0]).collectives[1]
    assert between.over == ("slice", "fsdp", "tensor") and between.group == 8
    assert between.dcn_bytes == 8 * 128 * 4 / 4  # the four devices of a slice share it
    assert between.ici_bytes == 2 * 8 * 128 * 4 * 3 / 4


def test_loops_without_a_known_end_need_a_count():
    with pytest.raises(ValueError, match=r"1 loops whose end depends on data \(%decoded\), and 0 counts were given"):
        program_costs(PROGRAM, MESH)


def test_batched_products_are_windows_that_hit_one_entry():
    """Four products of [8, 16] with [16, 32], as a TPU's compiler writes them."""
    text = """HloModule m

ENTRY %main (L: bf16[4,8,16], R: bf16[4,16,32]) -> f32[4,8,32] {
  %L = bf16[4,8,16]{2,1,0} parameter(0)
  %R = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %c = f32[4,8,32]{2,1,0} convolution(%L, %R), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert program_costs(text, {"data": 1}).flops == 2 * 4 * 8 * 16 * 32
    plain = text.replace(
        "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", "lhs_batch_dims={0}, lhs_contracting_dims={2}"
    )
    assert program_costs(plain.replace("convolution(", "dot("), {"data": 1}).flops == 2 * 4 * 8 * 16 * 32


def test_steps_of_one_collective_count_once():
    """Where it runs beside other work, its start and its steps stand in several fusions."""
    part = (
        "  %part{n} = bf16[16,128]{{1,0}} all-gather(%w{n}), channel_id=9, replica_groups=[4,2]<=[8], dimensions={{0}}"
    )
    text = "HloModule m\n"
    for n in "12":
        text += f"\n%step{n} (w{n}: bf16[8,128]) -> bf16[16,128] {{\n  %w{n} = bf16[8,128]{{1,0}} parameter(0)\n"
        text += part.format(n=n).replace("  %", "  ROOT %") + "\n}\n"
    text += "\nENTRY %main (W: bf16[8,128]) -> bf16[16,128] {\n  %W = bf16[8,128]{1,0} parameter(0)\n"
    text += "  %a = bf16[16,128]{1,0} fusion(%W), kind=kCustom, calls=%step1\n"
    text += "  ROOT %b = bf16[16,128]{1,0} fusion(%W), kind=kCustom, calls=%step2\n}\n"
    (only,) = program_costs(text, MESH).collectives
    assert only.over == ("tensor",) and only.bytes == 16 * 128 * 2


def test_what_a_tpu_sends_to_another_slice_counts():
    """Its compiler writes a sum over two slices as a transfer to the host and back: each chip sends its share once."""
    named = 'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = f"""HloModule m

ENTRY %main (X: f32[8,128]) -> f32[8,128] {{
  %X = f32[8,128]{{1,0}} parameter(0)
  %first = token[] after-all()
  %send = (f32[8,128]{{1,0}}, u32[], token[]) send(%X, %first), channel_id=2, {named}
  %sent = token[] send-done(%send), channel_id=2, {named}
  %recv = (f32[8,128]{{1,0}}, u32[], token[]) recv(%first), channel_id=1, {named}
  %got = (f32[8,128]{{1,0}}, token[]) recv-done(%recv), channel_id=1, {named}
  ROOT %sum = f32[8,128]{{1,0}} get-tuple-element(%got), index=0
}}
"""
    (only,) = program_costs(text, {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}).collectives
    assert (only.kind, only.over, only.times) == ("all-reduce", ("slice",), 1)
    assert only.dcn_bytes == 8 * 128 * 4 and only.ici_bytes == 0


def test_a_conditional_runs_each_branch_as_often_as_told():
    text = """HloModule m

%one (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} parameter(0)
}

%two (b: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} parameter(0)
}

ENTRY %main (I: s32[], A: f32[8]) -> f32[8] {
  %I = s32[] parameter(0)
  %A = f32[8]{0} parameter(1)
  ROOT %c = f32[8]{0} conditional(%I, %A, %A), branch_computations={%one, %two}
}
"""
    runs = {run.name: run.times for run in executed(parse(text), branch_counts=(3, 1))}
    assert (runs["%a"], runs["%b"]) == (0.75, 0.25)
