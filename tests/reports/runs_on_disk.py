"""Run directories for reports, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ATTACKS = (
    "<img src=x onerror=\"document.title='pwned'\">",
    "</script><script>document.title='pwned'</script>",
    "<!--<script>",
    "\u202egnp.exe and \x1b[31mred",
)


def line(step: int, **more) -> dict[str, Any]:
    plain = {"step": step, "accuracy": step / 4, "reward": 0.5, "tokens_per_second": 100.0, "ess_token": 0.9}
    return plain | {"left_out_layers": [2, 3 + step % 2]} | more


def sample(step: int, text: str = "4", **more) -> dict[str, Any]:
    plain = {"step": step, "source": "sums", "version": step - 1, "prompt": "2 + 2 =", "answer": "4", "text": text}
    plain |= {"reward": 1.0, "accuracy": 1.0, "advantage": 0.5, "parts": {"accuracy": 1.0}, "stop": "stop token"}
    return (
        plain | {"tokens": 2, "forced_tokens": 0, "temperature": 1.0, "left_out_layers": [2], "mean_weight": 1.0} | more
    )


def write_run(path: Path, lines: list[dict], samples: list[dict] | None = None, **objects: dict) -> Path:
    """A run directory.

    Args:
        path: made if it is not there.
        lines: of `metrics.jsonl`.
        samples: of `samples.jsonl`; None leaves the file out.
        objects: contents of JSON files by name, such as `summary`.
    """
    path.mkdir(exist_ok=True)
    logs = {"metrics": lines} | ({} if samples is None else {"samples": samples})
    for name, entries in logs.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for name, value in objects.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path
