"""Where rollouts start: the rules by hand, and what their draws look like over many prompts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nested_reft.dataset_reset import (
    ResetConfig,
    ResetState,
    choose,
    forced_fraction,
    reference_tokens,
    serving_shares,
    step_metrics,
    update,
    why_no_start,
)
from nested_reft.training.config import load_config
from nested_reft.types import Prompts, Scored, concat, take
from tests.scored_groups import scored

BACKWARD = ResetConfig(share=1.0, schedule="backward", stages=4, promote_at=0.75, window=4)


def prompts_of(count: int) -> Prompts:
    nothing = ("",) * count
    return Prompts(
        np.zeros((count, 1), np.int32), np.ones(count, int), np.zeros(count, int), nothing, nothing, ({},) * count
    )


def chosen(config: ResetConfig, lengths, group_size: int = 1, seed: int = 0, step: int = 0, stage: int = 0) -> Prompts:
    """Prefixes of references 1, 2, 3, ... of the given lengths, F = 9."""
    tokens = [list(range(1, length + 1)) for length in lengths]
    state, key = ResetState(stage), jax.random.key(seed)
    return choose(state, config, prompts_of(len(tokens)), tokens, key, step, group_size, 9)


def lengths_of(prompts: Prompts) -> np.ndarray:
    assert prompts.forced is not None
    return np.asarray(prompts.forced.length_BG)


def with_prefixes(accuracy_BG, forced_BG, **fields) -> Scored:
    """Scored groups whose completions had prefixes of these lengths, in references of 10 tokens."""
    groups = scored(accuracy_BG, **fields)
    rollouts = dataclasses.replace(groups.rollouts, forced_BG=np.array(forced_BG))
    prompts = dataclasses.replace(groups.prompts, reference_length_B=np.full(len(groups), 10))
    return dataclasses.replace(groups, rollouts=rollouts, prompts=prompts)


@pytest.mark.parametrize("per", ["group", "completion"])
def test_starts_are_uniform_and_prefixes_are_the_first_tokens(per):
    """n = 5: h is 1, 2, 3 or 4 with probability 1/4 each, so of 4000 draws 1000 with a deviation of 27."""
    groups = 4000 if per == "group" else 1000
    prompts = chosen(ResetConfig(share=1.0, per=per), [5] * groups, group_size=4)
    length_BG, tokens_BGF = lengths_of(prompts), np.asarray(prompts.forced.tokens_BGF)
    counts = np.bincount(length_BG[:, 0] if per == "group" else length_BG.ravel(), minlength=10)
    # Neither 0 nor n: both would be an easy mistake, of `randint(0, n)` and of `randint(1, n + 1)`.
    assert counts[1:5].sum() == counts.sum() == 4000
    assert abs(counts[1:5] - 1000).max() < 4 * 27
    assert (length_BG == length_BG[:, :1]).all() == (per == "group")
    position_F = np.arange(9)
    expected = np.where(position_F < length_BG[..., None], position_F + 1, 0)
    assert np.array_equal(tokens_BGF, expected)
    assert prompts.reference_length_B.tolist() == [5] * groups


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_the_observed_share_is_that_of_independent_draws(share):
    """Over 4000 prompts the share has a standard deviation of sqrt(p (1 - p) / 4000)."""
    is_reset = lengths_of(chosen(ResetConfig(share=share), [7] * 4000))[:, 0] > 0
    assert abs(is_reset.mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)
    # Not an exact fraction: the count of single batches varies.
    assert len({int(part.sum()) for part in is_reset.reshape(40, 100)}) > 3


def test_prompts_without_a_reference_are_not_reset():
    prompts = chosen(ResetConfig(share=1.0), [0, 2, 0], group_size=2)
    assert lengths_of(prompts).tolist() == [[0, 0], [1, 1], [0, 0]]
    assert prompts.reference_length_B.tolist() == [0, 2, 0]


def test_without_a_share_nothing_changes():
    prompts = prompts_of(2)
    assert choose(ResetState(), ResetConfig(), prompts, [[1, 2]] * 2, jax.random.key(0), 0, 4, 9) is prompts


def test_the_key_decides_and_a_share_does_not_move_the_starts():
    half, whole = (chosen(ResetConfig(share=share), [9] * 64) for share in (0.5, 1.0))
    reset_BG = lengths_of(half) > 0
    assert np.array_equal(lengths_of(half)[reset_BG], lengths_of(whole)[reset_BG])
    assert np.array_equal(lengths_of(half), lengths_of(chosen(ResetConfig(share=0.5), [9] * 64)))
    assert not np.array_equal(lengths_of(half), lengths_of(chosen(ResetConfig(share=0.5), [9] * 64, seed=1)))


@pytest.mark.parametrize(
    ("fields", "step", "stage", "expected"),
    [
        # 0.5 n of 2, 3, 5, 10 tokens is 1, 1.5, 2.5, 5; halves round up.
        ({"schedule": "fixed", "fraction": 0.5}, 7, 0, [1, 2, 3, 5]),
        # 0.95 n is 1.9, 2.85, 4.75, 9.5; the last token is never forced.
        ({"schedule": "fixed", "fraction": 0.95}, 0, 0, [1, 2, 4, 9]),
        # 0.01 n would be 0, which is no reset.
        ({"schedule": "fixed", "fraction": 0.01}, 0, 0, [1, 1, 1, 1]),
        # At a quarter of the way 0.8 has become 0.6: 1.2, 1.8, 3, 6.
        ({"schedule": "annealed", "fraction": 0.8, "steps": 40}, 10, 0, [1, 2, 3, 6]),
        ({"schedule": "annealed", "fraction": 0.8, "steps": 40}, 39, 0, [1, 1, 1, 1]),
        ({"schedule": "annealed", "fraction": 0.8, "steps": 40}, 40, 0, [0, 0, 0, 0]),
        # The first stage leaves one token to sample; stage 3 of 4 forces a quarter: 0.5, 0.75, 1.25, 2.5.
        ({"schedule": "backward", "stages": 4}, 0, 0, [1, 2, 4, 9]),
        ({"schedule": "backward", "stages": 4}, 0, 3, [1, 1, 1, 3]),
        ({"schedule": "backward", "stages": 4}, 0, 4, [0, 0, 0, 0]),
    ],
)
def test_starts_by_hand(fields, step, stage, expected):
    prompts = chosen(ResetConfig(share=1.0, **fields), [2, 3, 5, 10], step=step, stage=stage)
    assert lengths_of(prompts)[:, 0].tolist() == expected


def test_forced_fractions_by_hand():
    annealed = ResetConfig(schedule="annealed", fraction=0.6, steps=10)
    assert [forced_fraction(ResetState(), annealed, step) for step in (0, 5, 10, 20)] == [0.6, 0.3, 0.0, 0.0]
    assert forced_fraction(ResetState(), ResetConfig(), 3) is None


def test_backward_moves_on_once_a_full_window_is_right_often_enough():
    """Three of four is 0.75. The first stage forces 9 of 10 tokens. Free completions and those without a score do not
    count."""
    forced_BG = [[9, 9, 0, 0]]
    state = remembered(update(ResetState(), BACKWARD, with_prefixes([[1, 1, 0, 0]], forced_BG)))
    assert state == ResetState(0, (1.0, 1.0))
    unscored = with_prefixes([[0, 0, 0, 0]], forced_BG, scored_BG=[[False, False, True, True]])
    assert remembered(update(state, BACKWARD, unscored)) == state
    mastered = remembered(update(state, BACKWARD, with_prefixes([[0, 1, 0, 0]], forced_BG)))
    # What came before belongs to the stage that was mastered, so the memory is empty.
    assert mastered == ResetState(1, ())
    wrong = update(state, BACKWARD, with_prefixes([[0, 0, 1, 1]], forced_BG))
    assert remembered(wrong) == ResetState(0, (1.0, 1.0, 0.0, 0.0))


def test_backward_does_not_count_completions_of_an_earlier_stage():
    """A searcher that is ahead brings them after the stage has changed. The second of 4 stages forces 8 of 10 tokens;
    right answers from 9 would promote it."""
    late = with_prefixes([[1, 1, 1, 1]], [[9, 9, 9, 9]])
    assert remembered(update(ResetState(1), BACKWARD, late)) == ResetState(1)
    both = with_prefixes([[1, 1, 0, 1]], [[9, 8, 8, 9]])
    assert remembered(update(ResetState(1), BACKWARD, both)) == ResetState(1, (1.0, 0.0))


def test_backward_ends_at_the_prompt():
    state = ResetState(4, ())
    assert update(state, BACKWARD, with_prefixes([[1, 1, 1, 1]], [[1, 1, 1, 1]])).stage == 4


def test_other_schedules_remember_what_served_alone():
    batch = with_prefixes([[1, 1, 1, 1]], [[1, 1, 1, 1]])
    assert remembered(update(ResetState(), ResetConfig(share=1.0), batch)) == ResetState()
    assert update(ResetState(), ResetConfig(), batch) == ResetState()


def remembered(state: ResetState) -> ResetState:
    """All but which references have served."""
    return dataclasses.replace(state, served=frozenset())


def test_a_reference_has_served_once_any_rollout_started_from_it():
    """Of three prompts the first and the last are reset. Another text, answer or source is another reference."""
    first = with_prefixes([[0, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [2, 2]])
    names = dataclasses.replace(first.prompts, texts=("a", "b", "b"), answers=("1", "1", "2"))
    state = update(ResetState(candidates=5), ResetConfig(share=0.5), dataclasses.replace(first, prompts=names))
    assert len(state.served) == 2
    again = dataclasses.replace(first, prompts=dataclasses.replace(names, texts=("c", "b", "b")))
    assert len(update(state, ResetConfig(share=0.5), again).served) == 3
    other = dataclasses.replace(first, prompts=dataclasses.replace(names, source_B=names.source_B + 1))
    assert len(update(state, ResetConfig(share=0.5), other).served) == 4
    found = step_metrics(state, ResetConfig(share=0.5), dataclasses.replace(first, prompts=names))
    assert found["reset/coverage"] == 2 / 5


def test_the_state_survives_json():
    state = ResetState(2, (1.0, 0.0), frozenset({"b", "a"}), 7)
    assert ResetState.from_json(json.loads(json.dumps(state.to_json()))) == state
    # An earlier version kept two of the fields.
    assert ResetState.from_json({"stage": 2, "recent": [1.0]}) == ResetState(2, (1.0,))


@pytest.mark.parametrize(
    ("scores", "share", "expected"),
    [
        # beta 1/2: the mean quantile. Of four different scores that is 1/8, 3/8, 5/8, 7/8.
        ([3.0, -1.0, 7.0, 5.0], 0.5, [3 / 8, 1 / 8, 7 / 8, 5 / 8]),
        # Two equal scores share the quantiles from 1/4 to 3/4, wherever they stand.
        ([2.0, 1.0, 9.0, 2.0], 0.5, [1 / 2, 1 / 8, 7 / 8, 1 / 2]),
        # beta 1/3: the mean of q^2, (1/2)^3 / 3 / (1/2) = 1/12 and (1 - 1/8) / 3 / (1/2) = 7/12.
        ([0.0, 1.0], 1 / 3, [1 / 12, 7 / 12]),
        ([4.0, 4.0, 4.0], 0.3, [0.3] * 3),
        ([1.0], 0.8, [0.8]),
        ([1.0, 2.0], 1.0, [1.0, 1.0]),
    ],
)
def test_how_often_references_serve_by_hand(scores, share, expected):
    np.testing.assert_allclose(serving_shares(np.array(scores), share), expected, rtol=1e-12)


@pytest.mark.parametrize("share", [1e-3, 0.25, 0.9])
def test_a_preference_leaves_the_mean_share_alone(share):
    score_N = np.random.default_rng(0).integers(0, 40, 64).astype(float)
    found_N = serving_shares(score_N, share)
    assert found_N.mean() == pytest.approx(share) and found_N.min() >= 0 and found_N.max() <= 1
    assert (np.diff(found_N[np.argsort(score_N)]) >= -1e-12).all() and found_N.max() > found_N.min()


def test_references_serve_as_often_as_their_score_says():
    """beta 1/2. Half of the prompts have no reference, and are not ranked whatever their score; of the others the lower
    half serves with 1/4 and the upper half with 3/4. 1000 draws have a deviation of 14 in each."""
    tokens, score_B = [[1, 2, 3], [], [1, 2, 3], []] * 1000, np.array([1.0, 9.0, 2.0, -9.0] * 1000)
    config, key = ResetConfig(share=0.5, prefer="likely"), jax.random.key(0)
    prompts = choose(ResetState(), config, prompts_of(4000), tokens, key, 0, 1, 9, score_B)
    served = (lengths_of(prompts)[:, 0] > 0).reshape(1000, 4).sum(axis=0)
    assert served[1] == served[3] == 0
    assert abs(served[0] - 250) < 4 * 14 and abs(served[2] - 750) < 4 * 14
    assert np.array_equal(prompts.reference_score_B, score_B)


def test_bias_by_hand():
    """Lengths 2, 4 and 6 have mean 4 and deviation 1.63; the prompt without a reference is not among them. The shortest
    served once and the longest three times, so served ones have 5 on average. The scores served are those of 0 and 3,
    with mean 2.25 over 1."""
    batch = with_prefixes([[0, 0, 0]] * 4, [[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]])
    prompts = dataclasses.replace(
        batch.prompts,
        reference_length_B=np.array([2, 4, 6, 0]),
        reference_score_B=np.array([0.0, 0.0, 3.0, 99.0], np.float32),
    )
    found = step_metrics(ResetState(), ResetConfig(share=0.5), dataclasses.replace(batch, prompts=prompts))
    assert found["reset/length_bias"] == pytest.approx((5 - 4) / np.sqrt(8 / 3))
    assert found["reset/score_bias"] == pytest.approx((2.25 - 1) / np.sqrt(2))
    nothing = with_prefixes([[0, 0]], [[0, 0]])
    assert "reset/length_bias" not in step_metrics(ResetState(), ResetConfig(share=0.5), nothing)


def test_prefixes_stay_with_their_prompts():
    prompts = chosen(ResetConfig(share=1.0), [2, 5, 9])
    back = take(concat([take(prompts, [2]), take(prompts, [0, 1])]), [1, 2, 0])
    assert np.array_equal(lengths_of(back), lengths_of(prompts))
    assert back.reference_length_B.tolist() == [2, 5, 9]


def test_metrics_by_hand():
    """Of eight completions three were reset, at 0.1, 0.5 and 0.9 of 10 tokens; one of them has no score."""
    batch = with_prefixes(
        [[1, 0, 0, 0], [1, 1, 0, 0]],
        [[1, 0, 5, 0], [9, 0, 0, 0]],
        scored_BG=[[True, True, False, True], [True] * 4],
    )
    found = step_metrics(ResetState(1), dataclasses.replace(BACKWARD), batch)
    assert found["reset/share"] == 3 / 8 and found["reset/referenced"] == 1 and found["reset/forced_tokens"] == 15
    assert found["reset/fraction"] == pytest.approx([0.14, 0.3, 0.5, 0.7, 0.86])
    assert found["reset/accuracy"] == 1 and found["reset/free_accuracy"] == pytest.approx(1 / 5)
    assert found["reset/stage"] == 1
    without = step_metrics(ResetState(), ResetConfig(share=0.1), with_prefixes([[1, 0]], [[0, 0]]))
    assert "reset/accuracy" not in without and "reset/fraction" not in without and "reset/stage" not in without


def test_references_become_completions():
    assert reference_tokens("12", lambda text: [int(digit) for digit in text], 7) == [1, 2, 7]
    assert reference_tokens(None, lambda text: [], 7) == []


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([], "missing"),
        ([7], "shorter than two tokens"),
        ([1, 7], None),
        ([1, 2, 3, 7], None),
        ([1, 2, 3, 4, 7], "longer than rollout.max_completion_tokens (4)"),
    ],
)
def test_what_cannot_serve(tokens, reason):
    assert why_no_start(tokens, 4) == reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": -0.1}, r"reset.share is -0.1; allowed is 0 <= share <= 1"),
        ({"share": 1.5}, r"reset.share is 1.5; allowed is 0 <= share <= 1"),
        ({"share": float("nan")}, r"reset.share is nan; allowed is 0 <= share <= 1"),
        ({"schedule": "fixed"}, r"reset.fraction is not set; reset.schedule 'fixed' needs it"),
        (
            {"fraction": 0.5},
            r"reset.fraction is 0.5, but reset.schedule is 'uniform'; only 'fixed' or 'annealed' reads it",
        ),
        ({"schedule": "fixed", "fraction": 1.0}, r"reset.fraction is 1.0; allowed is 0 < fraction < 1"),
        ({"schedule": "annealed", "fraction": 0.5}, r"reset.steps is not set; reset.schedule 'annealed' needs it"),
        ({"schedule": "annealed", "fraction": 0.5, "steps": 0}, r"reset.steps is 0; allowed is 1 or more"),
        ({"stages": 3}, r"reset.stages is 3, but reset.schedule is 'uniform'; only 'backward' reads it"),
        ({"schedule": "backward", "stages": 0}, r"reset.stages is 0; allowed is 1 or more"),
        ({"window": 0}, r"reset.window is 0; allowed is 1 or more"),
        ({"promote_at": 0.0}, r"reset.promote_at is 0.0; allowed is 0 < promote_at <= 1"),
        ({"share": 1.0, "prefer": "short"}, r"reset.prefer is .short. and reset.share 1: every reference serves"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResetConfig(**fields)


@pytest.mark.parametrize(
    ("name", "value"), [("schedule", "late"), ("per", "token"), ("references", "best"), ("prefer", "new")]
)
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(ValueError, match=f"reset.{name} is '{value}'"):
        load_config("tiny", reset={name: value})
