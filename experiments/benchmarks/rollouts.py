"""Rollout speed beside Tunix, transformers and llama.cpp, and by skip ratio: SmolLM2-135M on the CPU.

    python -m experiments.benchmarks.rollouts [--new-tokens 128] [--json FILE]

Whole calls (prefill included), temperature 1, full vocabulary, no stop token; every system has the same
weights, prompts and threads, one call to warm up, and the best of the repeats. Decode steps alone are a
call less one that draws a single token; llama.cpp's are timed as they are, without drawing tokens.
The floor of ours is its matrix products at the measured rate, or the reading of the weights.
Ratios compare rows of this run; other programs on the machine spoil them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from experiments.arguments import add_list, command
from experiments.benchmarks.ceilings import ceilings_of, sampling_seconds
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
from experiments.benchmarks.floors import CeilingsAt, decode_rate, predicted_speedup, ratio, rollout_floor
from experiments.benchmarks.ours import VARIANTS, add_skip_ratios, check_skip_ratios, plan_of
from experiments.benchmarks.peers import TORCH, System
from experiments.benchmarks.worker import Case
from nested_reft.cli.arguments import whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.layer_plan import PlanShape
from nested_reft.models.config import ModelConfig
from nested_reft.reports.tables import table

OURS = System("ours", "ours")
TRANSFORMERS = System("transformers", "peer_transformers", *TORCH)
TUNIX = System("Tunix Sampler", "peer_tunix", "tunix", ("google-tunix==0.1.7",))
LLAMA_CPP = System("llama.cpp decode", "peer_llama_cpp", "llama_cpp", ("llama-cpp-python==0.3.36",))
PEERS = {
    "tunix": (TUNIX, ("float32", "bfloat16")),
    "transformers": (TRANSFORMERS, ("float32", "bfloat16")),
    "llama.cpp": (LLAMA_CPP, ("Q4_1",)),
}
SKIP_RATIOS = (0.05, 0.1, 0.15, 0.3, 0.5)
WORKLOADS = {"1": (1, 1), "16": (16, 1), "64": (64, 1), "8x8": (8, 8)}
"""Name -> prompts, completions of each."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    options = parser("rollouts", __doc__, PEERS)
    options.add_argument("--new-tokens", type=whole(2), default=32, help="C")
    options.add_argument("--prompt-tokens", type=whole(1), default=64, help="P")
    add_list(options, "--workloads", WORKLOADS, choices=WORKLOADS)
    add_list(options, "--ours", VARIANTS, choices=VARIANTS, help="our precisions")
    add_skip_ratios(options, SKIP_RATIOS, nargs="*")
    add_list(options, "--nested", ("float32",), choices=VARIANTS, help="precisions of nested plans")
    options.add_argument("--bridged", action="store_true", help="bridges stand in for the layers that plans skip")
    known = options.parse_args(arguments)
    cases = [Case(*WORKLOADS[name], known.prompt_tokens, known.new_tokens) for name in known.workloads]
    shape, spec = spec_maker(known)
    if known.prompt_tokens + known.new_tokens > shape.max_positions:
        options.error(f"--prompt-tokens + --new-tokens must be at most {shape.max_positions}: the model's positions")
    # What cannot work is refused here: the systems before our nested rows take minutes.
    with checking_input():
        check_skip_ratios(known.skip_ratios, cases[0], shape.num_layers)
    ceilings = {dtype: ceilings_of(shape, jnp.dtype(dtype)) for dtype in ("float32", "bfloat16")}
    rows = []
    for variant in known.ours:
        skip_ratios = known.skip_ratios if variant in known.nested else ()
        rows += measured(OURS, spec(variant, our_cases(cases, skip_ratios, known.bridged)))
    for name in known.peers:
        system, variants = PEERS[name]
        for variant in variants:
            rows += measured(system, spec(variant, cases))
    add_rates(rows)
    add_floors(rows, shape, ceilings)
    print(f"\n{speed_table(cases, rows)}\n{disturbance(rows)}\n")
    drawing = {case.rows: sampling_seconds(case.rows, shape.vocab_size) for case in cases}
    nested = [
        row
        for case in cases
        for variant in known.nested
        for row in nested_rows(shape, case, variant, ceilings.get(variant), drawing[case.rows], rows)
    ]
    if nested:
        print(nested_table(nested))
    write_results(known, {"threads": known.threads, "rows": plain(rows), "nested": plain(nested)})


def our_cases(cases: Sequence[Case], skip_ratios: Sequence[float], bridged: bool = False) -> list[Case]:
    """Each workload with all layers, with one token (to take from it), and with each share skipped."""
    shorter = [dataclasses.replace(case, new_tokens=1) for case in cases]
    nested = [
        dataclasses.replace(case, skip_ratio=skipped, bridged=bridged) for case in cases for skipped in skip_ratios
    ]
    return [*shorter, *cases, *nested]


def add_rates(rows: Sequence[dict[str, Any]]) -> None:
    """Adds tokens per second to the rows: of whole calls, and of decode steps where both are known."""
    first_token = {
        (row["system"], row["variant"], dataclasses.replace(row["case"], new_tokens=1)): row["seconds"]
        for row in rows
        if row["case"].new_tokens == 1 and "seconds" in row
    }
    for row in rows:
        if "seconds" not in row:
            continue
        case = row["case"]
        rate = case.sampled_tokens / row["seconds"]
        if row["system"] == LLAMA_CPP.title:
            row["decode_tokens_per_second"] = rate
            continue
        row["tokens_per_second"] = rate
        short = first_token.get((row["system"], row["variant"], dataclasses.replace(case, new_tokens=1)))
        if short is not None and case.new_tokens > 1:
            row["decode_tokens_per_second"] = decode_rate(case, row["seconds"], short)


def add_floors(rows: Sequence[dict[str, Any]], shape: ModelConfig, ceilings: dict[str, CeilingsAt]) -> None:
    """Adds to our full-model rows the share of the floor that they reach, where their ceilings are measured."""
    for row in rows:
        if row["system"] == OURS.title and row["variant"] in ceilings and "seconds" in row:
            floor = sum(
                rollout_floor(shape, row["case"], PlanShape(shape.num_layers), ceilings[row["variant"]]).values()
            )
            row["share_of_floor"] = None if row["case"].skip_ratio else floor / row["seconds"]


def compared(rows: Sequence[dict[str, Any]], case: Case) -> list[dict[str, Any]]:
    """The rows of one workload, each with how many times faster ours are: in float32, and at best.

    Args:
        rows: of all systems, with their rates.
        case: the workload.
    """
    found = [row for row in rows if row["case"] == case]
    ours = [row for row in found if row["system"] == OURS.title]
    result = []
    for row in found:
        # llama.cpp's calls have no prefill and draw no tokens, so they compare with our decode steps alone.
        measure = "tokens_per_second" if row["system"] != LLAMA_CPP.title else "decode_tokens_per_second"
        rates = {other["variant"]: other.get(measure) for other in ours}
        best = max((rate for rate in rates.values() if rate), default=None)
        against = {
            "ours_float32_ratio": ratio(rates.get("float32"), row.get(measure)),
            "ours_best_ratio": ratio(best, row.get(measure)),
        }
        result.append(row | against)
    return result


def speed_table(cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> str:
    """All systems on each workload.

    Args:
        cases: the workloads, with all layers.
        rows: of all systems, with their rates and floors.
    """
    header = [
        "prompts x completions",
        "system",
        "tokens/s",
        "decode tokens/s",
        "ours float32 is",
        "ours best is",
        "share of floor",
        "first call s",
        "compile s (count)",
        "peak GB",
    ]
    cells = []
    for case in cases:
        for row in compared(rows, case):
            name = f"{row['system']} {row['variant']}"
            workload = f"{case.prompts} x {case.group}, {case.prompt_tokens} + {case.new_tokens}"
            if "skipped" in row:
                cells.append([workload, name, f"skipped: {row['skipped']}", *[""] * 7])
                continue
            cells.append(
                [
                    workload,
                    name,
                    shown(row.get("tokens_per_second"), ".0f"),
                    shown(row.get("decode_tokens_per_second"), ".0f"),
                    f"{shown(row['ours_float32_ratio'])}x",
                    f"{shown(row['ours_best_ratio'])}x",
                    shown(row.get("share_of_floor")),
                    *cost_cells(row),
                ]
            )
    return table(header, cells)


def nested_rows(
    shape: ModelConfig,
    case: Case,
    variant: str,
    ceilings: CeilingsAt | None,
    drawing_seconds: float,
    rows: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """For each share of skipped layers: the speed-up, and how much of the predicted one it is.

    Args:
        shape: of the model.
        case: the workload, with all layers.
        variant: the precision.
        ceilings: of the machine at this precision, by rows; None where they are not measured.
        drawing_seconds: of one draw for all rows, which skipping layers does not shorten.
        rows: of all systems, with their rates.
    """
    mine = {
        row["case"]: row["tokens_per_second"]
        for row in rows
        if row["system"] == OURS.title
        and row["variant"] == variant
        and "tokens_per_second" in row
        and dataclasses.replace(row["case"], skip_ratio=0.0, bridged=False) == case
    }
    full = mine.pop(case, None)
    found = []
    for nested, rate in mine.items():
        plan_shape, speedup = plan_of(nested, shape.num_layers).shape, ratio(rate, full)
        predicted = ceilings and predicted_speedup(shape, case, plan_shape, ceilings, drawing_seconds)
        found.append(
            {
                "case": case,
                "variant": variant,
                "skip_ratio": nested.skip_ratio,
                "kept": plan_shape.kept,
                "bridged": plan_shape.bridged,
                "tokens_per_second": rate,
                "speedup": speedup,
                "predicted": predicted,
                "share": ratio(speedup, predicted),
            }
        )
    return found


def nested_table(nested: Sequence[dict[str, Any]]) -> str:
    """Our rollouts by the share of skipped layers."""
    header = [
        "nested",
        "precision",
        "skip ratio",
        "layers",
        "bridges",
        "tokens/s",
        "speed-up",
        "floor's speed-up",
        "share reached",
    ]
    cells = [
        [
            f"{row['case'].prompts} x {row['case'].group}",
            row["variant"],
            f"{row['skip_ratio']:g}",
            row["kept"],
            row["bridged"],
            shown(row["tokens_per_second"], ".0f"),
            shown(row["speedup"]),
            shown(row["predicted"]),
            shown(row["share"]),
        ]
        for row in nested
    ]
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
