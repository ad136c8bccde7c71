"""The searcher: which completions it finds, how they are scored, and which of them count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.rewards.limits import RewardError
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import prepare
from tests.training.runs import assert_equal_arrays, nano

PLAN = LayerPlan.skipping(6, [2])


@pytest.fixture(scope="module")
def setup():
    return prepare(nano())


@pytest.fixture(scope="module")
def prompts(setup):
    return batch_prompts(list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size)


def searcher(setup, **changes) -> Searcher:
    """One of the setup's; `reward` and `rollout` fields may be other."""
    reward = {name: value for name, value in changes.items() if hasattr(setup.config.reward, name)}
    rollout = {name: value for name, value in changes.items() if name not in reward}
    return Searcher(
        dataclasses.replace(setup.config.rollout, **rollout), dataclasses.replace(setup.config.reward, **reward)
    )


def test_the_same_key_finds_the_same_and_another_does_not(setup, prompts, key):
    """It keeps no state: whatever was searched in between, the key decides."""
    one, other = searcher(setup), searcher(setup)
    first = one.search(setup.policy, prompts, PLAN, key)
    different = one.search(setup.policy, prompts, PLAN, jax.random.key(1))
    again = other.search(setup.policy, prompts, PLAN, key)
    assert_equal_arrays(first.rollouts, again.rollouts)
    assert first.texts == again.texts != different.texts


def test_refilled_rows_find_the_same(setup, prompts, key):
    """Six rows for 16 completions, of the mixture's two policies."""
    whole, refilled = (
        searcher(setup, mixture_alpha=0.5, rows=rows).search(setup.policy, prompts, PLAN, key).rollouts
        for rows in (0, 6)
    )
    np.testing.assert_array_equal(refilled.tokens_BGC, whole.tokens_BGC)
    np.testing.assert_allclose(refilled.behavior_logprob_BGC, whole.behavior_logprob_BGC, atol=1e-4)


def test_what_it_finds_lies_on_the_host_and_is_the_plans(setup, prompts, key):
    found = searcher(setup).search(setup.policy, prompts, PLAN, key)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found.rollouts))
    assert found.rollouts.part_BGL.tolist() == [[[1, 1, 0, 1, 1, 1]] * 4] * 4
    assert found.rollouts.nested_BG.all() and not found.rollouts.full_share_BG.any()
    assert found.prompts is prompts and len(found) == 4
    assert (
        found.texts[1][2]
        == setup.policy.tokenizer.decode_completions(
            found.rollouts.tokens_BGC[1:2, 2:3], found.rollouts.length_BG[1:2, 2:3]
        )[0][0]
    )
    assert found.stats.rollout_seconds > 0 and found.stats.drafts_tested == 0


def test_rounding_and_version_come_with_the_policy(setup, prompts, key):
    """A searcher does not ask what the policy is: it hands on the number of updates that its weights have seen."""
    policy = dataclasses.replace(setup.policy, version=7)
    assert searcher(setup).search(policy, prompts, PLAN, key).rollouts.version_BG.tolist() == [[7] * 4] * 4


def test_the_mismatch_is_that_of_the_depth(setup, prompts, key):
    """Against the full model of the same weights, whatever the version; the full model has none."""
    one = Searcher(setup.config.rollout, setup.config.reward, measures_mismatch=True)
    found = one.search(dataclasses.replace(setup.policy, version=7), prompts, PLAN, key)
    rollouts = found.rollouts
    texts = (prompts.tokens_BP, prompts.length_B, rollouts.tokens_BGC)
    full_BGC = np.asarray(setup.policy.logprobs(*map(jnp.asarray, texts)))
    mask_BGC = np.arange(full_BGC.shape[-1]) < rollouts.length_BG[..., None]
    mean = (rollouts.behavior_logprob_BGC - full_BGC)[mask_BGC].mean()
    assert found.stats.mismatch["kl_behavior_target"] == pytest.approx(mean, rel=1e-4) and mean > 1e-4
    full = one.search(setup.policy, prompts, LayerPlan.full(6), key).stats.mismatch
    assert full["ess_token"] == pytest.approx(1) and full["kl_behavior_target"] == pytest.approx(0, abs=1e-5)
    assert searcher(setup).search(setup.policy, prompts, PLAN, key).stats.mismatch is None


def test_overlong_completions_count_unless_they_are_filtered(setup, prompts, key):
    """The filter takes them out of the loss; their rewards stay, since they are part of their group."""
    plain = searcher(setup).search(setup.policy, prompts, PLAN, key)
    filtered = searcher(setup, overlong_filter=True).search(setup.policy, prompts, PLAN, key)
    finished_BG = plain.rollouts.finished_BG
    assert 0 < finished_BG.sum() < finished_BG.size  # otherwise nothing is tested
    assert plain.rollouts.counted_BG.all()
    assert np.array_equal(filtered.rollouts.counted_BG, finished_BG)
    assert np.array_equal(filtered.reward_BG, plain.reward_BG) and filtered.scored_BG.all()


def test_completions_without_a_reward_do_not_count(setup, prompts, key, monkeypatch):
    """Their reward of 0 means nothing, so neither signal nor divisor may see them."""
    unscored_BG = np.arange(4) % 4 == np.ones((4, 1))

    def score(texts, *_):
        return np.ones((4, 4)), np.ones((4, 4)), ~unscored_BG, {}

    monkeypatch.setattr("nested_reft.reward_model.score", score)
    found = searcher(setup).search(setup.policy, prompts, PLAN, key)
    assert np.array_equal(found.rollouts.counted_BG, ~unscored_BG)


def test_a_mixture_draws_from_both_policies(setup, prompts, key):
    found = searcher(setup, mixture_alpha=0.5).search(setup.policy, prompts, PLAN, key)
    assert (found.rollouts.full_share_BG == 0.5).all()
    assert 0 < found.rollouts.nested_BG.sum() < 16


def test_exact_rollouts_say_how_many_drafts_were_kept(setup, prompts, key):
    """Drafted by the full model itself, every draft is kept."""
    exact = searcher(setup, mode="exact")
    drafted = exact.search(setup.policy, prompts, PLAN, key).stats
    assert drafted is not None and 0 < drafted.drafts_accepted <= drafted.drafts_tested
    full = exact.search(setup.policy, prompts, LayerPlan.full(6), key)
    assert full.stats is not None and full.stats.drafts_accepted >= 0.99 * full.stats.drafts_tested
    assert (full.rollouts.full_share_BG == 1).all() and not full.rollouts.nested_BG.any()


def test_a_step_without_any_score_stops_the_run(setup, prompts, key, tmp_path):
    (tmp_path / "mine.py").write_text("def fails(text, example):\n    raise OSError('no such table')\n")
    failing = searcher(setup, function=f"{tmp_path / 'mine.py'}:fails")
    with pytest.raises(RewardError, match=r"no completion of this step could be scored \(.*failed 16\)"):
        failing.search(setup.policy, prompts, PLAN, key)
