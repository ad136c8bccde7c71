"""The curriculum: who is drawn, what is remembered, when a level is left, what is said about it.

The letters are those of the DUMP identities: (a) unseen first, (b) orders, (c) softmax, (d) window,
(e) absolute values, (f) saturation, (g) counts, (h) draws follow P, (i) one source, (j) hand-over,
(k) resuming, (l) validation. (k) and (l) through a whole trainer are in `training/test_trainer.py`.
"""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.curriculum import (
    CurriculumConfig,
    CurriculumState,
    SourceMemory,
    choose,
    explain,
    exploration_bonus,
    learnability,
    probabilities,
    step_metrics,
    update,
    update_by_advantages,
)
from nested_reft.estimators.advantages import group_advantages
from tests.scored_groups import scored

UNIFORM = CurriculumConfig("uniform")
EASY_TO_HARD = CurriculumConfig("easy_to_hard", promote_at=0.75, window=4)
DUMP = CurriculumConfig("dump")
GREEDY = CurriculumConfig("dump", temperature=0.0)


def start(num_sources: int, level: int = 0) -> CurriculumState:
    return dataclasses.replace(CurriculumState.start([1] * num_sources), level=level)


def memories(*count_and_sizes: tuple[int, list[float]]) -> CurriculumState:
    """A state from (count, absolute advantages) per source."""
    return CurriculumState(
        tuple(SourceMemory(1, count, tuple(sizes), (0.0,) * len(sizes)) for count, sizes in count_and_sizes)
    )


def step(state, accuracy_BG, source_B=None, scored_BG=None, config=EASY_TO_HARD, advantage_BG=None):
    """One update; by default all prompts are of the current level, all are scored, advantages are zero."""
    accuracy_BG = np.array(accuracy_BG, dtype=np.float32)
    if source_B is None:
        source_B = [state.level] * len(accuracy_BG)
    advantage_BG = np.zeros_like(accuracy_BG) if advantage_BG is None else np.array(advantage_BG, dtype=np.float32)
    scored_BG = np.ones_like(accuracy_BG, dtype=bool) if scored_BG is None else np.array(scored_BG, dtype=bool)
    return update_by_advantages(state, config, np.array(source_B, dtype=np.int32), advantage_BG, accuracy_BG, scored_BG)


def advantages(state, advantage_BG, source_B, config=DUMP, scored_BG=None):
    """One update with these advantages; accuracies are zero."""
    advantage_BG = np.array(advantage_BG, dtype=np.float32)
    return step(state, np.zeros_like(advantage_BG), source_B, scored_BG, config, advantage_BG)


def recent(state: CurriculumState) -> tuple[float, ...]:
    return state.sources[state.level].accuracy


# fixed probabilities


def test_uniform_draws_every_slot_independently_and_evenly():
    state = start(3)
    np.testing.assert_allclose(probabilities(state, UNIFORM), [1 / 3] * 3, rtol=1e-6)
    source = choose(state, UNIFORM, jax.random.key(0), 3000)
    # Standard deviation of each count: sqrt(3000 * 1/3 * 2/3) = 25.8; five of them.
    np.testing.assert_allclose(np.bincount(source, minlength=3), 1000, atol=129)
    # Independent slots repeat their neighbour's source a third of the time; a quota or a cycle does not.
    assert abs(np.mean(source[1:] == source[:-1]) - 1 / 3) < 0.05


def test_choice_is_the_keys_alone():
    state = start(4)
    first, same, other = (choose(state, UNIFORM, jax.random.key(k), 64) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_proportional_goes_by_size_and_static_by_weights():
    state = CurriculumState.start([100, 300, 600])
    np.testing.assert_allclose(probabilities(state, CurriculumConfig("proportional")), [0.1, 0.3, 0.6])
    static = CurriculumConfig("static", weights=(2.0, 0.0, 6.0))
    np.testing.assert_allclose(probabilities(state, static), [0.25, 0, 0.75])
    assert 1 not in choose(state, static, jax.random.key(0), 500)


@pytest.mark.parametrize(
    "config", [UNIFORM, CurriculumConfig("proportional"), CurriculumConfig("static", weights=(1.0, 3.0))]
)
def test_fixed_probabilities_ignore_what_happened(config):
    state = start(2)
    after = advantages(state, [[1.0, -1.0] * 200], [1], config)
    np.testing.assert_array_equal(probabilities(after, config), probabilities(state, config))


# DUMP


def test_ucb_and_softmax_by_hand():
    """L = (0.5, 0.2), n = (3, 1), N = 4: bonus sqrt(2 ln 5 / 4) = 0.897, sqrt(2 ln 5 / 2) = 1.269.

    UCB = (1.397, 1.469). With N instead of N + 1 the bonuses would be 0.833 and 1.177, with n
    instead of n + 1 they would be 1.036 and 1.794.
    """
    state = memories((3, [0.4, 0.5, 0.6]), (1, [0.2]))
    np.testing.assert_allclose(learnability(state), [0.5, 0.2])
    np.testing.assert_allclose(exploration_bonus(state), [0.897061, 1.268636], rtol=1e-5)
    odds = math.exp((0.5 + 0.897061 - 0.2 - 1.268636) / 0.1)
    np.testing.assert_allclose(probabilities(state, DUMP), [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-4)


def test_a_all_tie_before_the_first_step_and_an_unseen_source_comes_first_after():
    assert (exploration_bonus(start(5)) == 0).all()
    for config in (DUMP, GREEDY):
        np.testing.assert_allclose(probabilities(start(5), config), 0.2)
    state = memories((1024, [0.9] * 300), (0, []), (1024, [0.9] * 300))
    # The never-seen arm: sqrt(2 ln 2049) = 3.9, against 0.9 + 0.12.
    np.testing.assert_allclose(exploration_bonus(state)[1], 3.905, atol=1e-3)
    assert probabilities(state, DUMP)[1] > 0.999999


def test_b_order_follows_learnability_at_equal_counts_and_fewer_responses_at_equal_learnability():
    equal_counts = memories((50, [0.1]), (50, [0.7]), (50, [0.4]))
    assert np.argsort(probabilities(equal_counts, DUMP)).tolist() == [0, 2, 1]
    equal_learnability = memories((10, [0.5]), (90, [0.5]), (40, [0.5]))
    assert np.argsort(probabilities(equal_learnability, DUMP)).tolist() == [1, 2, 0]


def test_c_probabilities_are_a_softmax():
    state = memories((40, [0.1]), (40, [0.7]), (40, [0.4]))
    shifted = memories((40, [5.1]), (40, [5.7]), (40, [5.4]))  # every UCB up by 5
    for temperature in (0.0, 1e-3, 0.1, 1.0, 1e6):
        config = CurriculumConfig("dump", temperature=temperature)
        probability_M = probabilities(state, config)
        assert probability_M.sum() == pytest.approx(1)
        np.testing.assert_allclose(probability_M, probabilities(shifted, config), atol=1e-9)
    for cold in (0.0, 1e-4):
        np.testing.assert_allclose(
            probabilities(state, CurriculumConfig("dump", temperature=cold)), [0, 1, 0], atol=1e-9
        )
    np.testing.assert_allclose(probabilities(state, CurriculumConfig("dump", temperature=1e6)), 1 / 3, atol=1e-6)


def test_d_the_window_keeps_exactly_the_last_responses_of_its_source():
    config = CurriculumConfig("dump", window=3)
    state = advantages(start(2), [[0.1, 0.2], [0.9, 0.8], [0.3, 0.4]], [0, 1, 0], config)
    np.testing.assert_allclose(state.sources[0].advantage_size, [0.2, 0.3, 0.4], rtol=1e-6)
    np.testing.assert_allclose(state.sources[1].advantage_size, [0.9, 0.8], rtol=1e-6)
    np.testing.assert_allclose(learnability(state), [0.3, 0.85], rtol=1e-6)


def test_e_signed_advantages_that_cancel_count_by_their_size():
    state = advantages(start(1), [[0.5, -0.5, 1.0, -1.0]], [0])
    assert learnability(state)[0] == pytest.approx(0.75)  # 0, were the mean taken first


def test_f_a_saturated_source_decays_to_nothing():
    state = advantages(start(2), [[0.9, -0.9]] * 200, [0] * 200)
    assert learnability(state)[0] == pytest.approx(0.9)
    state = advantages(state, [[0.0, 0.0]] * 75, [0] * 75)
    assert learnability(state)[0] == pytest.approx(0.45)  # half of the window of 300 is new
    state = advantages(state, [[0.0, 0.0]] * 75, [0] * 75)
    assert learnability(state)[0] == 0


def test_g_counts_are_scored_responses():
    scored_BG = [[True, True, False], [True, False, False], [True, True, True]]
    state = advantages(start(3), [[0.5] * 3] * 3, [0, 0, 2], scored_BG=scored_BG)
    assert [source.count for source in state.sources] == [3, 0, 3]
    assert [len(source.advantage_size) for source in state.sources] == [3, 0, 3]


def test_unscored_responses_may_have_any_advantage_and_scored_ones_must_be_finite():
    state = advantages(start(1), [[0.5, math.nan]], [0], scored_BG=[[True, False]])
    assert state.sources[0].advantage_size == (0.5,)
    with pytest.raises(ValueError, match="an advantage that is not finite"):
        advantages(start(1), [[0.5, math.nan]], [0])


def test_h_draws_follow_the_probabilities():
    state = memories((100, [0.30]), (100, [0.45]), (100, [0.20]), (100, [0.50]))
    probability_M = probabilities(state, DUMP)
    assert probability_M.min() > 0.01  # all of them are tested
    count_M = np.bincount(choose(state, DUMP, jax.random.key(3), 8000), minlength=4)
    expected_M = 8000 * probability_M
    # Chi-square with 3 degrees of freedom exceeds 16.3 with probability 0.001.
    assert ((count_M - expected_M) ** 2 / expected_M).sum() < 16.3
    assert ((count_M - 2000) ** 2 / 2000).sum() > 16.3  # and uniform draws would not pass


@pytest.mark.parametrize("config", [DUMP, GREEDY, UNIFORM, EASY_TO_HARD])
def test_i_one_source_is_no_curriculum(config):
    state = advantages(start(1), [[0.5, -0.5]], [0], config)
    assert probabilities(state, config).tolist() == [1.0]
    assert (choose(state, config, jax.random.key(0), 64) == 0).all()


@pytest.mark.parametrize("advantage", ["group_std", "group_mean", "leave_one_out"])
def test_j_hand_over_from_easy_to_hard_on_a_drifting_bandit(advantage):
    """Each source gets easier with every mixed group of it, and the next one a little as well.

    The temperature is the documented one for each advantage.
    """
    config = CurriculumConfig("dump", window=128, temperature=0.1 if advantage == "group_std" else 0.05)
    rng, steps = np.random.default_rng(0), 240
    skill_M = np.array([0.0, -3.0, -6.0, -9.0])  # log-odds of a right answer
    state, probability_MxT = start(4), np.zeros((4, steps))
    for t in range(steps):
        probability_MxT[:, t] = probabilities(state, config)
        source_B = choose(state, config, jax.random.key(t), 16)
        right_BG = (rng.random((16, 8)) < 1 / (1 + np.exp(-skill_M[source_B]))[:, None]).astype(np.float32)
        advantage_BG = np.asarray(group_advantages(jnp.asarray(right_BG), jnp.ones(right_BG.shape, bool), advantage))
        state = step(state, right_BG, source_B, None, config, advantage_BG)
        mixed_M = np.bincount(source_B, weights=right_BG.std(axis=1) > 0, minlength=4)
        skill_M += 0.004 * mixed_M
        skill_M[1:] += 0.003 * mixed_M[:-1]  # what is learnt carries over to the next
    early_M, late_M = probability_MxT[:, 20:110].mean(axis=1), probability_MxT[:, -40:].mean(axis=1)
    assert early_M[:2].sum() > 0.7 and late_M[:2].sum() < 0.4  # the easy two are nearly solved by then
    assert early_M[2] < 0.15 and late_M[2] > 0.5  # out of reach, then learnable
    assert late_M[3] < 0.1  # still out of reach


@pytest.mark.parametrize("group_size", [4, 16])
def test_group_std_advantages_ignore_the_scale_of_rewards_and_the_others_do_not(group_size):
    """The docstring's three formulas for a group with share p right, rewards r apart."""
    for right in range(1, group_size):
        p = right / group_size
        for scale in (1.0, 3.0):
            reward_BG = scale * jnp.array([[1.0] * right + [0.0] * (group_size - right)])
            size = {
                name: float(jnp.abs(group_advantages(reward_BG, jnp.ones((1, group_size), bool), name)).mean())
                for name in ("group_std", "group_mean", "leave_one_out")
            }
            ratio = (group_size - 1) / group_size
            assert size["group_std"] == pytest.approx(2 * math.sqrt(p * (1 - p) * ratio), rel=1e-4)
            assert size["group_mean"] == pytest.approx(2 * p * (1 - p) * scale, rel=1e-5)
            assert size["leave_one_out"] == pytest.approx(2 * p * (1 - p) * scale / ratio, rel=1e-5)


@pytest.mark.parametrize("config", [DUMP, EASY_TO_HARD])
def test_k_state_survives_json_and_the_curriculum_continues_the_same(config):
    rng = np.random.default_rng(0)
    batches = (rng.random((10, 2, 3)) < 0.6).astype(np.float32)

    def run(state, part):
        for t, batch in part:
            source_B = choose(state, config, jax.random.key(t), 2)
            state = step(state, batch, source_B, None, config, batch - batch.mean())
        return state

    whole = run(start(4), enumerate(batches))
    half = run(start(4), list(enumerate(batches))[:5])
    resumed = CurriculumState.from_json(json.loads(json.dumps(half.to_json())))
    assert resumed == half
    assert run(resumed, list(enumerate(batches))[5:]) == whole
    assert whole.level > 0 or config.kind == "dump"


# easy_to_hard


@pytest.mark.parametrize("level", [0, 1, 2])
def test_easy_to_hard_draws_only_the_current_level(level):
    source = choose(start(3, level), EASY_TO_HARD, jax.random.key(level), 500)
    np.testing.assert_array_equal(source, level)


def test_promotion_at_the_threshold_and_not_below():
    assert step(start(2), [[1, 1], [1, 0]]).level == 1  # 3 of 4 = 0.75
    assert step(start(2), [[1, 1], [0, 0]]).level == 0  # 2 of 4


def test_no_promotion_before_the_window_is_full():
    state = step(start(2), [[1, 1, 1]])
    assert state.level == 0
    assert step(state, [[1]]).level == 1


def test_only_the_last_window_counts():
    state = step(start(2), [[0, 0, 0, 0, 0, 0]])
    state = step(state, [[1, 1]])
    assert (state.level, recent(state)) == (0, (0, 0, 1, 1))
    assert step(state, [[1]]).level == 1  # 0 1 1 1; over all nine it would be 3 of 9.


def test_a_new_level_starts_with_its_own_empty_window_and_one_promotion_a_step():
    state = step(step(start(3), [[1, 1, 1]]), [[1] * 8])
    assert (state.level, recent(state)) == (1, ())


def test_the_last_level_stays():
    state = start(2, level=1)
    for _ in range(3):
        state = step(state, [[1, 1, 1, 1]])
    assert (state.level, recent(state)) == (1, (1.0, 1.0, 1.0, 1.0))


def test_late_responses_of_other_levels_change_no_level():
    state = start(3, level=1)
    state = step(state, [[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], source_B=[0, 1, 2])
    assert (state.level, recent(state)) == (1, (0, 1, 0, 1))
    assert step(state, [[0, 0, 0, 0]], source_B=[0]).level == 1  # nor back


def test_unscored_responses_do_not_count_as_wrong():
    scored_BG = [[True, False, True, False, True]]
    state = step(start(2), [[1, 0, 1, 0, 1]], scored_BG=scored_BG)
    assert (state.level, recent(state)) == (0, (1, 1, 1))


# what is said about it


def test_metrics_tell_what_decided_the_step_and_what_came_of_it():
    before = memories((3, [0.4, 0.5, 0.6]), (1, [0.2]), (2, [0.1]))
    source_B = np.array([0, 2], np.int32)
    reward_BG = np.array([[1.5, 0.5], [9.0, 0.0]], np.float32)
    accuracy_BG = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)
    scored_BG = np.array([[True, True], [False, True]])
    after = update_by_advantages(before, DUMP, source_B, reward_BG - 1, accuracy_BG, scored_BG)
    found = step_metrics(before, after, DUMP, ["a", "b", "c"], source_B, reward_BG, accuracy_BG, scored_BG)
    probability_M = probabilities(before, DUMP)
    assert [found[f"curriculum/{name}/probability"] for name in "abc"] == probability_M.tolist()
    assert found["curriculum/a/learnability"] == pytest.approx(0.5)
    assert found["curriculum/a/count"] == 3 and found["curriculum/a/reward"] == 1.0
    assert found["curriculum/c/accuracy"] == 0.0  # the right one was not scored
    assert "curriculum/b/reward" not in found  # nothing was drawn
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            memories((400, [0.2]), (400, [0.2])),
            memories((400, [0.2]), (400, [0.6])),
            ["b rose 0.50 to 0.98: its mean |advantage| went 0.20 to 0.60, accuracy 0.00 over 1 responses", "a fell"],
        ),
        (
            memories((400, [0.2]), (40, [0.2])),
            memories((400, [0.2]), (80, [0.2])),
            [
                "b fell 0.98 to 0.90: its bonus went 0.55 to 0.39, 40 more",
                "a rose 0.02 to 0.10: the other sources fell",
            ],
        ),
        (
            memories((40000, [0.7]), (40, [0.0])),
            memories((48000, [0.7]), (40, [0.0])),
            ["b rose", "its bonus went 0.72 to 0.73, none of its responses seen"],
        ),
        (memories((9, [0.2]), (9, [0.2])), memories((9, [0.2]), (9, [0.2])), ["no probability moved by 0.005"]),
    ],
)
def test_why_a_source_rose_or_fell(before, after, words):
    said = explain(before, after, DUMP, ["a", "b"])
    for part in words:
        assert part in said, said


def test_what_easy_to_hard_says():
    state = step(start(2), [[1, 0]])
    stays = "stays on a: accuracy 0.50 over 2 of 4 responses, 0.75 over all of them moves on"
    assert explain(start(2), state, EASY_TO_HARD, ["a", "b"]) == stays
    moved = step(state, [[1, 1, 1]])
    assert (
        explain(state, moved, EASY_TO_HARD, ["a", "b"]) == "moved on from a to b: accuracy 0.75 over 4 of 4 responses"
    )
    assert explain(moved, moved, EASY_TO_HARD, ["a", "b"]).startswith("stays on b, the last")
    assert explain(state, moved, UNIFORM, ["a", "b"]) == "probabilities are fixed (uniform)"


# bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "uniform", "promote_at": 0.0}, "curriculum.promote_at is 0.0; allowed is 0 < promote_at <= 1"),
        ({"kind": "uniform", "promote_at": 1.1}, "curriculum.promote_at is 1.1"),
        ({"kind": "uniform", "promote_at": float("nan")}, "curriculum.promote_at is nan"),
        ({"kind": "uniform", "window": 0}, "curriculum.window is 0; allowed is 1 or more"),
        ({"kind": "dump", "temperature": -0.1}, "curriculum.temperature is -0.1; allowed is a finite number, 0"),
        ({"kind": "dump", "temperature": float("inf")}, "curriculum.temperature is inf"),
        ({"kind": "static", "weights": (1.0, -1.0)}, r"curriculum.weights\[1\] is -1.0; allowed is a finite number"),
        ({"kind": "static", "weights": (float("nan"), 1.0)}, r"curriculum.weights\[0\] is nan"),
        ({"kind": "static", "weights": (0.0, 0.0)}, r"curriculum.weights is \(0.0, 0.0\); allowed is at least one"),
        ({"kind": "static"}, r"curriculum.kind is 'static' and curriculum.weights \(\)"),
        ({"kind": "dump", "weights": (1.0,)}, "curriculum.kind is 'dump' and curriculum.weights"),
    ],
)
def test_bad_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**values)


def test_unknown_kind_is_refused():
    # Called directly, since beartype, where tests switch it on, refuses the constructor's argument first.
    config: Any = SimpleNamespace(kind="hard_to_easy")
    with pytest.raises(ValueError, match=r"curriculum.kind is 'hard_to_easy'; allowed are uniform, proportional"):
        CurriculumConfig.__post_init__(config)


def test_weights_must_be_one_per_source():
    config = CurriculumConfig("static", weights=(1.0, 2.0))
    config.validate_for(["a", "b"])
    with pytest.raises(ValueError, match=r"curriculum.weights has 2 weights; allowed is one for each of the 3 sources"):
        config.validate_for(["a", "b", "c"])


@pytest.mark.parametrize(("num_sources", "level"), [(0, 0), (2, 2), (2, -1)])
def test_level_outside_the_sources_is_refused(num_sources, level):
    with pytest.raises(ValueError, match=f"curriculum level {level} with {num_sources} sources"):
        start(num_sources, level)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="curriculum source 1 has size 0; allowed is 1 or more"):
        CurriculumState.start([3, 0])


# A batch of rollouts


def test_a_batch_is_observed_by_raw_accuracy_and_scored_responses():
    """Source 1 has one right of two scored responses, and a third without a score; source 0 two of two right.

    Accuracies 1 and 0 have the mean 1/2, so each |A| of `group_mean` is 1/2. The shaped rewards, unequal where all
    is right, would make source 0 look learnable; the unscored response taken for wrong would give 2/3, 1/3, 1/3.
    """
    batch = scored(
        [[1, 0, 0], [1, 1, 0]],
        source_B=[1, 0],
        reward_BG=[[9, 2, 5], [1, 3, 8]],
        scored_BG=[[True, True, False], [True, True, False]],
    )
    state = update(start(2), CurriculumConfig("dump", advantage="group_mean"), batch)
    assert [source.count for source in state.sources] == [2, 2]
    np.testing.assert_allclose(state.sources[1].advantage_size, [0.5, 0.5])
    np.testing.assert_allclose(state.sources[0].advantage_size, [0, 0])
    assert state.sources[1].accuracy == (1, 0) and state.sources[0].accuracy == (1, 1)


def test_a_baseline_is_needed_to_tell_what_can_be_learnt():
    wrong = object.__new__(CurriculumConfig)  # behind the back of the tests' own type checks
    for field in dataclasses.fields(CurriculumConfig):
        object.__setattr__(wrong, field.name, getattr(DUMP, field.name))
    object.__setattr__(wrong, "advantage", "no_baseline")
    with pytest.raises(ValueError, match=r"curriculum.advantage is 'no_baseline'; allowed are leave_one_out, group_"):
        wrong.__post_init__()
