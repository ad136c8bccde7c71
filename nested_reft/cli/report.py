"""`nested-reft report`: figures and tables of a run; it needs no JAX."""

from __future__ import annotations

import argparse

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.reports.figures import read_metrics, report_text, write_report
from nested_reft.run_mirror import local_run

LAST_STEPS = 5  # of the curriculum's words; those of a whole run would fill the screen


def run(arguments: list[str]) -> None:
    """Draws the figures and prints the tables."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        run = local_run(known.run)
        result = write_report(run)
    say(report_text(result, read_metrics(run), None if known.audit else LAST_STEPS))
    say(f"\nfigures: {result['directory']}")
    keep_json(known.json, result)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("report", "Figures and tables of a run, from its metrics.jsonl, in RUN/report.")
    parser.add_argument("run", help="a run directory; the run may still be going on")
    parser.add_argument(
        "--audit", action="store_true", help=f"the curriculum's words of every step, not of the last {LAST_STEPS}"
    )
    add_json(parser, "the tables")
    return parser
