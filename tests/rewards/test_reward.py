"""Scoring a batch: shapes, the sum of the parts, and gold answers checked beforehand."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_reft.backends import cores
from nested_reft.data.examples import Example
from nested_reft.data.sources import DatasetSource, TaskSource, load_source
from nested_reft.rewards.limits import RewardError
from nested_reft.rewards.reward import RewardConfig, check_answers, component_metrics, score
from nested_reft.types import Prompts
from tests.shared_data import original_files

NOT_JSON: Any = {"source_dataset": "chain_sum", "source_parameters": {}, ("a", 1): 2}  # a tuple as a key


def make_prompts(answers):
    size = len(answers)
    return Prompts(
        tokens_BP=np.zeros((size, 1), dtype=np.int32),
        length_B=np.ones(size, dtype=np.int32),
        source_B=np.zeros(size, dtype=np.int32),
        texts=("",) * size,
        answers=tuple(answers),
        metadata=({},) * size,
    )


def test_reward_is_accuracy_plus_weighted_format():
    texts = [["7", "8", "seven"], ["9", "9", "7"]]
    finished = np.array([[True, True, True], [True, False, True]])
    reward, accuracy, scored, parts = score(texts, make_prompts(["7", "9"]), finished, RewardConfig(format_weight=0.25))
    # Row 0: right; wrong but a number; no number. Row 1 is held to its own answer, and its
    # second completion was cut off.
    expected_accuracy = [[1, 0, 0], [1, 0, 0]]
    expected_format = [[1, 1, 0], [1, 0, 1]]
    np.testing.assert_array_equal(accuracy, expected_accuracy)
    np.testing.assert_array_equal(parts["accuracy"], expected_accuracy)
    np.testing.assert_array_equal(parts["format"], expected_format)
    np.testing.assert_array_equal(reward, [[1.25, 0.25, 0], [1.25, 0, 0.25]])
    np.testing.assert_array_equal(scored, np.ones((2, 3), dtype=bool))
    assert set(parts) == {"accuracy", "format", "timed_out", "crashed", "failed"}
    assert {a.dtype for a in (reward, accuracy, *parts.values())} == {np.dtype(np.float32)}


def test_format_earns_nothing_by_default():
    reward, accuracy, _, _ = score([["8", "7"]], make_prompts(["7"]), np.ones((1, 2), dtype=bool), RewardConfig())
    np.testing.assert_array_equal(reward, [[0, 1]])
    np.testing.assert_array_equal(accuracy, [[0, 1]])


@pytest.mark.parametrize(
    ("texts", "answers", "shape"),
    [
        ([["7", "7"], ["7"]], ["7", "7"], (2, 2)),
        ([["7", "7"]], ["7", "7"], (2, 2)),
        ([["7", "7"]], ["7", "7"], (1, 2)),
        ([["7", "7"]], ["7"], (1, 3)),
    ],
)
def test_shapes_that_disagree_are_refused(texts, answers, shape):
    with pytest.raises(ValueError, match=r"texts per prompt and finished_BG of shape .*all must agree"):
        score(texts, make_prompts(answers), np.ones(shape, dtype=bool), RewardConfig())


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_bad_format_weight_is_refused(weight):
    with pytest.raises(ValueError, match=f"reward.format_weight is {weight}; allowed is a finite number, 0 or more"):
        RewardConfig(format_weight=weight)


def test_unreadable_gold_answer_is_refused_with_source_question_and_answer():
    good = Example("1 + 1 =", "2", "sums")
    check_answers([good, good], RewardConfig())
    with pytest.raises(ValueError, match=r"source 'stories' has the gold answer 'seven'.*'How many\?'"):
        check_answers([good, Example("How many?", "seven", "stories")], RewardConfig())


# workers

FUNCTIONS = str(Path(__file__).with_name("reward_functions.py"))
ADVERSARIAL = [
    " ".join(map(str, range(1, 1001))),
    r"\boxed{" + " ".join(map(str, range(1, 13))) + "}",
    r"\boxed{" + ",".join(map(str, range(1, 13))) + "}",
    " ".join(rf"\boxed{{{n}}}" for n in range(1, 1001)),
    "".join(f"<answer>{n}</answer>" for n in range(1, 1001)),
    "",
    r"\boxed{}",
    "<answer></answer>",
    "9^{9^{9^9}}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{10000000000!}",
    r"\boxed{{{{{18",
    r"\boxed{18",
    r"18}}}}",
    r"\boxed{}18}",
    "<answer>18",
    "18",
    "The answer is 18",
    r"\boxed{18 or 19}",
    r"\boxed{17, 18}",
    r"\boxed{x}",
    r"\boxed{٨١}",
    r"\boxed{１８}",
    r"\boxed{18²}",
    r"\boxed{nan}",
    r"\boxed{\infty}",
    r"\boxed{__import__('os')._exit(0)}",
    r"\boxed{\input{/etc/passwd}}",
    r"\boxed{" * 1000 + "18",
    r"\boxed{" + "9" * 1_000_000 + "}",
    "18 " * 333_333,
    "<answer>" * 120_000,
    "\x00\ud800",
]


def score_texts(texts, answers, config, metadata=None, **changes):
    prompts = dataclasses.replace(make_prompts(answers), metadata=metadata or ({},) * len(answers), **changes)
    return score(texts, prompts, np.ones((len(answers), len(texts[0])), dtype=bool), config)


def test_all_gsm8k_test_solutions_are_right_and_wrong_numbers_are_not(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets", reason="needs the optional package tensorflow-datasets")
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    _, heldout = load_source(DatasetSource("gsm8k", "gsm8k", None, 1319, 0, original_files("gsm8k"), checker="math"))
    config = RewardConfig(checker="math")
    check_answers(heldout, config)
    # The solution as published; as a box that only math-verify can read; and off by one.
    texts = [
        [e.reference or "", rf"\boxed{{\frac{{{2 * int(e.answer)}}}{{2}}}}", rf"\boxed{{{int(e.answer) + 1}}}"]
        for e in heldout
    ]
    _, accuracy_BG, scored_BG, _ = score_texts(texts, [e.answer for e in heldout], config)
    assert scored_BG.all()
    assert accuracy_BG.sum(axis=0).tolist() == [1319, 1319, 0]


@pytest.mark.parametrize("checker", ["math", "task", "exact"])
def test_no_adversarial_text_is_right_and_none_hangs(checker):
    if checker != "exact":
        pytest.importorskip(
            {"math": "math_verify", "task": "reasoning_gym"}[checker], reason="needs an optional package"
        )
    config = RewardConfig(checker=checker, time_limit_seconds=2.0)
    metadata = ({"source_dataset": "chain_sum", "source_parameters": {}},)
    texts = [text for text in ADVERSARIAL if checker == "math" or text not in ("18", "The answer is 18")]
    start = time.monotonic()
    _, accuracy_BG, scored_BG, parts = score_texts([texts], ["18"], config, metadata)
    assert not accuracy_BG.any()
    assert time.monotonic() - start < 30
    unscored = [text for text, scored in zip(texts, scored_BG[0], strict=True) if not scored]
    # What takes for ever is not called wrong; nothing else is left without a score.
    assert set(unscored) <= {r"\boxed{9^{9^{9^9}}}", r"\boxed{10000000000!}"}
    if checker != "exact":
        assert parts["timed_out"].sum() + parts["failed"].sum() + parts["crashed"].sum() == len(unscored)


def test_a_tasks_own_verifier_wants_full_marks():
    pytest.importorskip("reasoning_gym", reason="needs the optional package reasoning-gym")
    source = TaskSource("c", "countdown", {"min_numbers": 3, "max_numbers": 3}, 4, 4, 0, checker="task")
    train, _ = load_source(source)
    check_answers(train, RewardConfig())
    example = train[0]
    texts = [[example.answer, f"<answer>{example.answer}</answer>", rf"so \boxed{{{example.answer}}}", "0", "1 + 1"]]
    _, accuracy, _, parts = score_texts(
        texts, [example.answer], RewardConfig(), (example.metadata,), checkers=("task",)
    )
    np.testing.assert_array_equal(accuracy, [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(parts["format"], [[0, 1, 1, 0, 0]])


def test_tasks_whose_metadata_is_not_json_or_whose_answer_is_open():
    pytest.importorskip("reasoning_gym", reason="needs the optional package reasoning-gym")
    for task in ("gsm_symbolic", "graph_color"):  # fractions in its metadata; no gold answer, since many are right
        train, _ = load_source(TaskSource(task, task, {}, 2, 1, 0, checker="task"))
        check_answers(train, RewardConfig())
        answers, metadata = ([e.answer for e in train], tuple(e.metadata for e in train))
        _, accuracy, scored, _ = score_texts([["0.123"], ["nonsense"]], answers, RewardConfig(checker="task"), metadata)
        assert scored.all() and not accuracy.any()
    coloring = json.dumps(train[0].metadata["possible_answer"])
    assert score_texts([[coloring]], ["None"], RewardConfig(checker="task"), (train[0].metadata,))[1] == 1


def test_each_prompt_has_its_own_checker():
    texts = [["7", r"\boxed{7}"], ["7", r"\boxed{7}"]]
    _, accuracy, _, _ = score_texts(texts, ["7", "7"], RewardConfig(), checkers=(None, "math"))
    np.testing.assert_array_equal(accuracy, [[1, 1], [0, 1]])


@pytest.mark.parametrize(("accept", "right"), [(True, [1, 1, 1]), (False, [0, 1, 1])])
def test_unevaluated_arithmetic_is_right_where_the_setting_says_so(accept, right):
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    config = RewardConfig(checker="math", accept_unevaluated=accept)
    texts = [[r"\boxed{12 \times 37}", r"\boxed{12 \times 37 = 444}", r"\boxed{444}"]]
    _, accuracy, _, parts = score_texts(texts, ["444"], config)
    np.testing.assert_array_equal(accuracy, [right])
    np.testing.assert_array_equal(parts["format"], [[1, 1, 1]])


def test_parts_have_the_same_names_whether_or_not_a_worker_was_asked():
    """Dynamic sampling puts batches together: one without a marked answer asks no worker."""
    pytest.importorskip("math_verify", reason="needs the optional package math-verify")
    batches = [
        score_texts([[text]], ["7"], RewardConfig(checker="math"))[3] for text in ("no", r"\boxed{\frac{14}{2}}")
    ]
    assert batches[0].keys() == batches[1].keys() and batches[1]["accuracy"] == 1


def test_a_function_adds_to_the_reward_or_decides_it():
    texts = [["7", "x" * 20]]
    config = RewardConfig(function=f"{FUNCTIONS}:length", function_weight=-0.5)
    reward, accuracy, _, parts = score_texts(texts, ["7"], config)
    np.testing.assert_allclose(parts["function"], [[0.1, 2.0]])
    np.testing.assert_array_equal(accuracy, [[1, 0]])
    np.testing.assert_allclose(reward, [[1 - 0.05, -1.0]])
    # As the checker: right from 1 on, and the accuracy is not counted again.
    reward, accuracy, _, parts = score_texts(texts, ["7"], dataclasses.replace(config, checker="function"))
    np.testing.assert_array_equal(accuracy, [[0, 1]])
    np.testing.assert_array_equal(parts["accuracy"], accuracy)
    np.testing.assert_allclose(reward, [[-0.05, -1.0]])


def test_safety_is_a_part_that_changes_no_reward():
    """It has a function of its own beside that of the reward; where it fails, the completion has no score."""
    config = RewardConfig(function=f"{FUNCTIONS}:length", safety=f"{FUNCTIONS}:misbehave")
    reward, _, scored, parts = score_texts([["7", "77", "raise"]], ["7"], config)
    assert parts["safety"].tolist() == [[1, 0, 0]] and scored.tolist() == [[True, True, False]]
    np.testing.assert_allclose(reward, [[1 + 0.1, 0.2, 0]], rtol=1e-6)


def test_a_completion_that_was_cut_off_is_not_right_whatever_the_checker():
    config = RewardConfig(function=f"{FUNCTIONS}:length")
    prompts = dataclasses.replace(make_prompts(["7"] * 3), checkers=("exact", "math", "function"))
    texts = [["7"], [r"\boxed{7}"], ["x" * 20]]
    assert score(texts, prompts, np.ones((3, 1), bool), config)[1].tolist() == [[1], [1], [1]]
    assert score(texts, prompts, np.zeros((3, 1), bool), config)[1].tolist() == [[0], [0], [0]]


def test_a_function_is_told_what_it_needs():
    prompts = dataclasses.replace(make_prompts(["7"]), texts=("3 + 4 =",), metadata=({"level": 2},))
    config = RewardConfig(function=f"{FUNCTIONS}:show")
    _, _, scored, parts = score([["x"]], prompts, np.zeros((1, 1), bool), config)
    assert scored.all() and parts["function"] == 0.25


def test_what_has_no_score_is_not_wrong_and_is_counted(caplog):
    config = RewardConfig(function=f"{FUNCTIONS}:misbehave", time_limit_seconds=1.0, format_weight=0.5)
    reward, accuracy, scored, parts = score_texts([["7", "hang", "exit", "raise"]], ["7"], config)
    np.testing.assert_array_equal(scored, [[True, False, False, False]])
    np.testing.assert_array_equal(reward, [[2.5, 0, 0, 0]])
    np.testing.assert_array_equal(accuracy, [[1, 0, 0, 0]])
    assert [parts[name].tolist() for name in ("timed_out", "crashed", "failed")] == [
        [[0, 1, 0, 0]],
        [[0, 0, 1, 0]],
        [[0, 0, 0, 1]],
    ]
    metrics = component_metrics(parts, scored)
    assert metrics["unscored/timed_out"] == metrics["unscored/crashed"] == metrics["unscored/failed"] == 1
    assert metrics["reward/accuracy"] == metrics["reward/function"] == 1
    assert "3 of 4 checks have no score and do not count (timed_out 1, crashed 1, failed 1)" in caplog.text
    assert component_metrics(parts, np.zeros((1, 4), bool)).keys() == {
        f"unscored/{f}" for f in ("timed_out", "crashed", "failed")
    }


def test_a_reward_that_float32_cannot_hold_names_its_cause():
    config = RewardConfig(function=f"{FUNCTIONS}:length", function_weight=1e16)
    with pytest.raises(
        RewardError, match=r"reward.function_weight is 1e\+16, which times the function of 2 is more than"
    ):
        score_texts([["x" * 20]], ["7"], config)


def test_a_function_is_called_before_training():
    examples = [Example("q", "7", "s")]
    check_answers(examples, RewardConfig(function=f"{FUNCTIONS}:length"))
    with pytest.raises(ValueError, match=r"gives no score for the gold answer of source 's', '7': KeyError: 'gold'"):
        check_answers(examples, RewardConfig(function=f"{FUNCTIONS}:wants_a_field"))
    # One that fails for some completions only is left to the run.
    check_answers(
        [Example("q", a, "s") for a in ("raise", "7")], RewardConfig("function", function=f"{FUNCTIONS}:misbehave")
    )


def test_an_edited_function_counts_from_the_next_run_on(tmp_path):
    file = tmp_path / "mine.py"
    config = RewardConfig("function", function=f"{file}:reward", workers=1)
    examples = [Example("1 + 1", "2", "s", {}, None)]

    def edit(value):
        file.write_text(f"def reward(completion, example):\n    return {value}\n")
        os.utime(file, (value, value))  # a clock may be too coarse for two edits of a test

    edit(1)
    check_answers(examples, config)
    assert score_texts([["2"]], ["2"], config)[0] == 1
    edit(3)
    assert score_texts([["2"]], ["2"], config)[0] == 1  # the run goes on as it began
    check_answers(examples, config)
    assert score_texts([["2"]], ["2"], config)[0] == 3


def test_overlong_completions_are_punished():
    config = RewardConfig(overlong_cache_tokens=8, overlong_weight=2.0)
    prompts, finished = make_prompts(["7"]), np.array([[True, True, False]])
    length_BG = np.array([[12, 16, 20]], np.int32)
    reward, accuracy, _, parts = score([["7", "7", "7"]], prompts, finished, config, length_BG, 20)
    np.testing.assert_array_equal(parts["overlong"], [[0, -0.5, -1]])
    np.testing.assert_array_equal(accuracy, [[1, 1, 0]])
    np.testing.assert_array_equal(reward, [[1, 0, -2]])
    with pytest.raises(ValueError, match="score needs length_BG and max_completion_tokens"):
        score([["7", "7", "7"]], prompts, finished, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": "rewards"}, "reward.function is 'rewards'; allowed is 'package.module:function' or"),
        ({"function": "rewards:"}, "reward.function is 'rewards:'; allowed"),
        ({"safety": "safe"}, "reward.safety is 'safe'; allowed is 'package.module:function' or"),
        ({"checker": "function"}, "reward.checker is 'function', but reward.function is None"),
        ({"function_weight": float("nan")}, "reward.function_weight is nan; allowed"),
        ({"function_weight": -1e39}, r"reward.function_weight is -1e\+39; allowed is at most 1e\+16"),
        ({"format_weight": 1e39}, r"reward.format_weight is 1e\+39; allowed is at most 1e\+16"),
        ({"overlong_weight": -1.0}, "reward.overlong_weight is -1.0; allowed"),
        ({"overlong_cache_tokens": -1}, "reward.overlong_cache_tokens is -1; allowed is 0 or more"),
        ({"time_limit_seconds": 0.0}, "reward.time_limit_seconds is 0.0; allowed is more than 0"),
        ({"workers": 0}, "reward.workers is 0; allowed is 1 or more"),
        ({"memory_gib": -1.0}, "reward.memory_gib is -1.0; allowed"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**changes)


@pytest.mark.parametrize(
    ("example", "config", "message"),
    [
        (Example("q", "7", "s", checker="function"), RewardConfig(), "reward.function is None"),
        (Example("q", "7", "s", checker="task"), RewardConfig(), "which is for reasoning-gym tasks only"),
        (
            Example("q", "7", "s", NOT_JSON, checker="task"),
            RewardConfig(),
            "source 's' has metadata that JSON cannot keep",
        ),
        (
            Example("q", "7", "s", NOT_JSON),
            RewardConfig(function=f"{FUNCTIONS}:length"),
            "source 's' has metadata that JSON cannot keep",
        ),
        (
            Example("q", "7", "s"),
            RewardConfig(function="no_such_package:f"),
            "reward.function is 'no_such_package:f', which",
        ),
        (
            Example("q", "7", "s"),
            RewardConfig(safety="no_such_package:f"),
            "reward.safety is 'no_such_package:f', which does not load",
        ),
        (
            Example("q", "9" * 65, "s"),
            RewardConfig(),
            "'exact' cannot read: the exact-answer reward needs numeric answers",
        ),
        (
            Example("q", "1e-05", "s"),
            RewardConfig(),
            "'exact' cannot read: the exact-answer reward needs numeric answers",
        ),
        (
            Example("q", "x" * 10_001, "s", {"source_dataset": "chain_sum", "source_parameters": {}}, checker="task"),
            RewardConfig(),
            "'task' cannot read: a completion that repeats it is not right",
        ),
        (
            Example("q", r"\frac{1}{", "s", checker="math"),
            RewardConfig(),
            r"source 's' has the gold answer .*checker 'math'",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(example, config, message):
    with pytest.raises(ValueError, match=message):
        check_answers([example], config)


def test_missing_math_verify_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"'math' needs the package math-verify .*pip install math-verify"):
        check_answers([Example("q", "x", "s", checker="math")], RewardConfig(time_limit_seconds=7.0))


def test_workers_are_as_many_as_the_cores_by_default(monkeypatch):
    """A container may give a process fewer cores than the host has."""
    assert RewardConfig().workers is None
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
