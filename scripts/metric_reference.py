"""Writes docs/metrics.md from the declarations in the code: python scripts/metric_reference.py

A test compares the page with the declarations, so it cannot fall behind them.
"""

from __future__ import annotations

from pathlib import Path

from nested_reft.replay_store import REASONS
from nested_reft.training.record import METRICS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def reference() -> str:
    """The page: every metric of a step with its unit and meaning."""
    rows = [f"| `{metric.name}` | {metric.unit or '-'} | {metric.meaning} |" for metric in METRICS]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Each training step appends one line to `metrics.jsonl` in the run directory."
            " This page lists every name that can stand in it."
            " `{source}` and `{part}` stand for a name of the run's own, `{reject_by}` for a value of `loss.reject_by`,"
            " `{reason}` for why a completion is not kept for replay: " + ", ".join(REASONS) + "."
            " A step leaves out what it did not measure.",
            "",
            "| name | unit | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"written: {PAGE}")
