"""What an optimised XLA program does per device, counted in its text: products, bytes through HBM, and collectives.

XLA's own cost analysis counts the body of a loop once. Here each instruction counts as often as it runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nested_reft.verification.hbm_traffic import instruction_bytes
from nested_reft.verification.hlo import Array, Computation, Instruction, Program, executed, parse

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CONTROL = ("while", "call", "conditional")


@dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        result: the arrays that it leaves on each device, as text.
        bytes: of the whole value: what is gathered, reduced or moved, before it is scattered.
        over: axes of the mesh along which the devices of a group differ.
        group: devices that exchange with one another.
        slices: slices that a group has devices of.
        times: how often it runs.
        loops: how many loops it is in.
        name: where it comes from in the traced program.
    """

    kind: str
    result: str
    bytes: int
    over: tuple[str, ...]
    group: int
    slices: int
    times: float
    loops: int
    name: str

    @property
    def ici_bytes(self) -> float:
        """Bytes that a device sends to others of its slice, over all runs, by the best known way (a ring)."""
        return self.times * self.bytes * self._share(self.group // self.slices)

    @property
    def dcn_bytes(self) -> float:
        """Bytes that a device sends to other slices, over all runs; devices of a slice share the value between them."""
        share = self._share(self.slices)
        return self.times * self.bytes * share / max(self.group // self.slices, 1)

    def _share(self, devices: int) -> float:
        """Of the whole value, what one of so many devices sends."""
        if devices < 2:
            return 0.0
        if self.kind == "collective-permute":
            return 1.0
        # A sum is scattered and then gathered.
        return (2 if self.kind == "all-reduce" else 1) * (devices - 1) / devices


@dataclass(frozen=True)
class ProgramCosts:
    """What one run of a program does, per device.

    Attributes:
        flops: of its matrix products, two for each multiplication.
        hbm_bytes: read from and written to main memory.
        collectives: each with how often it runs.
    """

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]


def program_costs(
    hlo: str, mesh: Mapping[str, int], open_loops: Sequence[int] = (), branch_counts: Sequence[int] = ()
) -> ProgramCosts:
    """Counts what a program does.

    Args:
        hlo: `compiled.as_text()`.
        mesh: sizes of its axes by name, in the order in which they number its devices. Between devices that differ
            along `slice` is the slow connection.
        open_loops, branch_counts: as `hlo.executed` takes them.

    Raises:
        ValueError: the text is of no compiled program, or of one with another number of such loops.
    """
    program = parse(hlo)
    flops, moved, found = 0.0, 0.0, []
    seen = set()
    product = {name: _computation_flops(program, name) for name in program.computations}
    for run in executed(program, open_loops, branch_counts):
        i, computation = run.instruction, program.computations[run.computation]
        if i.opcode in _CONTROL:
            continue
        # The steps of a collective that runs beside others are fused with them, and share a channel.
        for inner, name in _within(program, run.name, i):
            if between := _between_slices(inner, mesh, run.times, len(run.loops)):
                found.append(between)
            kind = _kind(inner)
            if kind is None:
                continue
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            key = (run.computation, kind, channel[1] if channel else name)
            if key not in seen:
                seen.add(key)
                found.append(_collective(kind, inner, mesh, run.times, len(run.loops)))
        flops += run.times * (_flops(computation, i) + sum(product[name] for name in _fused(i)))
        moved += run.times * instruction_bytes(program.computations, computation, i)
    return ProgramCosts(flops, moved, tuple(found))


def _within(program: Program, name: str, i: Instruction) -> Iterator[tuple[Instruction, str]]:
    """The instruction, and all that is fused into it, with their names."""
    yield i, name
    for called in _fused(i):
        for inner_name, inner in program.computations[called].items():
            yield from _within(program, inner_name, inner)


def _fused(i: Instruction) -> tuple[str, ...]:
    return i.called if i.opcode in ("fusion", "map") else ()


def _kind(i: Instruction) -> str | None:
    kind = i.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _collective(kind: str, i: Instruction, mesh: Mapping[str, int], times: float, loops: int) -> Collective:
    groups = _groups(i.attributes, math.prod(mesh.values()))
    # What starts a collective returns its operands beside its results.
    arrays = i.results
    if i.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(i.operands) : 2 * len(i.operands)]
    size = sum(array.payload for array in arrays)
    over = {axis for group in groups for axis in _axes_between(group, mesh)}
    slices = mesh.get("slice", 1) if "slice" in over else 1
    name = re.search(r'op_name="([^"]*)"', i.attributes)
    return Collective(
        kind=kind,
        result=" ".join(f"{array.dtype}{list(array.shape)}".replace(" ", "") for array in arrays),
        bytes=size * len(groups[0]) if kind == "reduce-scatter" else size,
        over=tuple(axis for axis in mesh if axis in over),
        group=len(groups[0]),
        slices=min(slices, len(groups[0])),
        times=times,
        loops=loops,
        name=name[1] if name else "",
    )


def _between_slices(i: Instruction, mesh: Mapping[str, int], times: float, loops: int) -> Collective | None:
    """What a TPU sends to other slices, which its compiler writes as a transfer to the host; None of anything else."""
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
    if i.opcode != "send" or transfer is None:
        return None
    kind, slices, array = transfer[1].lower().replace("_", "-"), mesh["slice"], i.results[0]
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
    return Collective(
        kind=kind,
        result=f"{array.dtype}{list(array.shape)}".replace(" ", ""),
        bytes=array.payload * (slices if kind == "all-gather" else 1),
        over=("slice",),
        group=slices,
        slices=slices,
        times=times,
        loops=loops,
        name=name[1] if name else "",
    )


def _axes_between(group: Sequence[int], mesh: Mapping[str, int]) -> set[str]:
    """The axes along which some devices of a group differ."""
    places = [np.unravel_index(device, tuple(mesh.values())) for device in group]
    return {axis for axis, at in zip(mesh, zip(*places, strict=True), strict=True) if len(set(at)) > 1}


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Devices that exchange with one another, in any of the ways in which XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        # A part of an axis is written as `'axis':(major)size`; it is taken whole, which no program here asks for.
        return _by_axes(axes, re.findall(r"'([^']*)'", named[2]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, order = [int(n) for n in iota[2].split(",")], iota[3]
        flat = _transposed(shape, [int(n) for n in order.split(",")] if order else list(range(len(shape))))
        size = int(iota[1].split(",")[-1])
        return [flat[start : start + size] for start in range(0, len(flat), size)]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [list(range(devices))]


def _by_axes(axes: dict[str, int], over: Sequence[str]) -> list[list[int]]:
    """Devices of a mesh that differ along some of its axes only."""
    groups = defaultdict(list)
    for device, place in enumerate(itertools.product(*(range(size) for size in axes.values()))):
        groups[tuple(at for name, at in zip(axes, place, strict=True) if name not in over)].append(device)
    return list(groups.values())


def _transposed(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """The numbers of an array of a shape, counted up, in the order that a transposition gives them."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    places = itertools.product(*(range(shape[axis]) for axis in order))
    return [sum(at * strides[axis] for at, axis in zip(place, order, strict=True)) for place in places]


def _computation_flops(program: Program, name: str) -> float:
    body = program.computations[name]
    return sum(
        _flops(body, i) + sum(_computation_flops(program, called) for called in _fused(i)) for i in body.values()
    )


def _flops(computation: Computation, i: Instruction) -> float:
    """Operations of one matrix product; 0 of any other instruction."""
    if i.opcode == "dot":
        (left, *_), contracted = (
            computation[i.operands[0]].results,
            re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes),
        )
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2.0 * math.prod(i.results[0].shape) * math.prod(left.shape[axis] for axis in axes)
    if i.opcode == "convolution":
        left, right = (computation[name].results[0] for name in i.operands)
        return _convolution_flops(left, right, i.results[0], i.attributes)
    return 0.0


def _convolution_flops(left: Array, right: Array, result: Array, attributes: str) -> float:
    """A TPU's compiler writes products as convolutions, and batches of them as windows that hit one entry each."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None, "a convolution names its dimensions"
    lhs, rhs, out = labels.groups()
    flops = 2.0 * result.shape[out.index("b")] * result.shape[out.index("f")] * right.shape[rhs.index("i")]
    window = re.search(r"window=\{([^}]*)\}", attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    for axis in range(len(lhs) - 2):
        label = str(axis)

        def option(name: str, default: str, axis: int = axis) -> str:
            return options[name].split("x")[axis] if name in options else default

        size, stride = int(option("size", "1")), int(option("stride", "1"))
        low = int(option("pad", "0_0").split("_")[0])
        spread, apart = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
        length = (left.shape[lhs.index(label)] - 1) * spread + 1
        # Only pairs of an output and a window's place that meet an entry of the input multiply.
        places = (
            at * stride - low + within * apart for at in range(result.shape[out.index(label)]) for within in range(size)
        )
        flops *= sum(0 <= place < length and place % spread == 0 for place in places)
    return flops
