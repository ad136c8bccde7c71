"""Held-out accuracy: the estimate of pass@k, by hand, and batches that devices share."""

import itertools

import jax
import numpy as np
import pytest

from nested_reft import evaluation
from nested_reft.evaluation import EvaluationConfig, num_correct, pass_at_k
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.setup import prepare
from tests.training.runs import nano


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected", "naive"),
    [
        # 6 pairs of 4 samples; 3 of them hold the one right sample: 1/2. With replacement: 1 - (3/4)^2 = 7/16.
        (4, 1, 2, 1 / 2, 7 / 16),
        # 10 triples of 5 samples; one holds none of the two right ones: 9/10. With replacement: 1 - (3/5)^3 = 98/125.
        (5, 2, 3, 9 / 10, 98 / 125),
    ],
)
def test_pass_at_k_by_hand(samples, correct, k, expected, naive):
    """The k samples are drawn without replacement; 1 - (1 - c / n)^k, which draws with it, is biased low."""
    assert pass_at_k(samples, correct, k) == pytest.approx(expected)
    assert 1 - (1 - correct / samples) ** k == pytest.approx(naive) and naive < expected


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 3, 2), (4, 4, 1), (5, 3, 3), (8, 8, 8)])
def test_with_fewer_wrong_samples_than_k_one_is_always_right(samples, correct, k):
    assert correct > samples - k
    assert pass_at_k(samples, correct, k) == 1
    assert pass_at_k(samples, samples - k, k) < 1  # with k wrong samples, all may be drawn


@pytest.mark.parametrize(("samples", "k"), [(4, 2), (6, 1), (6, 4)])
def test_pass_at_k_counts_subsets(samples, k):
    """A slow count over all subsets; k = 1 is the share of right samples."""
    for correct in range(samples + 1):
        is_right = np.arange(samples) < correct
        subsets = list(itertools.combinations(is_right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_is_unbiased():
    """Its mean over binomial counts is 1 - (1 - p)^k; that of the naive value is less."""
    p, n, k = 0.3, 4, 2
    chance_c = [np.prod([1.0 * (n - i) / (i + 1) for i in range(c)]) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(chance_c) == pytest.approx(1)
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chance_c))
    naive = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chance_c))
    assert mean == pytest.approx(1 - (1 - p) ** k) and naive < mean - 0.01


def test_refusals():
    with pytest.raises(ValueError, match=r"evaluation.pass_k is 9; allowed is 1 to evaluation.samples_per_prompt"):
        EvaluationConfig(samples_per_prompt=8, pass_k=9)
    with pytest.raises(ValueError, match=r"evaluation.every_steps is 0 and evaluation.batch_size 32"):
        EvaluationConfig(every_steps=0)


@pytest.mark.slow
def test_devices_share_batches_that_they_do_not_divide(monkeypatch):
    """Seven prompts in batches of five on eight devices: each has one row, and rows that are added count nowhere."""

    def scored(policy, prompts, rollouts, reward, limit):
        # An untrained model is never right; here, odd lengths are, and every third length cannot be checked.
        texts = policy.tokenizer.decode_completions(rollouts.tokens_BGC, rollouts.length_BG)
        length_BG = np.array([[len(text) for text in row] for row in texts])
        return texts, None, length_BG % 2, length_BG % 3 > 0, {}

    rows, generate = [], Policy.generate

    def spied(policy, prompts, *args, **named):
        found = generate(policy, prompts, *args, **named)
        rows.append(found.tokens_BGC.sharding.shard_shape(found.tokens_BGC.shape)[0])
        return found

    monkeypatch.setattr(evaluation, "score_rollouts", scored)
    monkeypatch.setattr(Policy, "generate", spied)
    setup = prepare(nano())
    examples, found = setup.data.heldout_examples[0][:7], []
    for mesh in (MeshConfig(), MeshConfig(data=8)):
        policy, texts = setup.policy.on(make_mesh(mesh)), []
        counts_E, unscored = num_correct(
            policy, examples, setup.config.reward, 5, None, jax.random.key(3), 3, completions=texts
        )
        assert len(counts_E) == 7 and len(texts) == 21
        found.append((counts_E.tolist(), unscored, texts))
    assert found[0] == found[1] and rows == [5, 5, 1, 1]
    # Otherwise rows that were counted twice, or drawn alike, would not show.
    assert len(set(found[0][0])) > 1 and found[0][1] and len({text["text"] for text in found[0][2]}) > 7
