"""A user's own questions: one JSON object a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nested_reft.data.examples import Example


def read_jsonl(
    path: str,
    field: str,
    source: str,
    question_field: str,
    answer_field: str,
    reference_field: str | None,
) -> list[Example]:
    """The examples of a JSONL file, in order; empty lines are skipped.

    Fields that are neither question, answer nor reference become the example's metadata, so that
    templates and user-defined rewards can name them. Answers may be numbers.

    Args:
        path: the file, UTF-8.
        field: where the path stands in the configuration, for messages.
        source: name of the source.
        question_field, answer_field, reference_field: names in the objects; no reference with None.

    Returns:
        The examples, with no question removed yet; see `examples.distinct`.

    Raises:
        ValueError: no such file, no row, or a row that is not an object with these fields; names the row.
    """
    if not Path(path).is_file():
        what = "is not a file" if Path(path).exists() else "does not exist"
        raise ValueError(f"{field} is '{path}', which {what}")
    examples = []
    # Bytes are decoded row by row, so that a row that is not UTF-8 can be named.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{field} is '{path}': row {number}"
            row = _parse(line, where)
            question = _text(row, question_field, where)
            answer = _text(row, answer_field, where)
            reference = None if reference_field is None else _text(row, reference_field, where)
            # A verifier or a template may need any other field, so none is lost.
            metadata = {k: v for k, v in row.items() if k not in (question_field, answer_field, reference_field)}
            examples.append(Example(question, answer, source, metadata, reference))
    if not examples:
        raise ValueError(f"{field} is '{path}', which has no rows; it needs at least one")
    return examples


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        # Spreadsheets write a byte-order mark at the start, which `utf-8-sig` leaves out. RecursionError is what
        # deeply nested lists raise.
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is {type(row).__name__}; each row must be an object such as " + '{"question": "..."}'
        )
    return row


def _text(row: dict[str, Any], name: str, where: str) -> str:
    """A field as text that is not empty."""
    if name not in row:
        raise ValueError(f"{where} has no field '{name}'; it has {', '.join(map(repr, row)) or 'none'}")
    value = row[name]
    # True is an int to `isinstance`, and Python's JSON reads NaN and Infinity.
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{where} has the {name} {str(value)[:80]!r}; allowed is text that is not empty, or a number")
    # Answers are text everywhere else, so a number is written out.
    return value if isinstance(value, str) else json.dumps(value)
