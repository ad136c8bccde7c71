"""The curriculum: who is drawn, when a level is left, and resuming."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nested_reft.curriculum import CurriculumConfig, CurriculumState, choose, probabilities, update

UNIFORM = CurriculumConfig("uniform")
EASY_TO_HARD = CurriculumConfig("easy_to_hard", promote_at=0.75, window=4)


def step(state, accuracy_BG, source_B=None, scored_BG=None, config=EASY_TO_HARD):
    """One update; by default all prompts are of the current level and all are scored."""
    accuracy_BG = np.array(accuracy_BG, dtype=np.float32)
    if source_B is None:
        source_B = [state.level] * len(accuracy_BG)
    scored_BG = np.ones_like(accuracy_BG, dtype=bool) if scored_BG is None else np.array(scored_BG, dtype=bool)
    return update(state, config, np.array(source_B, dtype=np.int32), accuracy_BG, scored_BG)


# uniform


def test_uniform_draws_every_slot_independently_and_evenly():
    state = CurriculumState(num_sources=3)
    np.testing.assert_allclose(probabilities(state, UNIFORM), [1 / 3] * 3, rtol=1e-6)
    source = choose(state, UNIFORM, jax.random.key(0), 3000)
    # Standard deviation of each count: sqrt(3000 * 1/3 * 2/3) = 25.8; five of them.
    np.testing.assert_allclose(np.bincount(source, minlength=3), 1000, atol=129)
    # Independent slots repeat their neighbour's source a third of the time; a quota or a cycle does not.
    assert abs(np.mean(source[1:] == source[:-1]) - 1 / 3) < 0.05


def test_choice_is_the_keys_alone():
    state = CurriculumState(num_sources=4)
    first, same, other = (choose(state, UNIFORM, jax.random.key(k), 64) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_uniform_ignores_what_happened():
    state = CurriculumState(num_sources=2)
    assert step(state, [[1.0] * 200], config=UNIFORM) == state


# easy_to_hard


@pytest.mark.parametrize("level", [0, 1, 2])
def test_easy_to_hard_draws_only_the_current_level(level):
    state = CurriculumState(num_sources=3, level=level)
    source = choose(state, EASY_TO_HARD, jax.random.key(level), 500)
    np.testing.assert_array_equal(source, level)


def test_promotion_at_the_threshold_and_not_below():
    state = CurriculumState(num_sources=2)
    assert step(state, [[1, 1], [1, 0]]).level == 1  # 3 of 4 = 0.75
    assert step(state, [[1, 1], [0, 0]]).level == 0  # 2 of 4


def test_no_promotion_before_the_window_is_full():
    state = step(CurriculumState(num_sources=2), [[1, 1, 1]])
    assert state.level == 0
    assert step(state, [[1]]).level == 1


def test_only_the_last_window_counts():
    state = step(CurriculumState(num_sources=2), [[0, 0, 0, 0, 0, 0]])
    state = step(state, [[1, 1]])
    assert (state.level, state.recent_accuracy) == (0, (0, 0, 1, 1))
    assert step(state, [[1]]).level == 1  # 0 1 1 1; over all nine it would be 3 of 9.


def test_a_new_level_starts_with_an_empty_window_and_one_promotion_a_step():
    state = step(CurriculumState(num_sources=3, recent_accuracy=(1.0, 1.0, 1.0)), [[1] * 8])
    assert state == CurriculumState(num_sources=3, level=1)


def test_the_last_level_stays():
    state = CurriculumState(num_sources=2, level=1)
    for _ in range(3):
        state = step(state, [[1, 1, 1, 1]])
    assert state == CurriculumState(num_sources=2, level=1, recent_accuracy=(1.0, 1.0, 1.0, 1.0))


def test_responses_of_other_levels_do_not_count():
    state = CurriculumState(num_sources=3, level=1)
    state = step(state, [[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], source_B=[0, 1, 2])
    assert (state.level, state.recent_accuracy) == (1, (0, 1, 0, 1))


def test_unscored_responses_do_not_count_as_wrong():
    scored_BG = [[True, False, True, False, True]]
    state = step(CurriculumState(num_sources=2), [[1, 0, 1, 0, 1]], scored_BG=scored_BG)
    assert (state.level, state.recent_accuracy) == (0, (1, 1, 1))


def test_state_survives_json_and_the_curriculum_continues_the_same():
    rng = np.random.default_rng(0)
    batches = (rng.random((10, 2, 3)) < 0.6).astype(np.float32)
    whole = half = CurriculumState(num_sources=4)
    for batch in batches:
        whole = step(whole, batch)
    for batch in batches[:5]:
        half = step(half, batch)
    resumed = CurriculumState.from_json(json.loads(json.dumps(half.to_json())))
    assert resumed == half
    for batch in batches[5:]:
        resumed = step(resumed, batch)
    assert resumed == whole
    assert whole.level > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "uniform", "promote_at": 0.0}, "curriculum.promote_at is 0.0; allowed is 0 < promote_at <= 1"),
        ({"kind": "uniform", "promote_at": 1.1}, "curriculum.promote_at is 1.1"),
        ({"kind": "uniform", "promote_at": float("nan")}, "curriculum.promote_at is nan"),
        ({"kind": "uniform", "window": 0}, "curriculum.window is 0; allowed is 1 or more"),
    ],
)
def test_bad_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CurriculumConfig(**values)


def test_unknown_kind_is_refused():
    # Called directly, since beartype, where tests switch it on, refuses the constructor's argument first.
    values = SimpleNamespace(kind="hard_to_easy", promote_at=0.9, window=1)
    with pytest.raises(ValueError, match=r"curriculum.kind is 'hard_to_easy'; allowed are uniform, easy_to_hard"):
        CurriculumConfig.__post_init__(values)


@pytest.mark.parametrize(("num_sources", "level"), [(0, 0), (2, 2), (2, -1)])
def test_level_outside_the_sources_is_refused(num_sources, level):
    with pytest.raises(ValueError, match=f"curriculum level {level} with {num_sources} sources"):
        CurriculumState(num_sources=num_sources, level=level)
