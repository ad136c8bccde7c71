"""Benchmarks: figures by hand, questions of files, and records that an interrupted evaluation goes on from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nested_reft.benchmarks import RecordFile, answer_of, evaluate_benchmark, majority_right, result_of
from nested_reft.data.benchmarks import BENCHMARKS, load_benchmark
from nested_reft.data.datasets import DATASETS
from nested_reft.data.sources import DatasetSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.training.setup import prepare
from nested_reft.untrusted import BadFile
from tests.training.runs import nano


def record(texts, right, number=0):
    count = len(texts)
    return {
        "benchmark": "sums",
        "number": number,
        "question": f"question {number}",
        "answer": "7",
        "texts": texts,
        "right": right,
        "tokens": [3] * count,
        "finished": [True] * count,
    }


def test_figures_by_hand():
    """Of 2 questions with 4 completions, 2 and 1 are right. Pairs hold a right one with 1 - 1/6 and 1 - 3/6. In the
    first question 7 has two votes against one and one; in the second, 5 has two and 7 one."""
    records = [
        record(["7", "= 7", "8", "9"], [True, True, False, False]),
        record(["7", "5", "5", "words"], [True, False, False, None], 1),
    ]
    found = result_of(records, "exact")
    assert (found.questions, found.samples, found.unscored, found.mean_tokens) == (2, 4, 1, 3)
    assert found.accuracy == pytest.approx(3 / 8)
    assert found.pass_at == pytest.approx({1: 3 / 8, 2: (5 / 6 + 3 / 6) / 2, 4: 1})
    assert found.majority == 0.5
    # Questions are the independent trials: 2/4 and 1/4 have the deviation 0.177, so the half width is 0.245.
    assert found.interval == pytest.approx((0.375 - 0.245, 0.375 + 0.245), abs=1e-3)


def test_votes_that_tie_count_their_share():
    assert majority_right(record(["7", "5"], [True, False]), "exact") == 0.5
    assert majority_right(record(["none", "of them"], [False, False]), "exact") == 0
    # Completions without an answer have no vote, and different forms of an answer have one together.
    marked = record(["\\boxed{1,000}", "\\boxed{1000}", "\\boxed{5}", "?", "?", "?"], [True, True] + [False] * 4)
    assert majority_right(marked, "math") == 1
    assert answer_of("\\boxed{1} or \\boxed{2}", "math") is None


def test_one_completion_has_no_vote():
    assert result_of([record(["7"], [True])], "exact").majority is None
    assert result_of([record(["7", "7"], [True, True])], "task").majority is None


def test_a_file_of_questions(tmp_path):
    """Published files name their fields differently. Rows without an answer are left out, and said to be."""
    rows = [{"problem": "1 + 1?", "answer": 2, "level": 1}, {"problem": "2 + 2?"}, {"problem": "3 + 3?", "answer": "6"}]
    path = tmp_path / "amc.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, faults = load_benchmark(str(path))
    assert [(example.question, example.answer, example.source) for example in examples] == [
        ("1 + 1?", "2", "amc"),
        ("3 + 3?", "6", "amc"),
    ]
    assert len(faults) == 1 and "row 2 has no field 'answer'" in faults[0]
    path.write_text('{"problem": "1 + 1?"}')
    with pytest.raises(ValueError, match=r"no rows that can be used, the first because .* row 1 has no field 'answer'"):
        load_benchmark(str(path))
    with pytest.raises(ValueError, match="--benchmark is 'gsm9k', which is no file; allowed are gsm8k, svamp, math, "):
        load_benchmark("gsm9k")


def test_what_has_only_questions_to_ask_is_not_trained_on():
    assert all(split in DATASETS[dataset].splits for dataset, split in BENCHMARKS.values())
    with pytest.raises(ValueError, match="dataset is 'math500'; allowed are gsm8k, hh_harmless_test, math, svamp,"):
        DatasetSource("x", "math500", None, 5, seed=0)


def test_a_line_that_was_written_in_part_is_answered_again(tmp_path):
    path, about = tmp_path / "records.jsonl", {"samples": 1, "sampling": {"temperature": 0.0}}
    file = RecordFile(path, about)
    file.begin()
    file.keep([record(["7"], [True]), record(["8"], [False], 1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = RecordFile(path, about)
    assert [found["number"] for found in again.known("sums")] == [0]
    assert path.read_bytes() == whole[:-5]  # nothing is written before all is checked
    again.begin()
    again.keep([record(["8"], [False], 1)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"about": {"samples": 2}}\n', r"records of another evaluation \(samples: 2 there, 1 now\)"),
        (b"no records", "holds no records of an evaluation"),
        (b'{"step": 1}\n', "line 1 of '.*' is no record of an evaluation"),
        (b'{"about": {"samples": 1}}\n{"benchmark": "sums"}\n', "line 2 of '.*' is no record"),
        (b'{"about": {"samples": 1}}\n' + b"[" * 100_000 + b"\n", "line 2 of '.*' is no record"),
    ],
)
def test_other_files_are_refused_and_stay_as_they_are(tmp_path, content, message):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=message):
        RecordFile(path, {"samples": 1})
    assert path.read_bytes() == content


@pytest.mark.slow
def test_an_interrupted_evaluation_ends_as_if_it_had_not_been():
    setup = prepare(nano())
    policy = dataclasses.replace(setup.policy, sampling=SamplingConfig(temperature=1.0), max_completion_tokens=4)
    encoded = setup.data.heldout_examples[0][:5]
    reward, how, key = RewardConfig(), EvaluationConfig(batch_size=2), jax.random.key(0)

    def run(known, keep):
        return evaluate_benchmark(policy, encoded, reward, 2, how, key, None, known, keep)

    whole, kept = run([], lambda _: None), []
    assert [found["number"] for found in whole] == list(range(5))
    assert len({tuple(found["texts"]) for found in whole}) > 1

    def interrupted(records):
        kept.extend(records)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([], interrupted)
    assert len(kept) == 2 and run(kept, lambda _: None) == whole
    assert run(whole, lambda _: pytest.fail("all questions have a record")) == whole
    assert np.mean([len(found["texts"]) for found in whole]) == 2
