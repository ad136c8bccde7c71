"""Benchmarks: questions that models are compared on, all of them, in their published order."""

from __future__ import annotations

import json
from pathlib import Path

from nested_reft.data.datasets import load_dataset
from nested_reft.data.examples import Example
from nested_reft.data.jsonl import read_jsonl
from nested_reft.paths import local_path

# The dataset and the split of each. SVAMP has no official test split: all its 1,000 questions are asked.
BENCHMARKS = {
    "gsm8k": ("gsm8k", "test"),
    "svamp": ("svamp", "train"),
    "math": ("math", "test"),
    "math500": ("math500", "test"),
}
# The names that published files give to their fields; the first that a file's first row has is taken.
QUESTION_FIELDS = ("question", "problem")
ANSWER_FIELDS = ("answer", "final_answer")
OPTION = "--benchmark"


def load_benchmark(name: str, folder: str | None = None) -> tuple[list[Example], list[str]]:
    """The questions of a benchmark.

    Args:
        name: one of `BENCHMARKS`, or a JSONL file with a question and an answer in every row.
        folder: has the original files of named ones in folders of their names; None downloads them.

    Returns:
        The questions, and a sentence for each row of a file that has none or no answer and is left out.

    Raises:
        ValueError: neither a benchmark nor a file; a file that is not the published one; or no row that can be asked.
        ImportError: tensorflow-datasets is not installed.
    """
    if name in BENCHMARKS:
        dataset, split = BENCHMARKS[name]
        rows = load_dataset(dataset, None if folder is None else f"{folder}/{name}", f"{OPTION} {name}")[split]
        return [Example(row.question, row.answer, name, row.metadata, row.reference or None) for row in rows], []
    path = local_path(name)
    if not path.is_file():
        raise ValueError(
            f"{OPTION} is '{name}', which is no file; allowed are {', '.join(BENCHMARKS)}, and a JSONL file"
        )
    faults: list[str] = []
    question, answer = _fields(path)
    return read_jsonl(name, OPTION, path.stem, question, answer, None, faults), faults


def _fields(path: Path) -> tuple[str, str]:
    """The names of the fields of question and answer, by the first row that is an object."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                chosen = (next((n for n in names if n in row), names[0]) for names in (QUESTION_FIELDS, ANSWER_FIELDS))
                return next(chosen), next(chosen)
    return QUESTION_FIELDS[0], ANSWER_FIELDS[0]
