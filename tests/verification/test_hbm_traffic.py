"""Bytes through main memory, by hand, in programs as XLA writes them for a TPU."""

import pytest

from nested_reft.verification.hbm_traffic import hbm_bytes

PROGRAM = """HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%slice_of (p: bf16[4,16,128], i: s32[]) -> bf16[16,128] {
  %p = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %part = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,16,128}
  ROOT %flat = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%part)
}

%dot (w: bf16[4,16,128], x: f32[8,16], i: s32[]) -> f32[8,128] {
  %w = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} parameter(1)
  %i.1 = s32[]{:T(128)S(6)} parameter(2)
  %layer = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%w, %i.1), kind=kLoop, calls=%slice_of
  ROOT %convolution = f32[8,128]{1,0:T(8,128)S(1)} convolution(%x, %layer), dim_labels=bf_io->bf
}

ENTRY %main (W: bf16[4,16,128], X: f32[8,16], I: s32[], C: f32[32,128]) -> (f32[8], f32[32,128]) {
  %W = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="w"}
  %X = f32[8,16]{1,0:T(8,128)} parameter(1)
  %I = s32[]{:T(128)S(6)} parameter(2)
  %C = f32[32,128]{1,0:T(8,128)} parameter(3)
  %copy-start = (f32[32,128]{1,0:T(8,128)S(1)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%C)
  %y = f32[8,128]{1,0:T(8,128)S(1)} fusion(%W, /*index=1*/%X, %I), kind=kOutput, calls=%dot
  %zero.1 = f32[]{:T(128)} constant(0)
  %total = f32[8]{0:T(128)} reduce(%y, %zero.1), dimensions={1}, to_apply=%sum
  %copy-done = f32[32,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %row = f32[8,128]{1,0:T(8,128)} copy(%y)
  %updated = f32[32,128]{1,0:T(8,128)} dynamic-update-slice(%C, %row, %I, %I)
  ROOT %result = (f32[8]{0:T(128)}, f32[32,128]{1,0:T(8,128)}) tuple(%total, %updated)
}
"""


def test_each_rule_by_hand():
    prefetch = 32 * 128 * 4  # once, though its start has two arrays and its end another
    dot = 16 * 128 * 2 + 8 * 128 * 4  # one layer of the stack, and x, whose 16 columns fill tiles of 128
    reduce = 4 + 128 * 4  # a scalar, and 8 results in a tile of 128; its operand is on the chip
    copy = 8 * 128 * 4  # written; read from the chip
    update = 8 * 128 * 4 + 8 * 128 * 4  # read and written in place; the other 24 rows stay
    assert hbm_bytes(PROGRAM) == prefetch + dot + reduce + copy + update


def test_any_other_use_of_a_stack_counts_whole():
    text = PROGRAM.replace("ROOT %flat = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%part)", "ROOT %all = add(%p, %p)")
    text = text.replace("ROOT %all = add", "ROOT %all = bf16[4,16,128]{2,1,0} add")
    assert hbm_bytes(text) - hbm_bytes(PROGRAM) == 3 * 16 * 128 * 2


BRANCHES = """HloModule choose, is_scheduled=true

%once (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.a = f32[8,128]{1,0:T(8,128)} copy(%a)
}

%twice (b: f32[8,128]) -> f32[8,128] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy.b = f32[8,128]{1,0:T(8,128)} copy(%b)
  ROOT %copy.c = f32[8,128]{1,0:T(8,128)} copy(%copy.b)
}

%never (d: f32[8,128]) -> f32[8,128] {
  ROOT %d = f32[8,128]{1,0:T(8,128)} parameter(0)
}

ENTRY %main (I: s32[], X: f32[8,128]) -> f32[8,128] {
  %I = s32[]{:T(128)S(6)} parameter(0)
  %X = f32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %chosen = f32[8,128]{1,0:T(8,128)} conditional(%I, %X, %X, %X), BRANCHES_OF_IT
}
"""


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%once, %twice, %never}", "true_computation=%twice, false_computation=%once"],
)
def test_a_conditional_counts_as_its_largest_branch(branches):
    """Two copies, each read and written. Branches that are not found would make 0, all of them added up 6 arrays."""
    assert hbm_bytes(BRANCHES.replace("BRANCHES_OF_IT", branches)) == 4 * 8 * 128 * 4


@pytest.mark.parametrize(
    ("counts", "arrays"),
    [
        ((1, 2, 3), (1 * 2 + 2 * 4 + 3 * 0) / 6),
        ((0, 0, 1), 0),
        ((5, 3), 4),  # of another choice
    ],
)
def test_a_conditional_counts_each_branch_as_often_as_it_runs(counts, arrays):
    text = BRANCHES.replace("BRANCHES_OF_IT", "branch_computations={%once, %twice, %never}")
    assert hbm_bytes(text, counts) == round(arrays * 8 * 128 * 4)


def test_a_loop_counts_as_often_as_it_runs():
    """A copy in its body, read and written; its condition reads a number from the chip."""
    text = """HloModule loop, is_scheduled=true

%body (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.a = f32[8,128]{1,0:T(8,128)} copy(%a)
}

%condition (b: f32[8,128]) -> pred[] {
  %b = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %no = pred[]{:T(128)S(6)} constant(false)
}

ENTRY %main (X: f32[8,128]) -> f32[8,128] {
  %X = f32[8,128]{1,0:T(8,128)} parameter(0)
  %copy.x = f32[8,128]{1,0:T(8,128)} copy(%X)
  ROOT %loop = f32[8,128]{1,0:T(8,128)} while(%copy.x), condition=%condition, body=%body
}
"""
    once = 2 * 8 * 128 * 4
    assert hbm_bytes(text) == once + once
    assert hbm_bytes(text, loop_steps=5) == once + 5 * once


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hbm_bytes("HloModule nothing")
