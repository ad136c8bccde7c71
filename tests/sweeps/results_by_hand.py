"""Results of runs, written by hand."""

from __future__ import annotations

from typing import Any


def config(name: str = "a", source: str = "sums", **fields: Any) -> dict[str, Any]:
    """A configuration as JSON, as far as comparisons read it."""
    sources = [{"name": source, "task": "chain_sum", "train_size": 20}]
    plain = {"name": name, "data": {"sources": sources}, "loss": {"kind": "policy_gradient"}}
    return plain | {"train": {"seed": 0, "steps": 4}, "nesting": {"skip_ratio": 0.0}} | fields


def result(label: str, seed: int, accuracy: float | None, speedup: float = 1.0, **more: Any) -> dict[str, Any]:
    """A run that starts at 0.1 and ends at an accuracy after four steps of a second each."""
    curve = {"step": [0, 4], "seconds": [0.0, 4.0], "accuracy": [0.1, accuracy]}
    measures = {"accuracy": accuracy, "reward": 0.5, "nested_speedup": speedup, "plan_price": 1 / speedup}
    plain = {"label": label, "seed": seed, "config": config(), "measures": measures, "curve": curve}
    return plain | {"versions": {"commit": "c" * 40}, "run_directory": f"runs/{label}-{seed}"} | more
