"""What exact nested rollouts cost beside plain ones of the full model: SmolLM2-135M on the CPU.

    python -m experiments.benchmarks.exact [--json FILE]

Whole calls in float32, 8 random prompts x 8 completions of 64 + 32 tokens, all in turn. Each round drafts some
tokens with layers skipped and verifies them with the full model; "accepted" is the share of the tested drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.benchmarks.common import disturbance, exported_model, parser, plain, prepare_process, write_results
from experiments.benchmarks.ours import VARIANTS, plan_of, prompts_of, rollout_call
from experiments.benchmarks.worker import Case, measure_all
from nested_reft.reports.tables import table
from nested_reft.rollout.exact import ExactRollouts
from nested_reft.rollout.policy import Policy

CASE = Case(prompts=8, group=8, prompt_tokens=64, new_tokens=32)
SKIP_RATIOS = (0.05, 0.1)
DRAFT_LENGTHS = (1, 2, 4)


def main() -> None:
    """Prints the table."""
    known = parser(__doc__ or "", ()).parse_args()
    prepare_process(known.threads)
    policy = VARIANTS["float32"](exported_model()[1])
    cases = [(dataclasses.replace(CASE, skip_ratio=skipped), k) for skipped in SKIP_RATIOS for k in DRAFT_LENGTHS]
    drafted = [exact_call(policy, case, k) for case, k in cases]
    calls = [rollout_call(policy, CASE), *drafted]
    found = measure_all([lambda call=call: jax.block_until_ready(call()) for call in calls], known.repeats)
    rows = [{"system": "ours", "variant": "plain", "case": CASE} | found[0]]
    for (case, k), call, row in zip(cases, drafted, found[1:], strict=True):
        # Acceptance is a matter of the samples and not of time, so one more call outside the clock tells it.
        result = call()
        named = {"system": "ours", "variant": f"exact, {k} drafts", "case": case, "drafts": k}
        kept = plan_of(case, policy.num_layers).shape.kept
        rows.append(named | {"kept": kept, "accepted": float(result.accepted / result.tested)} | row)
    print(f"\n{exact_table(rows)}\n{disturbance(rows)}")
    write_results(known.json, {"threads": known.threads, "rows": plain(rows)})


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
    """A line for plain rollouts, the first row, and one for each kind of exact ones."""
    header = ["rollouts", "layers of drafts", "accepted", "tokens/s", "of plain"]
    cells = [
        [
            row["variant"],
            row.get("kept", "-"),
            f"{row['accepted']:.2f}" if "accepted" in row else "-",
            f"{row['case'].sampled_tokens / row['seconds']:.0f}",
            f"{rows[0]['seconds'] / row['seconds']:.2f}x",
        ]
        for row in rows
    ]
    return table(header, cells)


if __name__ == "__main__":
    main()
