"""`nested-reft verify-estimators`: exact bias and variance of every estimator on a model small enough to list."""

from __future__ import annotations

import argparse

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import complain, say
from nested_reft.reports.tables import estimator_table
from nested_reft.verification import enumeration


def run(arguments: list[str]) -> None:
    """Prints the table of estimators.

    Raises:
        SystemExit: an estimator breaks its claim (code 1).
    """
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
    reports = enumeration.verify_estimators(seed=known.seed)
    results = [report.to_json() for report in reports]
    # The table comes before the verdict, because it shows by how much a claim is broken.
    say(estimator_table(results))
    keep_json(known.json, results)
    broken = [f"{report.estimator} ({report.scenario})" for report in reports if not report.keeps_claim]
    if broken:
        complain(f"\nerror: not as unbiased as claimed: {'; '.join(broken)}")
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("verify-estimators", "Exact bias and variance of every estimator on an enumerable model.")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the model's parameters")
    add_json(parser, "the results")
    return parser
