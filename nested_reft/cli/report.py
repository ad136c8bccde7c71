"""`nested-reft report`: a page of HTML on one run or several, and its charts as PNG files."""

from __future__ import annotations

import argparse
import os

from nested_reft.cli.arguments import add_json, check_json, check_out, command_parser, keep_json, local_file
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.reports.report import write_report
from nested_reft.reports.run_files import read_run
from nested_reft.reports.run_metrics import report_text
from nested_reft.run_mirror import local_run
from nested_reft.untrusted import printable

LAST_STEPS = 5  # of the curriculum's words; those of a whole run would fill the screen


def run(arguments: list[str]) -> None:
    """Writes the report and prints its words and tables."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        if known.out is not None:
            check_out(known.out, ".html")
        runs = [local_run(source) for source in known.runs]
        result = write_report(runs, known.out)
    for path, found in zip(runs, result["runs"], strict=True):
        # A name of a source may have lines of its own, which would pass for lines of this command.
        lines = [f"{found['run']}:", *found["words"], *(f"warning: {words}" for words in found["warnings"])]
        say("\n".join(map(printable, lines)))
        if found["metrics"]:
            say(f"\n{report_text(found, read_run(path).lines, None if known.audit else LAST_STEPS)}")
        say()
    for words in result["warnings"]:
        say(printable(f"warning: {words}"))
    if result["no_figures"] is not None:
        say(f"no PNG files: {result['no_figures']}")
    elif result["figures"]:
        say(f"{len(result['figures'])} charts as PNG files: {os.path.dirname(result['report'])}")
    say(f"report: {result['report']}")
    keep_json(known.json, result)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("report", "One page of HTML on a run, or on several side by side, and its charts as PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory; the run may still be going on")
    parser.add_argument(
        "--out",
        type=local_file,
        metavar="FILE",
        help="the page; by default RUN/report/report.html, and comparison/report.html for several runs",
    )
    parser.add_argument(
        "--audit", action="store_true", help=f"the curriculum's words of every step, not of the last {LAST_STEPS}"
    )
    add_json(parser, "words and tables")
    return parser
