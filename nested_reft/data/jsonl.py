"""A user's own questions: one JSON object a line."""

from __future__ import annotations

import json
from typing import Any

from nested_reft.data.dialogues import dialogue_pair
from nested_reft.data.examples import Example
from nested_reft.paths import local_path


def read_jsonl(
    path: str,
    field: str,
    source: str,
    question_field: str,
    answer_field: str,
    reference_field: str | None,
    faults: list[str] | None = None,
) -> list[Example]:
    """The examples of a JSONL file, in order; empty lines are skipped.

    Fields that are neither question, answer nor reference become the example's metadata, so that
    templates and user-defined rewards can name them. Answers may be numbers, and stay as they are written. A row with
    the field `rejected` is a preference pair, and its answer may be empty. Without a question it may be two dialogues,
    as in HH.

    Args:
        path: the file, UTF-8.
        field: where the path stands in the configuration, for messages.
        source: name of the source.
        question_field, answer_field, reference_field: names in the objects; no reference with None.
        faults: rows that cannot be used are left out, and a sentence about each is added here; None refuses them.

    Returns:
        The examples, with no question removed yet; see `examples.distinct`.

    Raises:
        ValueError: no such file, no row, or a row that is not an object with these fields; names the row.
    """
    local = local_path(path)
    if not local.is_file():
        what = "is not a file" if local.exists() else "does not exist"
        raise ValueError(f"{field} is '{path}', which {what}")
    examples = list[Example]()
    # Bytes are decoded row by row, so that a row that is not UTF-8 can be named.
    with local.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{field} is '{path}': row {number}"
            try:
                examples.append(_example(line, where, source, question_field, answer_field, reference_field))
            except ValueError as error:
                if faults is None:
                    raise
                faults.append(str(error))
    if not examples:
        first = f", the first because {faults[0]}" if faults else ""
        raise ValueError(f"{field} is '{path}', which has no rows that can be used{first}; it needs at least one")
    return examples


def _example(
    line: bytes, where: str, source: str, question_field: str, answer_field: str, reference_field: str | None
) -> Example:
    row, written = _with_replies(*_parse(line, where), question_field, answer_field)
    question = _text(written, question_field, where)
    # Pairs that teach nothing are skipped where pairs are learnt from, since published ones have a few.
    answer = _text(written, answer_field, where, may_be_empty="rejected" in written)
    reference = None if reference_field is None else _text(written, reference_field, where)
    # A verifier or a template may need any other field, so none is lost.
    metadata = {k: v for k, v in row.items() if k not in (question_field, answer_field, reference_field)}
    if written.get("rejected") is not None:  # null is no answer, which is counted where pairs are learnt from
        metadata["rejected"] = _text(written, "rejected", where, may_be_empty=True)
    return Example(question, answer, source, metadata, reference)


def _parse(line: bytes, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object of a row, and the same with its numbers as they are written."""
    try:
        # Spreadsheets write a byte-order mark at the start, which `utf-8-sig` leaves out.
        text = line.decode("utf-8-sig")
        # As a number, 0.00001 would come back as 1e-05, and a long one with other digits.
        row, written = json.loads(text), json.loads(text, parse_int=str, parse_float=str)
    # RecursionError is what deeply nested lists raise, and ValueError an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is {type(row).__name__}; each row must be an object such as " + '{"question": "..."}'
        )
    return row, written


def _with_replies(
    row: dict[str, Any], written: dict[str, Any], question_field: str, answer_field: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pair of two dialogues as prompt and replies; any other row as it is."""
    chosen, rejected = written.get(answer_field), written.get("rejected")
    if question_field in written or not (isinstance(chosen, str) and isinstance(rejected, str)):
        return row, written
    pair = dialogue_pair(chosen, rejected)
    if pair is None:
        return row, written
    question, answer, metadata = pair
    fields = {question_field: question, answer_field: answer, **metadata}
    return row | fields, written | fields


def _text(written: dict[str, Any], name: str, where: str, may_be_empty: bool = False) -> str:
    """A field as text; `written` has numbers as text, but not true, null, NaN and Infinity."""
    if name not in written:
        raise ValueError(f"{where} has no field '{name}'; it has {', '.join(map(repr, written)) or 'none'}")
    value = written[name]
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ValueError(f"{where} has the {name} {str(value)[:80]!r}; allowed is text that is not empty, or a number")
    # JSON can write half of a character, which no tokenizer takes.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where} has the {name} {value[:80]!r}, which holds half of a surrogate pair")
    return value
