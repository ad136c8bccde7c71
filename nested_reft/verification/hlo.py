"""The text of an optimised XLA program as data, and how often each of its instructions runs.

Programs for a TPU name layouts and memory spaces, and come as `compiled.as_text()`. In their entry the order of the
instructions is that in which they run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A type such as `bf16[12,64]{1,0:T(8,128)}`: dtype, dimensions, and the layout where it is given.
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?(%[\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?(%[\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%[\w.\-]+")
# These attributes name computations of their own, which hold more instructions.
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(?:%[\w.\-]+|\{[^{}]*\})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Array:
    """An operand or a result.

    Attributes:
        dtype: as XLA names it.
        shape: its dimensions.
        bytes: that it takes in memory, in whole tiles.
        in_hbm: whether it lies in main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    in_hbm: bool

    @property
    def payload(self) -> int:
        """Bytes of its numbers alone."""
        return math.prod(self.shape) * _bits(self.dtype) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: what it does; of a custom call, its target.
        results: one array, or those of a tuple.
        operands: names of instructions of the same computation.
        parameter: its number, where the instruction is one.
        called: computations that it names.
        is_root: whether it is the computation's result.
        attributes: the rest of its text.
    """

    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    parameter: int | None
    called: tuple[str, ...]
    is_root: bool
    attributes: str


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        computations: by name; each has its instructions by name.
        entry: where it starts.
    """

    computations: dict[str, Computation]
    entry: str


@dataclass(frozen=True)
class Run:
    """An instruction of the program's control flow; what is fused belongs to the fusion.

    Attributes:
        computation: that it is in.
        name: of the instruction.
        instruction: itself.
        times: how often it runs.
        loops: those around it, outermost first.
    """

    computation: str
    name: str
    instruction: Instruction
    times: float
    loops: tuple[str, ...]


def parse(hlo: str) -> Program:
    """Reads the text of a program.

    Args:
        hlo: `compiled.as_text()`.

    Raises:
        ValueError: the text is not that of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            # The program starts in the one computation that is marked ENTRY.
            entry = header[2] if header[1] else entry
        elif current is not None and (start := _INSTRUCTION.match(line)):
            current[start[2]] = _instruction(line[start.end() :], start[1] is not None)
    if not entry:
        raise ValueError("this text has no ENTRY computation; it must be that of compiled.as_text()")
    return Program(computations, entry)


def executed(program: Program, open_loops: Sequence[int] = (), branch_counts: Sequence[int] = ()) -> Iterator[Run]:
    """Every instruction that runs, with how often it does.

    Args:
        program: of `parse`.
        open_loops: how often the bodies of those loops of the entry run whose end depends on data, in their order.
        branch_counts: how often each branch runs of the conditionals that have as many branches, as a plan's counts
            say. Each branch of another conditional counts as an equal share.

    Raises:
        ValueError: the entry has another number of such loops.
    """
    loops = [name for name, i in program.computations[program.entry].items() if i.opcode == "while"]
    unknown = [name for name in loops if trip_count(program, program.computations[program.entry][name]) is None]
    if len(unknown) != len(open_loops):
        raise ValueError(
            f"the program has {len(unknown)} loops whose end depends on data ({', '.join(unknown)}), and"
            f" {len(open_loops)} counts were given"
        )
    counts = dict(zip(unknown, open_loops, strict=True))
    yield from _executed(program, program.entry, 1.0, (), counts, branch_counts)


def _executed(
    program: Program,
    computation: str,
    times: float,
    loops: tuple[str, ...],
    open_loops: dict[str, int],
    branch_counts: Sequence[int],
) -> Iterator[Run]:
    for name, i in program.computations[computation].items():
        yield Run(computation, name, i, times, loops)
        inner, shares = loops, [1.0] * len(i.called)
        if i.opcode == "while":
            known = open_loops.get(name) if computation == program.entry else None
            trips = trip_count(program, i) if known is None else known
            # A loop within a loop whose end depends on data counts once, as in XLA's cost analysis.
            shares, inner = [float(1 if trips is None else trips)] * len(i.called), (*loops, name)
        elif i.opcode == "conditional":
            total = sum(branch_counts) if len(branch_counts) == len(i.called) else 0
            shares = [n / total for n in branch_counts] if total else [1 / len(i.called)] * len(i.called)
        elif i.opcode not in ("call", "async-start"):
            continue
        for called, share in zip(i.called, shares, strict=True):
            yield from _executed(program, called, times * share, inner, open_loops, branch_counts)


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where its end depends on data.

    Args:
        program: that has the loop.
        loop: a `while`.
    """
    if known := _TRIPS.search(loop.attributes):
        return int(known[1])
    # A TPU's compiler leaves the count out. A loop that counts from 0 ends by one comparison with a constant.
    named = re.search(r"\bcondition=(%[\w.\-]+)", loop.attributes)
    condition = program.computations[named[1]] if named else {}
    root = next((i for i in condition.values() if i.is_root), None)
    while root is not None and root.opcode in ("copy", "bitcast"):
        root = condition[root.operands[0]]
    if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    limit = condition[root.operands[1]]
    value = re.match(r"constant\((\d+)\)", limit.attributes)
    return int(value[1]) if value else None


def _instruction(text: str, is_root: bool) -> Instruction:
    """One instruction, of the text behind its `%name = `: `type opcode(operands), attributes`."""
    # The type of several results is a tuple in parentheses, and may hold spaces.
    type_end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    opening = text.index("(", type_end)
    closing = _closing(text, opening)
    opcode, inside = text[type_end:opening].strip(), text[opening + 1 : closing]
    attributes = text[closing + 1 :]
    if opcode == "custom-call":
        target = re.search(r'custom_call_target="(\w+)"', text)
        opcode = target[1] if target else opcode
    if opcode == "constant":
        attributes = f"constant({inside}){attributes}"
    is_parameter = opcode == "parameter"
    return Instruction(
        opcode=opcode,
        results=tuple(_array(*match) for match in _ARRAY.findall(text[:type_end])),
        operands=() if is_parameter else tuple(_NAME.findall(inside)),
        parameter=int(inside) if is_parameter else None,
        called=tuple(name for attribute in _CALLED.findall(attributes) for name in _NAME.findall(attribute)),
        is_root=is_root,
        attributes=attributes,
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _array(dtype: str, dimensions: str, layout: str) -> Array:
    """Size of an array such as `bf16[12,64]{1,0:T(8,128)(2,1)S(1)}`: the last dimensions fill whole tiles."""
    order, _, tiling = layout.partition(":")
    shape = tuple(int(size) for size in dimensions.split(",") if size)
    # A layout lists the fastest axis first, so it is turned around.
    physical = [shape[int(axis)] for axis in reversed(order.split(","))] if order else list(shape)
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    if tile and shape:
        sizes = [int(size) for size in tile[1].split(",")][-len(physical) :]
        # Memory is taken in whole tiles, and the last dimensions are rounded up to them.
        padded = [-(-size // unit) * unit for size, unit in zip(physical[-len(sizes) :], sizes, strict=True)]
        physical = physical[: -len(sizes)] + padded
    return Array(dtype, shape, math.prod(physical) * max(1, _bits(dtype) // 8), in_hbm="S(" not in tiling)


def _bits(dtype: str) -> int:
    # A truth value takes a byte, and the name of any other type holds its bits.
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
