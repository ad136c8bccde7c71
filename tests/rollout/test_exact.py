"""Exact nested rollouts: drafted by the nested policy, distributed as the full model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.exact import Purposes, accept, generate_exact
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.sampling import GREEDY, SamplingConfig, row_keys
from tests.tiny_models import forward, tiny_model, tiny_prompts

NO_STOP = jnp.array([-1])


def exact(model, key, *, plan, stop_ids=NO_STOP, prompts=None, group_size=4, size=7, sampling=None, draft_length=2):
    tokens_BP, length_B = tiny_prompts() if prompts is None else prompts
    return generate_exact(
        model,
        tokens_BP,
        length_B,
        plan,
        stop_ids,
        key,
        group_size=group_size,
        max_completion_tokens=size,
        sampling=SamplingConfig() if sampling is None else sampling,
        draft_length=draft_length,
    )


@pytest.mark.parametrize("draft_length", [1, 2, 4])
def test_greedy_equals_plain_greedy_token_for_token(key, draft_length):
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    drafted = exact(
        model, key, plan=LayerPlan.skipping(5, [1, 3]), group_size=1, sampling=GREEDY, draft_length=draft_length
    )
    plain = generate(
        model,
        tokens_BP,
        length_B,
        LayerPlan.full(5),
        NO_STOP,
        key,
        group_size=1,
        max_completion_tokens=7,
        sampling=GREEDY,
    )
    assert drafted.rollouts.tokens_BGC.tolist() == plain.tokens_BGC.tolist()
    assert drafted.rollouts.length_BG.tolist() == plain.length_BG.tolist()


def test_the_full_plan_accepts_every_draft(key):
    result = exact(tiny_model(), key, plan=LayerPlan.full(5), draft_length=4)
    assert float(result.acceptance) > 0.99  # short of 1 by rounding alone
    assert int(result.rounds) == 2  # 1 + 5 + 1 tokens


def test_logprobs_are_the_full_models_and_the_last_round_is_cut(key):
    model = tiny_model()
    rollouts = exact(model, key, plan=LayerPlan.skipping(5, [0, 2, 4]), draft_length=4).rollouts
    assert jnp.all(rollouts.length_BG == 7) and not jnp.any(rollouts.finished_BG)
    target_BGC, _ = completion_logprobs(model, rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC, 1.0)
    np.testing.assert_allclose(rollouts.behavior_logprob_BGC, target_BGC, atol=1e-4)


def test_a_stop_token_ends_a_row(key):
    stop_ids = jnp.arange(0, 31, 5)
    rollouts = exact(
        tiny_model(), key, plan=LayerPlan.skipping(5, [2]), stop_ids=stop_ids, group_size=16, size=12
    ).rollouts
    tokens, length, finished = (np.asarray(a) for a in (rollouts.tokens_BGC, rollouts.length_BG, rollouts.finished_BG))
    for row in np.ndindex(length.shape):
        stops = np.flatnonzero(np.isin(tokens[row][: length[row]], np.asarray(stop_ids)))
        assert finished[row] == (len(stops) > 0)
        assert length[row] == (stops[0] + 1 if len(stops) else 12)
        assert not tokens[row][length[row] :].any()
    assert finished.any()


def test_acceptance_is_that_of_tested_drafts(key):
    """Drafts behind a rejection are not tested: counting them would halve the rate of long drafts here."""
    model, plan = tiny_model(), LayerPlan.skipping(5, [1, 2])
    one, eight = (
        float(exact(model, key, plan=plan, group_size=400, size=18, draft_length=length).acceptance)
        for length in (1, 8)
    )
    assert 0.2 < one < 0.9 and abs(one - eight) < 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_whole_completions_follow_the_full_models_distribution(key, temperature):
    """Chi-square of pairs of tokens, drafts accepted and rejected, against the exact distribution."""
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    prompts, count = (tokens_BP[:1], length_B[:1]), 20_000
    sampling = SamplingConfig(temperature=temperature)
    result = exact(
        model, key, plan=LayerPlan.skipping(5, [1, 2, 3]), prompts=prompts, group_size=count, size=3, sampling=sampling
    )
    assert 0.05 < float(result.acceptance) < 0.98
    prompt = np.asarray(tokens_BP[0, : int(length_B[0])])
    followed = np.array([[*prompt, first] for first in range(31)])
    logits = np.asarray(forward(model, jnp.asarray(followed))) / temperature
    first_V = np.asarray(jax.nn.softmax(logits[0, len(prompt) - 1]))
    second_VV = np.asarray(jax.nn.softmax(logits[:, len(prompt)], axis=-1))
    expected = count * (first_V[:, None] * second_VV).ravel()
    tokens = np.asarray(result.rollouts.tokens_BGC)[0]
    observed = np.bincount(tokens[:, 0] * 31 + tokens[:, 1], minlength=31 * 31)
    frequent = expected > 5
    grouped = [np.append(values[frequent], values[~frequent].sum()) for values in (observed, expected)]
    statistic = ((grouped[0] - grouped[1]) ** 2 / grouped[1]).sum()
    degrees = frequent.sum()
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)
    # The nested policy alone would not pass: the test can fail.
    nested_logits = np.asarray(forward(model, jnp.asarray(followed), LayerPlan.skipping(5, [1, 2, 3]))) / temperature
    nested = np.asarray(jax.nn.softmax(nested_logits[0, len(prompt) - 1]))[:, None]
    nested = count * (nested * np.asarray(jax.nn.softmax(nested_logits[:, len(prompt)], axis=-1))).ravel()
    assert ((observed - nested)[frequent] ** 2 / nested[frequent]).sum() > 2 * degrees


def test_the_rule_by_enumeration(key):
    """One draft over three tokens: accepted plus residual mass is p, exactly what many draws show."""
    q, p = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    count = 200_000
    drafts = jax.random.choice(key, 3, (1, count, 1), p=jnp.asarray(q))
    q_BGTV = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (1, count, 1, 3))
    p_BGTV = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (1, count, 2, 3))
    keys = Purposes.of(row_keys(jax.random.fold_in(key, 1), jnp.arange(1), count))
    tokens, logprob, accepted = accept(keys, jnp.zeros((1, count), jnp.int32), drafts, q_BGTV, p_BGTV)
    share = np.bincount(np.asarray(tokens[0, :, 0]), minlength=3) / count
    np.testing.assert_allclose(share, p, atol=0.005)
    np.testing.assert_allclose(float(accepted.mean()), np.minimum(p, q).sum(), atol=0.005)  # 0.6
    np.testing.assert_allclose(jnp.exp(logprob[0, :, 0]), p[np.asarray(tokens[0, :, 0])], rtol=1e-5)


def test_prompts_that_stand_beside_a_row_change_nothing(key):
    """Rounds of a batch go on until its slowest row is done; what a row drafts then does not depend on the others."""
    model, plan, (tokens_BP, length_B) = tiny_model(scale=1.0), LayerPlan.skipping(5, [1, 3]), tiny_prompts()
    whole = exact(model, key, plan=plan).rollouts
    alone = exact(model, key, plan=plan, prompts=(tokens_BP[:1], length_B[:1]), group_size=2).rollouts
    assert alone.tokens_BGC.tolist() == whole.tokens_BGC[:1, :2].tolist()


def test_another_plan_of_the_same_size_compiles_nothing(key):
    model = tiny_model()
    exact(model, key, plan=LayerPlan.skipping(5, [1]))
    counter = CompileCounter()
    exact(model, key, plan=LayerPlan.skipping(5, [3]))
    assert counter.count == 0
    counter.close()


def test_rollouts_say_that_the_full_model_drew_them(key):
    """Their share of the full model is 1 and no completion is nested, though the plan that drafted is kept."""
    rollouts = exact(tiny_model(), key, plan=LayerPlan.skipping(5, [1, 3])).rollouts
    assert (rollouts.full_share_BG == 1).all() and not rollouts.nested_BG.any()
    assert (rollouts.part_BGL == jnp.array([1, 0, 1, 0, 1])).all()
    assert rollouts.counted_BG.all() and not rollouts.forced_BG.any() and not rollouts.version_BG.any()
