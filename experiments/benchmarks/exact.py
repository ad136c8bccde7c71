"""What exact nested rollouts cost beside plain ones of the full model: SmolLM2-135M on the CPU.

    python -m experiments.benchmarks.exact [--rows 1 2 4 8 64] [--skip-ratios 0.3 --bridged] [--json FILE]

Whole calls in float32, random prompts of 64 tokens and completions of 32, all in turn; 64 rows are 8 prompts x 8
completions, fewer are completions of one prompt. Each round drafts some tokens with layers left out and verifies them
with the full model; "accepted" is the share of the tested drafts. A round costs as much as so many plain steps, and
pays from the acceptance on at which it yields as many tokens; bridges of zeros show the cost of real ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.arguments import add_list, command
from experiments.benchmarks.common import (
    MODEL,
    disturbance,
    exported_model,
    parser,
    plain,
    prepare_process,
    write_results,
)
from experiments.benchmarks.ours import VARIANTS, add_skip_ratios, check_skip_ratios, plan_of, prompts_of, rollout_call
from experiments.benchmarks.worker import Case, measure_all
from nested_reft.cli.arguments import whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.models.registry import model_shape
from nested_reft.reports.tables import table
from nested_reft.rollout.exact import ExactRollouts
from nested_reft.rollout.policy import Policy

CASE = Case(prompts=8, group=8, prompt_tokens=64, new_tokens=32)
SKIP_RATIOS = (0.05, 0.1)
DRAFT_LENGTHS = (1, 2, 4)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    options = parser("exact", __doc__)
    add_list(options, "--rows", (64,), type=whole(1), choices=(1, 2, 4, 8, 64), help="completions at once")
    add_skip_ratios(options, SKIP_RATIOS)
    options.add_argument("--bridged", action="store_true", help="bridges stand in for the layers that drafts leave out")
    known = options.parse_args(arguments)
    prepare_process(known.threads)
    # JAX takes its cores when it draws a plan, so the process is prepared before.
    with checking_input():
        check_skip_ratios(known.skip_ratios, CASE, model_shape(MODEL).num_layers)
    policy = VARIANTS["float32"](exported_model()[1])
    rows = []
    for count in known.rows:
        case = CASE if count == CASE.rows else dataclasses.replace(CASE, prompts=1, group=count)
        nested = [dataclasses.replace(case, skip_ratio=r, bridged=known.bridged) for r in known.skip_ratios]
        rows += exact_rows(policy, case, nested, known.repeats)
    print(f"\n{exact_table(rows)}\n{disturbance(rows)}")
    write_results(known, {"threads": known.threads, "rows": plain(rows)})


def exact_rows(
    policy: Policy, case: Case, nested: Sequence[Case], repeats: int, draft_lengths: Sequence[int] = DRAFT_LENGTHS
) -> list[dict[str, Any]]:
    """A row for plain rollouts and one for each plan and number of drafts.

    Args:
        policy: what samples.
        case: the workload.
        nested: the same with the plans that draft.
        repeats: timed calls of each.
        draft_lengths: tokens drafted in a round, each of which compiles.
    """
    cases = [(each, k) for each in nested for k in draft_lengths]
    drafted = [exact_call(policy, each, k) for each, k in cases]
    calls = [rollout_call(policy, case), *drafted]
    found = measure_all([lambda call=call: jax.block_until_ready(call()) for call in calls], repeats)
    rows = [{"system": "ours", "variant": "plain", "case": case, "plain_seconds": found[0]["seconds"]} | found[0]]
    step_seconds = found[0]["seconds"] / case.new_tokens
    for (each, k), call, row in zip(cases, drafted, found[1:], strict=True):
        # Acceptance is a matter of the samples and not of time, so one more call outside the clock tells it.
        result, plan = call(), plan_of(each, policy.num_layers)
        cost = row["seconds"] / int(result.rounds) / step_seconds
        rows.append(
            {
                "system": "ours",
                "variant": f"exact, {k} drafts",
                "case": each,
                "drafts": k,
                "kept": plan.shape.kept,
                "bridged": plan.shape.bridged,
                "accepted": float(result.accepted / result.tested),
                "round_cost": cost,
                "pays_from": acceptance_of(cost, k),
                "plain_seconds": found[0]["seconds"],
            }
            | row
        )
    return rows


def acceptance_of(tokens: float, drafts: int) -> float | None:
    """The acceptance a at which a round of k drafts yields so many tokens: (1 - a^(k + 1)) / (1 - a) of them.

    Args:
        tokens: of a round.
        drafts: k.

    Returns:
        a in [0, 1]; None where even accepting all yields fewer.
    """
    if tokens > drafts + 1:
        return None
    low, high = 0.0, 1.0
    # The yield rises with a: halving finds it.
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(drafts + 1)) < tokens else (low, middle)
    return low


def exact_call(policy: Policy, case: Case, draft_length: int) -> Callable[[], ExactRollouts]:
    """An exact rollout of the case; no token ends it.

    Args:
        policy: what verifies.
        case: the workload, with the share of layers that drafts skip.
        draft_length: tokens drafted before each verification.
    """
    policy = dataclasses.replace(policy, max_completion_tokens=case.new_tokens)
    prompts = prompts_of(case, policy.model.config.vocab_size)
    plan = plan_of(case, policy.num_layers)

    def call() -> ExactRollouts:
        return policy.generate_exact(
            prompts, plan, jax.random.key(0), group_size=case.group, draft_length=draft_length, stops=False
        )

    return call


def exact_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for plain rollouts of each number of rows, and one for each kind of exact ones."""
    header = ["rows", "rollouts", "layers", "bridges", "accepted", "tokens/s", "of plain", "round costs", "pays from"]
    cells = []
    for row in rows:
        drafted = "accepted" in row
        pays = row.get("pays_from")
        cells.append(
            [
                row["case"].rows,
                row["variant"],
                row.get("kept", "-"),
                row.get("bridged", "-"),
                f"{row['accepted']:.2f}" if drafted else "-",
                f"{row['case'].sampled_tokens / row['seconds']:.0f}",
                f"{row['plain_seconds'] / row['seconds']:.2f}x",
                f"{row['round_cost']:.2f} steps" if drafted else "-",
                ("never" if pays is None else f"{pays:.2f}") if drafted else "-",
            ]
        )
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
