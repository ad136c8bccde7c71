"""The stages of a timed call, what each could take at least, and their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from experiments.benchmarks.common import shown
from nested_reft.compilation import CompileCounter
from nested_reft.reports.tables import table

Best = Callable[[Any], dict[str, Any]]
"""`worker.measure` of a call with a fixed number of repeats."""


@dataclass(frozen=True)
class Stage:
    """A part of a call.

    Attributes:
        name: what it does.
        seconds: of all its repetitions within the call.
        floor_seconds: the least that they can take; None where none is stated.
    """

    name: str
    seconds: float
    floor_seconds: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """A whole call and its stages.

    Attributes:
        name: the call.
        seconds: of the whole.
        stages: its parts; the rest comes last.
        compile_seconds, compilations: of the whole call's program.
        peak_bytes: most memory of this process during it.
    """

    name: str
    seconds: float
    stages: tuple[Stage, ...]
    compile_seconds: float
    compilations: int
    peak_bytes: int


def timed(best: Best, call: Callable[[], Any]) -> dict[str, Any]:
    """What `best` says of a call once its result is there, with its compilations.

    Args:
        best: how it is timed.
        call: returns arrays, which JAX may still be computing.
    """
    counter = CompileCounter()
    found = best(lambda: jax.block_until_ready(call()))
    counter.close()
    return found | {"compile_seconds": counter.seconds, "compilations": counter.count}


def breakdown_table(breakdown: Breakdown) -> str:
    """The stages of one call, its total, and what it cost to compile."""
    cells = [
        [
            stage.name,
            f"{stage.seconds:.3f}",
            f"{stage.seconds / breakdown.seconds:.2f}",
            shown(stage.floor_seconds, ".3f"),
            shown(stage.floor_seconds and stage.floor_seconds / stage.seconds),
        ]
        for stage in breakdown.stages
    ]
    floor = sum(stage.floor_seconds or 0 for stage in breakdown.stages)
    cells.append(["whole", f"{breakdown.seconds:.3f}", "1.00", f"{floor:.3f}", f"{floor / breakdown.seconds:.2f}"])
    rows = table([breakdown.name, "seconds", "share", "floor s", "share of floor reached"], cells)
    return (
        f"{rows}\ncompiled in {breakdown.compile_seconds:.1f} s ({breakdown.compilations} programs);"
        f" peak {breakdown.peak_bytes / 1e9:.1f} GB"
    )


def with_rest(name: str, whole: dict[str, Any], stages: Sequence[Stage]) -> Breakdown:
    """The breakdown of a call; what its stages leave is the rest.

    Args:
        name: the call.
        whole: what `timed` said of it.
        stages: its parts, in the order of the table.
    """
    rest = Stage("the rest", whole["seconds"] - sum(stage.seconds for stage in stages))
    costs = {field: whole[field] for field in ("compile_seconds", "compilations", "peak_bytes")}
    return Breakdown(name, whole["seconds"], (*stages, rest), **costs)
