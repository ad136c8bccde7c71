"""The report of one run or several: a page, and its charts as PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_reft.reports.figures import draw_chart
from nested_reft.reports.page import page
from nested_reft.reports.run_charts import run_charts
from nested_reft.reports.run_files import read_run
from nested_reft.reports.run_metrics import summarize
from nested_reft.reports.summary_words import comparison_warnings, summary_words, warnings

PAGE = "report.html"


def write_report(runs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Writes one page of HTML, and a PNG file beside it for each chart, if matplotlib is installed.

    Args:
        runs: run directories; they may be going on, damaged or without a step.
        out: the page; None is `report/report.html` in the directory of one run, and `comparison/report.html` here of
            several.

    Returns:
        JSON-able values: `report`, the path of the page; `figures`, those of the PNG files; `no_figures`, why there are
        none, or None; `warnings` of comparing the runs; and `runs`, with `run`, `words`, `warnings` (what is missing
        among them) and what `summarize` gives of each.

    Raises:
        ValueError: a directory is no run directory.
        OSError: the page cannot be written.
    """
    found = [read_run(path) for path in runs]
    charts = run_charts(found)
    if out is None:
        out = (runs[0] / "report" if len(runs) == 1 else Path() / "comparison") / PAGE
        out.parent.mkdir(exist_ok=True)
    # Written whole or not at all, since somebody may be looking at the page of a run that goes on.
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.write_text(page(found, charts), encoding="utf-8", errors="backslashreplace", newline="\n")
    os.replace(partial, out)
    figures, missing = list[str](), None
    try:
        for chart in charts:
            path = out.with_name(f"{out.stem}-{chart.name}.png")
            draw_chart(chart, path)
            figures.append(str(path))
    except ImportError as error:  # the page needs no matplotlib
        missing = str(error)
    return {
        "report": str(out),
        "figures": figures,
        "no_figures": missing,
        "warnings": comparison_warnings(found),
        "runs": [
            {
                "run": str(run.path),
                "words": summary_words(run),
                "warnings": [*run.faults, *warnings(run)],
                **summarize(run.lines),
            }
            for run in found
        ],
    }
