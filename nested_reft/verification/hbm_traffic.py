"""Bytes that an optimised XLA program moves through a TPU's main memory (HBM), read from its text.

XLA's own `bytes accessed` is an upper bound that no program of ours reaches: it counts operands in the
on-chip vector memory (layouts with `S(1)`) like those in HBM, and an asynchronous copy of X bytes as
4 X, for its start returns the source's buffer beside the destination and its end names the destination
again. The floor of a decode step is about HBM, so this counts what crosses HBM and nothing else:

- an array counts where its layout names no other memory space, padded to its tiles;
- each instruction reads its operands and writes its results once;
- operands that a fusion only slices or gathers from count as what it takes;
- `dynamic-update-slice` writes the update, for XLA has made it in-place by then;
- an asynchronous copy reads its source and writes its destination once.

Everything else counts whole. Loops of the program itself count as often as we are told, and loops within loops
once, as in XLA's cost analysis. A conditional counts as the mean of its branches where we are told how often each
runs, and else as its largest.
"""

from __future__ import annotations

from collections.abc import Sequence

from nested_reft.verification.hlo import Computation, Instruction, parse

# These only rename a buffer, or a part of one.
_ALIASES = {"bitcast", "get-tuple-element", "tuple", "optimization-barrier", "ConcatBitcast"}
# These move no bytes of HBM themselves: what they hold is read by whoever uses it.
_FREE = _ALIASES | {"parameter", "constant", "iota", "after-all", "partition-id", "replica-id", "AllocateBuffer"}
_TAKES_PART = {"slice", "dynamic-slice", "gather"}
_WHOLE = 2**62  # more bytes than any array has


def hbm_bytes(hlo: str, branch_counts: Sequence[int] = (), loop_steps: int = 1) -> int:
    """Bytes read from and written to HBM by a program, given as `compiled.as_text()`.

    Args:
        hlo: text of the optimised program, which names layouts.
        branch_counts: how often each branch runs of the conditionals that have as many branches. A step of a plan
            with several parts is a conditional, and the plan says how many steps take each branch.
        loop_steps: how often the bodies of the program's own loops run: the steps of a plan.

    Returns:
        Bytes per device of one run of the program.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    program = parse(hlo)
    computations, entry = program.computations, program.computations[program.entry]
    moved = 0
    for i in entry.values():
        runs = loop_steps if i.opcode == "while" else 1
        moved += runs * instruction_bytes(computations, entry, i, branch_counts)
    return moved


def _computation_bytes(computations: dict[str, Computation], name: str, counts: Sequence[int]) -> int:
    computation = computations[name]
    return sum(instruction_bytes(computations, computation, i, counts) for i in computation.values())


def instruction_bytes(
    computations: dict[str, Computation], computation: Computation, i: Instruction, counts: Sequence[int] = ()
) -> int:
    """Bytes that one run of an instruction moves through HBM.

    Args:
        computations: of the program, by name.
        computation: that the instruction is in.
        i: the instruction.
        counts: as `hbm_bytes` takes `branch_counts`.
    """
    # The end of an asynchronous copy moves nothing; its start has been counted.
    if i.opcode in _FREE or i.opcode.endswith("-done"):
        return 0
    # A loop's condition and body add up, while only one branch of a conditional runs.
    if i.opcode in ("while", "call", "conditional"):
        called = [_computation_bytes(computations, name, counts) for name in i.called]
        if i.opcode != "conditional":
            return sum(called)
        if len(counts) != len(called):
            return max(called)
        return round(sum(moved * count for moved, count in zip(called, counts, strict=True)) / sum(counts))
    operands = [computation[name].results for name in i.operands]
    if i.opcode in ("copy-start", "slice-start"):
        # A copy's start lists its destination first, a slice's start after its operands. The slice reads only as many
        # bytes as it writes.
        source, destination = operands[0][0], i.results[0 if i.opcode == "copy-start" else 1]
        return destination.bytes * (source.in_hbm + destination.in_hbm)
    read = sum(
        # A tuple has several arrays, of which each counts whole.
        min(array.bytes, _read_of_operand(computations, i, k) if len(arrays) == 1 else _WHOLE)
        for k, arrays in enumerate(operands)
        for array in arrays
        if array.in_hbm
    )
    written = sum(
        array.bytes if update is None else update
        for array, update in zip(i.results, _updates(computations, computation, i), strict=True)
        if array.in_hbm
    )
    return read + written


def _read_of_operand(computations: dict[str, Computation], i: Instruction, k: int) -> int:
    """Bytes that an instruction takes of its operand `k`; `_WHOLE` stands for all of it."""
    if i.opcode == "fusion":
        body = computations[i.called[0]]
        # Inside a fusion the operand is the parameter of the same number.
        name = next(name for name, inner in body.items() if inner.parameter == k)
        return _read_inside(computations, body, name)
    if k == 0 and i.opcode in _TAKES_PART:
        return sum(array.bytes for array in i.results)
    # The array that is updated in place is not read; only the update is.
    return 0 if k == 0 and i.opcode == "dynamic-update-slice" else _WHOLE


def _read_inside(computations: dict[str, Computation], body: Computation, name: str) -> int:
    """Bytes that a fusion's body takes of one of its values."""
    # A value that the fusion returns as it is was read whole.
    total = _WHOLE if body[name].is_root else 0
    for user_name, user in body.items():
        for k, operand in enumerate(user.operands):
            if operand == name and user.opcode in _ALIASES:
                total += _read_inside(computations, body, user_name)
            elif operand == name:
                total += _read_of_operand(computations, user, k)
    return total


def _updates(computations: dict[str, Computation], computation: Computation, i: Instruction) -> list[int | None]:
    """For each result, the bytes of the in-place update that makes it, or None where it is written whole."""
    if i.opcode == "dynamic-update-slice":
        return [computation[i.operands[1]].results[0].bytes]
    if i.opcode != "fusion":
        return [None] * len(i.results)
    body = computations[i.called[0]]
    root = next(inner for inner in body.values() if inner.is_root)
    # A fusion with several results has a tuple as its root, one entry for each.
    makers = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    makers = [_unaliased(body, maker) for maker in makers]
    return [update for maker in makers for update in _updates(computations, body, maker)]


def _unaliased(body: Computation, i: Instruction) -> Instruction:
    while i.opcode == "bitcast":
        i = body[i.operands[0]]
    return i
