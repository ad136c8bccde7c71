"""`nested-reft eval`: held-out accuracy of a run or a model."""

from __future__ import annotations

import argparse

from nested_reft.api import evaluate_sources
from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.policy import plan_without, setup_of
from nested_reft.reports.tables import evaluation_table


def run(arguments: list[str]) -> None:
    """Evaluates every source's held-out prompts and prints the table."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        setup = setup_of(known.policy, known.config)
        plan = plan_without(setup.policy.num_layers, known.skip_layers)
    found = evaluate_sources(setup, plan, samples=True)
    results = {name: result.to_json() for name, result in found.items()}
    print(evaluation_table(results))
    keep_json(known.json, results)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("eval", "Greedy accuracy and pass@k on the held-out prompts of every source.")
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument("--skip-layers", type=int, nargs="+", default=[], help="evaluate the nested model without them")
    add_json(parser, "the results")
    return parser
