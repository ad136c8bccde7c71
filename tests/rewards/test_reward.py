"""Scoring a batch: shapes, the sum of the parts, and gold answers checked beforehand."""

import numpy as np
import pytest

from nested_reft.data.examples import Example
from nested_reft.rewards.reward import RewardConfig, check_answers, score
from nested_reft.types import Prompts


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
    assert set(parts) == {"accuracy", "format"}
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
    check_answers([good, good])
    with pytest.raises(ValueError, match=r"source 'stories' has the gold answer 'seven'.*'How many\?'"):
        check_answers([good, Example("How many?", "seven", "stories")])
