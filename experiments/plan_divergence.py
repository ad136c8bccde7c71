"""Can 6 of SmolLM2's 30 layers be skipped at the divergence of 2 uniform ones?

KL(full || nested) per completion token, exact over the vocabulary, on held-out completions of the full
model: for uniform draws of 2 layers, and for draws of 6 by each rule. The divergences that `measured`
draws by come from training prompts, so these prompts are new to them.

    python -m experiments.plan_divergence [--json FILE]        (about five minutes on two idle cores)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.arguments import add_json, command, experiment_parser
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.data.pipeline import batch_prompts
from nested_reft.divergence import measure_plan_divergence, texts_of
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.training.config import load_config
from nested_reft.training.keys import RunKeys
from nested_reft.training.setup import Setup, prepare
from nested_reft.types import Rollouts

FEW, MANY = 2, 6
TEMPERATURES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1)


def full_completions(setup: Setup, num_prompts: int) -> Rollouts:
    """Completions of the full model on held-out prompts of the first source, one each.

    Args:
        setup: its policy answers.
        num_prompts: how many prompts, from the first.
    """
    examples = setup.data.heldout_examples[0][:num_prompts]
    prompts = batch_prompts(examples, [0] * len(examples), setup.data.prompt_size)
    return setup.policy.generate(prompts, None, RunKeys(jax.random.key(setup.config.train.seed)).measurement)


def rules(measured: NestingConfig) -> dict[str, tuple[NestingConfig, int]]:
    """Name -> how plans are drawn, and of how many skipped layers."""
    border = measured.border
    return {
        f"uniform, {FEW}": (NestingConfig(border=border), FEW),
        f"uniform, {FEW}, border 2": (NestingConfig(border=2), FEW),
        f"uniform, {MANY}": (NestingConfig(border=border), MANY),
        f"per_layer, {MANY}": (NestingConfig(border=border, choice="per_layer"), MANY),
    } | {
        f"measured at {temperature:g}, {MANY}": (
            dataclasses.replace(measured, divergence_temperature=temperature),
            MANY,
        )
        for temperature in TEMPERATURES
    }


def measure(setup: Setup, num_prompts: int, draws: int, only: str) -> list[dict[str, Any]]:
    """Mean and standard error over the draws of each rule; all plans on the same completions.

    Args:
        setup: policy, prompts, and the measured divergences that `measured` rules draw by.
        num_prompts: held-out prompts.
        draws: plans of each rule.
        only: a part of the names of the rules to measure; empty for all.
    """
    num_layers, temperature = setup.policy.num_layers, setup.config.rollout.sampling.temperature
    texts = texts_of(full_completions(setup, num_prompts))
    results = []
    for name, (nesting, num_skipped) in rules(setup.config.nesting).items():
        if only not in name:
            continue
        # Every rule draws with the same keys, so rules do not differ by luck with them.
        keys = jax.random.split(jax.random.key(1), draws)
        plans = [draw_plan(key, nesting, num_layers, setup.divergence_L, num_skipped) for key in keys]
        if nesting.choice == "measured" and nesting.divergence_temperature == 0:
            plans = plans[:1]  # they are all the same
        values = measure_plan_divergence(setup.policy.model, texts, temperature, plans, name)
        results.append(
            {
                "rule": name,
                "skipped": num_skipped,
                "draws": len(plans),
                "kl_mean": float(values.mean()),
                "kl_standard_error": float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
                "kl": values.tolist(),
                "plans": [plan.left_out(num_layers) for plan in plans],
                "different_layers": len({layer for plan in plans for layer in plan.left_out(num_layers)}),
            }
        )
    return results


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("plan_divergence", __doc__)
    parser.add_argument("--config", default="smollm2_chain_sum", help="a configuration with measured plans")
    parser.add_argument("--prompts", type=whole(1), default=16, help="held-out prompts")
    parser.add_argument("--draws", type=whole(1), default=8, help="plans of each rule")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rules with this in their name")
    add_json(parser)
    known = parser.parse_args(arguments)
    with checking_input():
        config = load_config(known.config)
        if config.nesting.choice != "measured":
            raise ValueError(
                f"--config is '{known.config}', whose nesting.choice is '{config.nesting.choice}'; allowed are those"
                " with 'measured' plans"
            )
        names = list(rules(config.nesting))
        if not any(known.only in name for name in names):
            raise ValueError(f"--only is '{known.only}'; allowed is a part of {', '.join(names)}")
        setup = prepare(config)
        for nesting, num_skipped in rules(config.nesting).values():
            draw_plan(jax.random.key(0), nesting, setup.policy.num_layers, setup.divergence_L, num_skipped)
    results = measure(setup, known.prompts, known.draws, known.only)
    rows = [
        [
            result["rule"],
            result["draws"],
            f"{result['kl_mean']:.2f}",
            "-" if result["kl_standard_error"] is None else f"{result['kl_standard_error']:.2f}",
            f"{min(result['kl']):.2f} to {max(result['kl']):.2f}",
            result["different_layers"],
        ]
        for result in results
    ]
    print(table(["plans (rule, skipped)", "draws", "mean KL", "standard error", "range", "different layers"], rows))
    keep_json(known.json, {"versions": versions(), "prompts": known.prompts, "results": results})


if __name__ == "__main__":
    sys.exit(main())
