"""Update speed beside a plain transformers/torch GRPO step on the same tokens, and against its floor.

    python -m experiments.benchmarks.updates [--json FILE]

One optimizer step on 8 prompts x 8 completions, 53 + 12 tokens, SmolLM2-135M on the CPU. Ours runs each
prompt once per group, the plain step once per completion. The floor is our matrix products, forward and twice
backward (once for adapters, as the other weights need no gradient), at the measured float32 rate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from experiments.arguments import add_list, command
from experiments.benchmarks.ceilings import ceilings_of
from experiments.benchmarks.common import (
    cost_cells,
    disturbance,
    measured,
    parser,
    plain,
    shown,
    spec_maker,
    write_results,
)
from experiments.benchmarks.floors import Ceilings, ratio, update_floor, update_tokens
from experiments.benchmarks.our_updates import VARIANTS
from experiments.benchmarks.peers import TORCH, System
from experiments.benchmarks.worker import Case
from nested_reft.models.config import ModelConfig
from nested_reft.reports.tables import table

OURS = System("ours", "our_updates")
PLAIN = System("plain torch", "peer_torch_update", *TORCH)
PEERS = {"torch": (PLAIN, ("float32", "bfloat16"))}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    options = parser("updates", __doc__, PEERS)
    add_list(options, "--ours", VARIANTS, nargs="*", choices=VARIANTS, help="our variants")
    known = options.parse_args(arguments)
    case = Case(prompts=8, group=8, prompt_tokens=53, new_tokens=12)
    shape, spec = spec_maker(known)
    ceilings = ceilings_of(shape, jnp.float32)(update_tokens(case, shared_prompt=True))
    rows = [row for variant in known.ours for row in measured(OURS, spec(variant, [case]))]
    for name in known.peers:
        system, variants = PEERS[name]
        rows += [row for variant in variants for row in measured(system, spec(variant, [case]))]
    rows = compared(rows, shape, ceilings)
    print(f"\n{update_table(rows)}\n{disturbance(rows)}")
    print(f"\nfloat32 matrix products: {ceilings.flops / 1e9:.0f} GFLOP/s")
    write_results(known, {"threads": known.threads, "flops": ceilings.flops, "rows": plain(rows)})


def compared(rows: Sequence[dict[str, Any]], shape: ModelConfig, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows with how many times faster ours are, and ours with their floor.

    Args:
        rows: of all systems.
        shape: of the model.
        ceilings: of the machine, at the number of rows that our layers run.
    """
    ours = {row["variant"]: row.get("seconds") for row in rows if row["system"] == OURS.title}
    found = []
    for row in rows:
        seconds, is_ours = row.get("seconds"), row["system"] == OURS.title
        against = {
            "tokens": update_tokens(row["case"], shared_prompt=is_ours),
            "ours_float32_ratio": ratio(seconds, ours.get("float32")),
            "floor_seconds": None,
            "share_of_floor": None,
        }
        # The ceilings are those of float32 products.
        if is_ours and row["variant"].startswith("float32"):
            stages = update_floor(shape, row["case"], ceilings, trains_all="LoRA" not in row["variant"])
            floor = sum(stages.values())
            against |= {"floor_seconds": floor, "share_of_floor": ratio(floor, seconds)}
        found.append(row | against)
    return found


def update_table(rows: Sequence[dict[str, Any]]) -> str:
    """All systems on the one workload.

    Args:
        rows: what `compared` returned.
    """
    header = [
        "one update",
        "seconds",
        "tokens run",
        "ours float32 is",
        "floor s",
        "share of floor",
        "first call s",
        "compile s (count)",
        "peak GB",
    ]
    cells = []
    for row in rows:
        name = f"{row['system']} {row['variant']}"
        if "skipped" in row:
            cells.append([name, f"skipped: {row['skipped']}", *[""] * 7])
            continue
        cells.append(
            [
                name,
                f"{row['seconds']:.2f}",
                row["tokens"],
                f"{shown(row['ours_float32_ratio'])}x",
                shown(row["floor_seconds"]),
                shown(row["share_of_floor"]),
                *cost_cells(row),
            ]
        )
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
