"""`nested-reft verify-estimators`: exact bias and variance of every estimator on a model small enough to list."""

from __future__ import annotations

import argparse
from pathlib import Path

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json, local_file, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import complain, say
from nested_reft.exit_codes import FAILED
from nested_reft.json_files import check_writable
from nested_reft.reports.estimators import draw_estimators, estimator_tables
from nested_reft.reports.figures import figure_maker
from nested_reft.verification import enumeration


def run(arguments: list[str]) -> None:
    """Prints the table of estimators.

    Raises:
        SystemExit: an estimator breaks its claim (code 1).
    """
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        if known.figure is not None:
            _check_figure(known.figure)
            if known.json is not None and Path(known.json).resolve() == known.figure.resolve():
                raise ValueError(f"--figure and --json are both '{known.figure}'; allowed are two files")
    reports = enumeration.verify_estimators(seed=known.seed)
    results = [report.to_json() for report in reports]
    # The table comes before the verdict, because it shows by how much a claim is broken.
    say(estimator_tables(results))
    keep_json(known.json, results)
    if known.figure is not None:
        draw_estimators(results, known.figure)
    broken = [f"{report.estimator} ({report.scenario})" for report in reports if not report.keeps_claim]
    if broken:
        complain(f"\nerror: not as unbiased as claimed: {'; '.join(broken)}")
        raise SystemExit(FAILED)


def _check_figure(path: Path) -> None:
    """Refuses a figure that could not be drawn, before the work whose results it is to show.

    Raises:
        ValueError: the name says another kind of file, or the file cannot be written.
        ImportError: matplotlib is not installed.
    """
    if path.suffix != ".png":
        raise ValueError(f"--figure is '{path}'; allowed is a file name that ends in .png")
    check_writable(path)
    figure_maker()


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("verify-estimators", "Exact bias and variance of every estimator on an enumerable model.")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the model's parameters")
    parser.add_argument("--figure", type=local_file, metavar="FILE.png", help="also draw bias against noise here")
    add_json(parser, "the results")
    return parser
