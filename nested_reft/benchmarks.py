"""A model on benchmarks: accuracy, pass@k and the majority's answer, with a record of every question.

Records are lines of JSON. The first says what was evaluated and how; each of the others holds a question and all its
completions. An evaluation that was interrupted goes on behind the last whole line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nested_reft.data.prompts import EncodedExample
from nested_reft.evaluation import Answers, EvaluationConfig, answered, pass_at_k
from nested_reft.intervals import of_mean
from nested_reft.json_files import differences, naming
from nested_reft.layer_plan import LayerPlan
from nested_reft.rewards.exact_answer import parse_answer
from nested_reft.rewards.math_answer import marked_answer, one_form
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.policy import Policy
from nested_reft.untrusted import BadFile

Record = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkResult:
    """Results on all questions of a benchmark.

    Attributes:
        questions: how many.
        samples: k, completions of each question.
        accuracy: share of completions that are right (avg@k).
        interval: its 95 % interval over questions.
        pass_at: by j, a power of two up to k, or k: the unbiased estimate of pass@j.
        majority: share of questions whose most frequent answer is right (maj@k); a tie counts the share of the tied
            answers that are right. None where the checker has no notion of equal answers.
        unscored: completions that could not be checked; they count as not right.
        cut_off: share of completions that reached the limit of tokens.
        mean_tokens: of a completion.
    """

    questions: int
    samples: int
    accuracy: float
    interval: tuple[float, float]
    pass_at: dict[int, float]
    majority: float | None
    unscored: int
    cut_off: float
    mean_tokens: float

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def answer_of(text: str, checker: str) -> Hashable | None:
    """What a completion answers, so that equal answers are equal; None where it answers nothing.

    Args:
        text: of the completion; untrusted.
        checker: `exact` or `math`.
    """
    if checker == "exact":
        return parse_answer(text)
    marked = marked_answer(text)
    return None if marked is None else one_form(marked)


def majority_right(record: Record, checker: str) -> float:
    """Whether the most frequent answer to a question is right: 0 or 1, or between them where answers tie.

    Args:
        record: of the question. Completions that answer nothing have no vote.
        checker: as `answer_of` takes it.
    """
    votes, right = Counter[Hashable](), dict[Hashable, bool]()
    for text, is_right in zip(record["texts"], record["right"], strict=True):
        answer = answer_of(text, checker)
        if answer is not None:
            votes[answer] += 1
            # Equal answers are judged alike, but a completion that was cut off is wrong whatever it says.
            right[answer] = right.get(answer, False) or is_right is True
    most = max(votes.values(), default=0)
    tied = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] for answer in tied) / len(tied) if tied else 0.0


def result_of(records: Sequence[Record], checker: str) -> BenchmarkResult:
    """The figures of a benchmark.

    Args:
        records: of all questions, at least one; each has the same number of completions.
        checker: that judged them.
    """
    samples = len(records[0]["right"])
    right_E = [sum(right is True for right in record["right"]) for record in records]
    powers = sorted({samples, *(2**power for power in range(samples.bit_length()))})
    votes = checker in ("exact", "math") and samples > 1
    return BenchmarkResult(
        questions=len(records),
        samples=samples,
        accuracy=float(np.mean(right_E)) / samples,
        interval=of_mean(np.array(right_E) / samples),
        pass_at={k: float(np.mean([pass_at_k(samples, count, k) for count in right_E])) for k in powers},
        majority=float(np.mean([majority_right(record, checker) for record in records])) if votes else None,
        unscored=sum(right is None for record in records for right in record["right"]),
        cut_off=1 - float(np.mean([finished for record in records for finished in record["finished"]])),
        mean_tokens=float(np.mean([tokens for record in records for tokens in record["tokens"]])),
    )


def evaluate_benchmark(
    policy: Policy,
    examples: Sequence[EncodedExample],
    reward: RewardConfig,
    samples: int,
    config: EvaluationConfig,
    key: jax.Array,
    plan: LayerPlan | None,
    known: Sequence[Record],
    keep: Callable[[list[Record]], None],
) -> list[Record]:
    """Answers the questions that have no record yet, with the policy's own sampling.

    Args:
        policy: what answers.
        examples: all questions of the benchmark.
        reward: how answers are checked.
        samples: completions of each question.
        config: how many questions and completions at a time.
        key: PRNG key of the benchmark.
        plan: the layers that act; None is the full model.
        known: records of the first questions, from an earlier evaluation.
        keep: is given the new records of each batch.

    Returns:
        The records of all questions, in order.
    """
    records = list(known[: len(examples)])
    if len(records) < len(examples):
        for batch in answered(
            policy, examples, reward, config.batch_size, policy.sampling, key, samples, plan, len(records), config.rows
        ):
            new = [_record(answers, len(records) + number) for number, answers in enumerate(batch)]
            keep(new)
            records += new
    return records


def _record(answers: Answers, number: int) -> Record:
    example = answers.example
    return {
        "benchmark": example.source,
        "number": number,
        "question": example.question,
        "answer": example.answer,
        "texts": answers.texts,
        "right": answers.right,
        "tokens": answers.tokens,
        "finished": answers.finished,
    }


class RecordFile:
    """The file of records of an evaluation, which may have been begun earlier."""

    def __init__(self, path: Path | None, about: dict[str, Any]):
        """Reads what the file holds; it is not written yet.

        Args:
            path: of the file; None keeps nothing.
            about: all that the records depend on, as JSON.

        Raises:
            BadFile: it holds something else, or records of another evaluation.
        """
        self._path, self._about = path, json.loads(json.dumps(about))
        self._whole = b""
        self._records = dict[str, list[Record]]()
        if path is not None and path.exists():
            self._read(path)

    def known(self, benchmark: str) -> list[Record]:
        """The records of the first questions of a benchmark.

        Args:
            benchmark: its name.
        """
        return self._records.get(benchmark, [])

    def begin(self) -> None:
        """Writes the first line, or cuts a line off that was written in part."""
        if self._path is not None:
            self._whole = self._whole or _line({"about": self._about})
            with naming(self._path):
                self._path.write_bytes(self._whole)

    def keep(self, records: list[Record]) -> None:
        """Adds records at the end.

        Args:
            records: of a batch.
        """
        if self._path is not None:
            with naming(self._path), self._path.open("ab") as file:
                file.write(b"".join(map(_line, records)))

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        # What follows the last line break was being written when the evaluation ended.
        self._whole = content[: content.rfind(b"\n") + 1]
        if content and not self._whole:
            raise BadFile(f"'{path}' holds no records of an evaluation; name another file")
        for number, line in enumerate(self._whole.splitlines(), 1):
            try:
                found = json.loads(line)
                if number == 1:
                    self._check_about(path, found["about"])
                    continue
                records = self._records.setdefault(found["benchmark"], [])
                _check_record(found, len(records))
                records.append(found)
            except BadFile:
                raise
            except (ValueError, KeyError, TypeError, RecursionError):
                raise BadFile(f"line {number} of '{path}' is no record of an evaluation; name another file") from None

    def _check_about(self, path: Path, about: dict[str, Any]) -> None:
        other = differences(about, self._about)
        if other:
            fields = "; ".join(f"{field}: {old!r} there, {new!r} now" for field, old, new in other[:3])
            raise BadFile(f"'{path}' holds records of another evaluation ({fields}); name another file")


def _check_record(found: dict[str, Any], number: int) -> None:
    texts, right, tokens, finished = (found[name] for name in ("texts", "right", "tokens", "finished"))
    fits = (
        found["number"] == number
        and all(isinstance(text, str) for text in texts)
        and all(value in (True, False, None) for value in right)
        and all(isinstance(value, int) for value in (*tokens, *finished))
        and len({len(texts), len(right), len(tokens), len(finished)}) == 1
    )
    if not fits:
        raise ValueError("no record")


def _line(value: dict[str, Any]) -> bytes:
    # JSON escapes whatever the model wrote.
    return (json.dumps(value) + "\n").encode()
