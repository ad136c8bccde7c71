"""The searcher: what it samples, what it scores, and which completions count."""

import dataclasses

import jax
import numpy as np
import pytest

from nested_reft.layer_skip import LayerPlan
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.train.searcher import Searcher
from nested_reft.train.setup import Setup, prepare
from nested_reft.types import Rollouts, Scored
from tests.train.runs import assert_same_arrays, found_by, nano, prompts_of


@pytest.fixture(scope="module")
def setup() -> Setup:
    return prepare(nano())


@pytest.fixture(scope="module")
def found(setup) -> Scored:
    return found_by(setup)


def with_parts(setup: Setup, **parts) -> Setup:
    return dataclasses.replace(setup, config=nano(**parts))


def test_everything_found_is_on_the_host_and_says_where_it_is_from(setup, found):
    rollouts = found.rollouts
    for field in dataclasses.fields(Rollouts):
        assert isinstance(getattr(rollouts, field.name), np.ndarray), field.name
    assert rollouts.kept_mask_BL.tolist() == [[True, True, False, True, True, True]] * 4
    assert rollouts.nested_BG.all() and not rollouts.full_share_B.any() and not rollouts.version_B.any()
    assert found.texts[0][0] == setup.policy.tokenizer.decode_completions(rollouts.tokens_BGC, rollouts.length_BG)[0][0]
    assert found.stats.rollout_seconds > 0 and found.stats.draft_acceptance is None


def test_the_same_key_finds_the_same_and_another_key_another(setup, found):
    """It keeps no state between calls."""
    assert_same_arrays(found_by(setup).rollouts, found.rollouts)
    assert not np.array_equal(found_by(setup, seed=1).rollouts.tokens_BGC, found.rollouts.tokens_BGC)


def test_the_version_is_that_of_the_policy(setup):
    policy = dataclasses.replace(setup.policy, version=7)
    assert found_by(setup, policy).rollouts.version_B.tolist() == [7] * 4


def test_an_overlong_filter_takes_what_was_cut_off_out_of_the_loss_alone(setup, found):
    filtered = found_by(with_parts(setup, reward=RewardConfig(overlong_filter=True)))
    finished_BG = found.rollouts.finished_BG
    assert finished_BG.any() and not finished_BG.all()  # otherwise nothing is tested
    np.testing.assert_array_equal(filtered.rollouts.counted_BG, finished_BG)
    assert found.rollouts.counted_BG.all()
    np.testing.assert_array_equal(filtered.reward_BG, found.reward_BG)  # they count for their groups either way
    assert filtered.scored_BG.all()


def test_a_completion_without_a_score_does_not_count(tmp_path, setup):
    (tmp_path / "mine.py").write_text("def reward(text, example):\n    return float('nan') if len(text) % 2 else 1.0\n")
    found = found_by(with_parts(setup, reward=RewardConfig(function=f"{tmp_path / 'mine.py'}:reward", workers=1)))
    odd_BG = np.array([[len(text) % 2 == 1 for text in group] for group in found.texts])
    assert odd_BG.any() and not odd_BG.all()
    np.testing.assert_array_equal(found.scored_BG, ~odd_BG)
    np.testing.assert_array_equal(found.rollouts.counted_BG, ~odd_BG)


def test_a_mixture_draws_some_completions_from_the_full_model(setup):
    rollout = dataclasses.replace(nano().rollout, mixture_alpha=0.5)
    rollouts = found_by(with_parts(setup, rollout=rollout)).rollouts
    np.testing.assert_allclose(rollouts.full_share_B, 0.5)
    assert rollouts.nested_BG.any() and not rollouts.nested_BG.all()
    # Each completion's log-probability is that of the model which drew it.
    for plan, drawn_BG in ((LayerPlan.skipping(6, [2]), rollouts.nested_BG), (None, ~rollouts.nested_BG)):
        logprob_BGC = setup.policy.logprobs(
            *(jax.numpy.asarray(x) for x in (rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC)), plan
        )
        valid_BGC = (np.arange(8) < rollouts.length_BG[..., None]) & drawn_BG[..., None]
        np.testing.assert_allclose(
            np.asarray(logprob_BGC)[valid_BGC], rollouts.behavior_logprob_BGC[valid_BGC], rtol=1e-4, atol=1e-4
        )


def test_exact_rollouts_are_the_full_models_and_say_what_drafted(setup):
    rollout = dataclasses.replace(nano().rollout, mode="exact", draft_length=2)
    found = found_by(with_parts(setup, rollout=rollout))
    assert not found.rollouts.nested_BG.any() and (found.rollouts.full_share_B == 1).all()
    assert found.rollouts.kept_mask_BL.tolist() == [[True, True, False, True, True, True]] * 4
    assert 0 < found.stats.draft_acceptance <= 1


def test_a_search_of_prompts_with_their_own_number_of_completions(setup):
    """The group size is the configuration's, and no prompt needs the others."""
    rollout = RolloutConfig(group_size=2, max_completion_tokens=8)
    searcher = Searcher(rollout, RewardConfig())
    found = searcher.search(setup.policy, prompts_of(setup, 3), LayerPlan.full(6), jax.random.key(0))
    assert found.reward_BG.shape == (3, 2) and len(found) == 3
