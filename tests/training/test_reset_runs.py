"""Runs whose rollouts start inside references."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.data.sources import JsonlSource, TaskSource
from nested_reft.dataset_reset import ResetConfig, reference_tokens
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig, score
from nested_reft.training.references import reference_scores
from nested_reft.training.setup import prepare
from nested_reft.types import gradient_mask, valid_mask
from tests.training.runs import (
    MOVING,
    assert_equal_arrays,
    comparable,
    comparable_steps,
    metrics_of,
    nano,
    samples_of,
    save_after,
    trainer,
)

MOSTLY = ResetConfig(share=0.7, references="answers", per="completion")
BACKWARD = ResetConfig(share=0.8, references="answers", schedule="backward", stages=4, promote_at=0.05, window=4)
UNLIKELY = ResetConfig(share=0.7, references="answers", per="completion", prefer="unlikely")
MIXTURE = PolicyGradientConfig("leave_one_out", "mixture", "sequence", "fixed_length", 8)


def reset_run(path, **changes):
    return trainer(nano(**({"reset": MOSTLY, "loss": MOVING} | changes)), path)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A run after its first step, and the record of that."""
    run = reset_run(tmp_path_factory.mktemp("run"))
    return run, run.step(0)


def test_a_share_of_zero_is_the_run_without_the_section(tmp_path):
    off = ResetConfig(share=0.0, references="answers", schedule="fixed", fraction=0.5)
    plain = trainer(nano(loss=MOVING), tmp_path / "plain")
    without = trainer(nano(loss=MOVING, reset=off), tmp_path / "without")
    assert comparable_steps(plain, range(2)) == comparable_steps(without, range(2))
    assert_equal_arrays(plain.state.learner.state, without.state.learner.state)


def test_completions_begin_with_their_references(stepped):
    run, found = stepped
    rollouts, prompts = found.groups.rollouts, found.groups.prompts
    encode = run.state.learner.tokenizer.encode
    for b, answer in enumerate(prompts.answers):
        assert prompts.references[b] == answer and prompts.reference_length_B[b] == len(encode(answer)) + 1
        for g, forced in enumerate(rollouts.forced_BG[b]):
            assert rollouts.tokens_BGC[b, g, :forced].tolist() == encode(answer)[:forced]
            assert forced < prompts.reference_length_B[b] and forced < rollouts.length_BG[b, g]
    # Each completion has its own start, and some have none.
    assert (rollouts.forced_BG == 0).any() and len(np.unique(rollouts.forced_BG)) > 2
    assert (rollouts.behavior_logprob_BGC[~free_mask(rollouts)] == 0).all()


def free_mask(rollouts):
    """True at the tokens that the policy chose."""
    length_BG, forced_BG = jnp.asarray(rollouts.length_BG), jnp.asarray(rollouts.forced_BG)
    size = rollouts.tokens_BGC.shape[-1]
    return np.asarray(gradient_mask(length_BG, forced_BG, jnp.ones(length_BG.shape, bool), size))


def forced_mask(rollouts):
    """True at the tokens that were given."""
    return np.asarray(valid_mask(jnp.asarray(rollouts.forced_BG), rollouts.tokens_BGC.shape[-1]))


def test_free_and_forced_tokens_partition_the_completion(stepped):
    rollouts = stepped[1].groups.rollouts
    free_BGC, forced_BGC = free_mask(rollouts), forced_mask(rollouts)
    assert not (free_BGC & forced_BGC).any()
    valid_BGC = np.arange(rollouts.tokens_BGC.shape[-1]) < rollouts.length_BG[..., None]
    assert np.array_equal(free_BGC | forced_BGC, valid_BGC)


def test_the_score_is_that_of_the_whole_text(stepped):
    """Prefix and continuation decoded apart and put together get the same reward, and some are right by it."""
    run, found = stepped
    groups, rollouts = found.groups, found.groups.rollouts
    decode = run.state.learner.tokenizer.decode
    joined = [
        [
            groups.prompts.answers[b][:forced] + decode(rollouts.tokens_BGC[b, g, forced : rollouts.length_BG[b, g]])
            for g, forced in enumerate(rollouts.forced_BG[b])
        ]
        for b in range(len(groups))
    ]
    assert tuple(tuple(group) for group in joined) == groups.texts
    reward_BG, *_ = score(joined, groups.prompts, rollouts.finished_BG, run.config.reward)
    assert np.array_equal(reward_BG, groups.reward_BG)


def test_forced_tokens_carry_no_gradient(stepped):
    """Their log-probabilities, of any policy, change neither the loss nor the gradient of a free token."""
    run, found = stepped
    learner, rollouts = run.state.learner, found.groups.rollouts
    loss = dataclasses.replace(MOVING, entropy_coefficient=0.0)
    batch = dataclasses.replace(learner.batch(found.groups).arrays, signal_BG=jnp.asarray(found.groups.reward_BG - 0.5))
    size = batch.tokens_BGC.shape[-1]
    forced_BGC = jnp.asarray(forced_mask(rollouts))[..., :size]
    target_BGC = learner.policy().logprobs(batch.prompt_BP, batch.prompt_length_B, batch.tokens_BGC)

    def value_and_gradient(target_BGC, batch):
        return jax.value_and_grad(lambda target: policy_gradient_loss(target, batch, loss).total.mean())(target_BGC)

    value, gradient_BGC = value_and_gradient(target_BGC, batch)
    assert not gradient_BGC[forced_BGC].any() and gradient_BGC[free_mask(rollouts)[..., :size]].any()
    moved = dataclasses.replace(
        batch,
        behavior_logprob_BGC=jnp.where(forced_BGC, -3.0, batch.behavior_logprob_BGC),
        reference_logprob_BGC=jnp.where(forced_BGC, -9.0, batch.reference_logprob_BGC),
    )
    again, same_BGC = value_and_gradient(jnp.where(forced_BGC, -5.0, target_BGC), moved)
    assert value == again and jnp.array_equal(gradient_BGC, same_BGC)
    assert not np.asarray(found.update.weight_BGC)[np.asarray(forced_BGC)].any()


def test_forced_tokens_are_counted_apart(stepped):
    run, found = stepped
    metrics, rollouts = metrics_of(run, found), found.groups.rollouts
    assert metrics["reset/forced_tokens"] == rollouts.forced_BG.sum() > 0
    assert metrics["reset/share"] == (rollouts.forced_BG > 0).mean() and metrics["reset/referenced"] == 1
    sampled = (rollouts.length_BG - rollouts.forced_BG).sum()
    assert metrics["tokens_per_second"] == pytest.approx(sampled / metrics["rollout_seconds"])
    lines = samples_of(run, found)
    assert [line["forced_tokens"] for line in lines] == rollouts.forced_BG.ravel().tolist()


def test_a_group_shares_its_start(tmp_path):
    """And the first stage from the end leaves one token of at most seven to sample, as the log says."""
    run = reset_run(tmp_path, reset=dataclasses.replace(BACKWARD, share=1.0))
    found = run.step(0)
    forced_BG, metrics = found.groups.rollouts.forced_BG, metrics_of(run, found)
    assert (forced_BG > 0).all() and (forced_BG == forced_BG[:, :1]).all()
    assert (forced_BG[:, 0] == found.groups.prompts.reference_length_B - 1).all()
    assert min(metrics["reset/fraction"]) > 0.7 and "reset/stage" in metrics and "reset/free_accuracy" not in metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__mode": "exact"},
        {"rollout__mixture_alpha": 0.5, "rollout__group_size": 2, "loss": MIXTURE},
        {"rollout__weights": "int8"},
        {
            "loss": TrajectoryBalanceConfig(beta=0.5),
            "reset": dataclasses.replace(MOSTLY, per="group"),
            # An untrained model is always wrong, and equal rewards teach it nothing. Lengths differ.
            "reward": RewardConfig(overlong_cache_tokens=8),
        },
    ],
)
def test_every_way_to_sample_takes_prefixes(tmp_path, changes):
    run = reset_run(tmp_path, **changes)
    found = run.step(0)
    rollouts = found.groups.rollouts
    for b, answer in enumerate(found.groups.prompts.answers):
        tokens = run.state.learner.tokenizer.encode(answer)
        for g, forced in enumerate(rollouts.forced_BG[b]):
            assert rollouts.tokens_BGC[b, g, :forced].tolist() == tokens[:forced]
    assert (rollouts.forced_BG > 0).any() and not found.update.empty and np.isfinite(found.update.gradient_norm)
    if isinstance(run.config.loss, TrajectoryBalanceConfig):
        assert found.update.gradient_norm > 0
    if run.config.rollout.mode == "exact":
        # Samples of the full model: the ratio of every free token is 1, whatever was given before it.
        assert metrics_of(run, found)["ess_token"] == pytest.approx(1, abs=1e-3)


def test_new_resets_compile_nothing(tmp_path):
    """The bare prompt, the schedule's end and any start share one program, and so do the scores of references."""
    annealed = dataclasses.replace(UNLIKELY, schedule="annealed", fraction=0.9, steps=2)
    run = reset_run(tmp_path, reset=annealed)
    forced = [run.step(number).all.rollouts.forced_BG for number in range(2)]
    compiled = run.compilations.count
    last = run.step(2).all.rollouts.forced_BG
    assert forced[0].any() and forced[1].any() and not last.any() and run.compilations.count == compiled


def test_scores_of_references(tmp_path):
    """By hand, but for the likelihood, which is that of each reference alone and without padding."""
    texts = {10: "10", 11: "1111", 12: "1111", 13: "12345"}
    run = reset_run(tmp_path, data=own_questions(tmp_path, texts), reset=ResetConfig(share=0.5))
    config, policy = run.config, run.state.learner.policy()
    prompts = run.state.next_prompts(np.zeros(4, np.int32))
    stop_id = policy.tokenizer.stop_ids[0]
    tokens = [reference_tokens(text, policy.tokenizer.encode, stop_id) for text in prompts.references]

    def scores(prefer: str):
        reset = dataclasses.replace(config.reset, prefer=prefer)
        return reference_scores(dataclasses.replace(config, reset=reset), policy, prompts, tokens, 7, 0)

    length_B = np.array([len(each) for each in tokens])
    assert np.array_equal(scores("long"), length_B) and np.array_equal(scores("short"), -length_B)
    # The reference of the first question alone is its answer.
    pairs = zip(prompts.references, prompts.answers, strict=True)
    expected = [float(reference == answer) for reference, answer in pairs]
    assert scores("reward").tolist() == expected and sum(expected) == 1
    alone = []
    for b, each in enumerate(tokens):
        prompt_BP = jnp.asarray(prompts.tokens_BP[b : b + 1, : prompts.length_B[b]])
        size_B = jnp.asarray(prompts.length_B[b : b + 1])
        logprob = policy.logprobs(prompt_BP, size_B, jnp.array([[each]], jnp.int32))
        alone.append(float(np.asarray(logprob).mean()))
    np.testing.assert_allclose(scores("likely"), alone, atol=1e-4)
    np.testing.assert_allclose(scores("unlikely"), -np.array(alone), atol=1e-4)
    # Two are equal, and the others have no four tokens in common with any.
    assert sorted(scores("distinct").tolist()) == [-1, -1, 0, 0]


def test_long_references_serve_more_often(tmp_path):
    """Eight of the batch's 16 completions are reset on average, and those of the longer references more often."""
    references = {number: "1" * (1 + number % 6) for number in range(10, 30)}
    changes = {"data": own_questions(tmp_path, references), "rollout__max_completion_tokens": 8}
    run = reset_run(tmp_path, reset=ResetConfig(share=0.5, per="completion", prefer="long"), **changes)
    metrics = [metrics_of(run, run.step(number)) for number in range(3)]
    assert 0.3 < np.mean([each["reset/share"] for each in metrics]) < 0.7
    bias = [each["reset/length_bias"] for each in metrics]
    assert np.mean(bias) > 0.2 and bias == [pytest.approx(each["reset/score_bias"]) for each in metrics]
    coverage = [each["reset/coverage"] for each in metrics]
    assert coverage == sorted(coverage) and 1 / 20 <= coverage[0] < coverage[-1] <= 12 / 20


@pytest.mark.parametrize("reset", [MOSTLY, BACKWARD, UNLIKELY])
def test_resuming_continues_resets_bit_for_bit(tmp_path, reset):
    straight = reset_run(tmp_path / "straight", reset=reset)
    expected = comparable_steps(straight, range(3))
    first = reset_run(tmp_path / "resumed", reset=reset)
    assert comparable_steps(first, range(2)) == expected[:2]
    save_after(first, 2)
    first.close()
    second = trainer(first.config, tmp_path / "resumed", resume=True)
    assert second.state.reset == first.state.reset
    assert comparable_steps(second, range(2, 3)) == expected[2:]
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    if reset is BACKWARD:
        # Its state is part of what came back: it had moved, or its window was not empty.
        assert first.state.reset.stage or first.state.reset.recent


def own_questions(tmp_path, references: dict[int, str]):
    """A run's data: numbers to repeat, each with its reference."""
    rows = [{"question": str(number), "answer": str(number), "good": good} for number, good in references.items()]
    for name, lines in (("train", rows), ("heldout", [{"question": "99", "answer": "99", "good": "99"}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    files = {"file": str(tmp_path / "train.jsonl"), "heldout_file": str(tmp_path / "heldout.jsonl")}
    source = JsonlSource("own", train_size=None, heldout_size=1, seed=0, reference_field="good", **files)
    data = nano().data
    return dataclasses.replace(
        data, sources=(source,), prompt=dataclasses.replace(data.prompt, template="{question} =")
    )


def test_references_that_cannot_serve_are_counted_and_named(tmp_path, caplog):
    """With their stop token, completions have at most 8 tokens; `7` is no right answer to 16."""
    data = own_questions(tmp_path, {10: "10", 11: "11", 14: "12345678", 15: "1234567", 16: "7"})
    usable = {}
    for only_right in (False, True):
        with caplog.at_level(logging.WARNING):
            prepared = prepare(nano(data=data, reset=ResetConfig(share=0.5, only_right=only_right))).data
        usable[only_right] = {e.example.question for e in prepared.train_examples[0] if e.example.reference}
        # "1234567" forces at most seven tokens; it is wrong, and the others force at most two.
        assert prepared.forced_size == (2 if only_right else 7)
    assert usable == {False: {"10", "11", "15", "16"}, True: {"10", "11"}}
    first, second = [record.getMessage() for record in caplog.records if "no reference" in record.getMessage()]
    assert "source 'own': 1 of 5 training questions have no reference to start from" in first
    assert "1 longer than rollout.max_completion_tokens (8), the first to '14'" in first
    assert "3 of 5" in second and "(8), the first to '14'" in second and "2 not right, the first to '1" in second


def test_gold_answers_that_are_no_right_completions_are_no_references(tmp_path):
    """`math` reads marked answers alone, so a rollout that begins with a bare "10" could never be right."""
    pytest.importorskip("math_verify")
    data = own_questions(tmp_path, {10: "10", 11: "11"})
    answers = ResetConfig(share=0.5, references="answers")
    message = r"2 not right, the first to '1[01]'; set reset.references to 'given' and name the reference_field"
    with pytest.raises(ValueError, match=message):
        prepare(nano(data=data, reset=answers, reward=RewardConfig(checker="math")))
    examples = prepare(nano(data=data, reset=answers)).data.train_examples[0]
    assert [encoded.example.reference for encoded in examples] == [encoded.example.answer for encoded in examples]


def test_a_run_without_any_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"reset.share is 0.5, and no training question has a reference .*20 missing"):
        prepare(nano(reset=ResetConfig(share=0.5)))
    data = own_questions(tmp_path, {10: "12345678", 11: "123456789"})
    with pytest.raises(
        ValueError, match=r"2 longer than rollout.max_completion_tokens .8., the first to '1[01]'; name"
    ):
        prepare(nano(data=data, reset=ResetConfig(share=0.5)))


def test_rollouts_start_from_the_policys_own_best(tmp_path):
    """Every batch asks the same four questions. What a group is reset into is the latest right completion of the batch
    before, since all right ones have the same reward; a question without one is not reset."""
    functions = Path(__file__).parents[1] / "rewards" / "reward_functions.py"
    changes = {
        "data": own_questions(tmp_path, {number: str(number) for number in range(10, 14)}),
        "reset": ResetConfig(share=1.0, references="replay"),
        "replay": ReplayConfig(capacity=64, recent_share=0.5),
        "reward": RewardConfig(checker="function", function=f"{functions}:even", workers=1),
    }
    run = reset_run(tmp_path / "straight", **changes)
    records = [run.step(number) for number in range(2)]
    first, second = (metrics_of(run, record) for record in records)
    assert first["reset/referenced"] == first["reset/share"] == first["reset/forced_tokens"] == 0
    before, after = (record.all for record in records)
    referenced = 0
    for row, forced_G in zip(
        map(before.prompts.texts.index, after.prompts.texts), after.rollouts.forced_BG, strict=True
    ):
        right_G = (before.accuracy_BG[row] == 1) & (before.rollouts.length_BG[row] > 1)
        b = after.prompts.texts.index(before.prompts.texts[row])
        assert (forced_G == forced_G[0]).all() and (forced_G[0] > 0) == right_G.any()
        if right_G.any():
            best, forced, referenced = np.flatnonzero(right_G)[-1], forced_G[0], referenced + 1
            assert forced < before.rollouts.length_BG[row, best] == after.prompts.reference_length_B[b]
            own_F = before.rollouts.tokens_BGC[row, best, :forced]
            assert (after.rollouts.tokens_BGC[b, :, :forced] == own_F).all()
    assert second["reset/referenced"] == second["reset/share"] == referenced / 4 > 0
    # The store comes back with a checkpoint, and its completions serve as before.
    resumed = reset_run(tmp_path / "resumed", **changes)
    resumed.step(0)
    save_after(resumed, 1)
    resumed.close()
    again = trainer(resumed.config, tmp_path / "resumed", resume=True)
    assert comparable_steps(again, range(1, 2)) == [comparable(second)]
    assert_equal_arrays(run.state.learner.state, again.state.learner.state)


def test_tasks_with_a_way_to_the_answer_have_references():
    from nested_reft.data.sources import load_source

    train, _ = load_source(TaskSource("gsm", "gsm_symbolic", {}, train_size=2, heldout_size=1, seed=1))
    assert all(example.reference and f"#### {example.answer}" in example.reference for example in train)
