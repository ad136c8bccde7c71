"""Token sampling: its distribution, truncation, and log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.rollout.sampling import (
    GREEDY,
    SamplingConfig,
    draw_categorical,
    row_keys,
    row_uniforms,
    sample_token,
    tempered,
    token_logprob,
    truncated,
)


def uniforms(key, rows):
    """The numbers of as many prompts, at the first position."""
    return row_uniforms(row_keys(key, jnp.arange(rows), 1)[:, 0], 0)


def slow_softmax(logits):
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return shifted / shifted.sum()


def test_numbers_of_rows_and_positions_are_independent_and_uniform(key):
    """Neighbours along prompts, completions, positions and the pair are uncorrelated, and all of [0, 1) is covered."""
    uniform = np.asarray(
        jax.vmap(lambda position: row_uniforms(row_keys(key, jnp.arange(30), 20), position))(jnp.arange(25))
    )  # [positions, 2, prompts, completions]
    assert 0 <= uniform.min() < 1e-4 and 1 - 1e-4 < uniform.max() < 1
    np.testing.assert_allclose(np.histogram(uniform, 10, (0, 1))[0] / uniform.size, 0.1, atol=0.01)
    for axis in range(4):
        last = uniform.shape[axis] - 1
        before, after = (np.take(uniform, range(start, last + start), axis).ravel() for start in (0, 1))
        assert abs(np.corrcoef(before, after)[0, 1]) < 0.03, axis
    assert len(np.unique(uniform)) > 0.99 * uniform.size


def test_a_row_draws_by_its_prompts_number_its_place_and_its_position_alone(key):
    """In a smaller batch, in another order or at other positions beside it, a row draws the same."""
    whole = row_uniforms(row_keys(key, jnp.arange(5), 4), jnp.array([[7]]))
    part = row_uniforms(row_keys(key, jnp.array([3, 1]), 2), jnp.array([[7, 7], [7, 9]]))
    np.testing.assert_array_equal(part[:, 0], whole[:, 3, :2])
    np.testing.assert_array_equal(part[:, 1, 0], whole[:, 1, 0])
    assert not np.array_equal(part[:, 1, 1], whole[:, 1, 1])


@pytest.mark.parametrize("size", [5, 128, 300])
def test_draws_follow_the_weights(size, key):
    weight = np.exp(1.5 * np.random.default_rng(0).normal(size=size))
    weight[1::3] = 0
    draws = np.asarray(draw_categorical(uniforms(key, 40_000), jnp.tile(jnp.asarray(weight, jnp.float32), (40_000, 1))))
    expected = 40_000 * weight / weight.sum()
    counts = np.bincount(draws, minlength=size)
    assert counts[weight == 0].sum() == 0
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    degrees = likely.sum() - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_very_unlikely_tokens_are_drawn_at_their_rate(key):
    """One uniform of 2^-23 steps over the whole vocabulary would distort probabilities near 1e-7;
    a second one within the block does not."""
    weight = np.full(256, 1e-9, np.float32)
    weight[3] = 1.0  # the second block has 1.28e-7 of the mass
    weight[200:] = 0
    rows = jnp.tile(jnp.asarray(weight), (1_000_000, 1))
    draws = np.asarray(jax.jit(draw_categorical)(uniforms(key, 1_000_000), rows))
    assert (draws != 3).sum() < 6


def test_a_single_possible_token_is_always_drawn(key):
    weight = jnp.zeros((1000, 200)).at[:, 150].set(1e-30)
    assert jnp.all(draw_categorical(uniforms(key, 1000), weight) == 150)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprob_is_that_of_the_tempered_softmax(temperature):
    logits = np.random.default_rng(1).normal(size=(3, 11)).astype(np.float32) * 3
    token = np.array([0, 5, 10])
    expected = [np.log(slow_softmax(row / temperature)[t]) for row, t in zip(logits, token, strict=True)]
    logprob = token_logprob(tempered(jnp.asarray(logits), temperature), jnp.asarray(token))
    np.testing.assert_allclose(logprob, expected, rtol=1e-5)


def test_sampled_logprob_is_of_the_distribution_that_was_drawn_from(key):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(50, 40)).astype(np.float32) * 2)
    config = SamplingConfig(temperature=0.8, top_k=7, top_p=0.9)
    token, logprob = sample_token(uniforms(key, 50), logits, config)
    kept = truncated(logits / 0.8, 7, 0.9)
    for row in range(50):
        probability = slow_softmax(np.asarray(kept[row]))
        assert probability[token[row]] > 0
        np.testing.assert_allclose(logprob[row], np.log(probability[token[row]]), rtol=1e-4)


def test_greedy_is_the_argmax(key):
    logits = jax.random.normal(key, (6, 40))
    token, logprob = sample_token(uniforms(key, 6), logits, GREEDY)
    assert jnp.array_equal(token, jnp.argmax(logits, axis=-1))
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits).max(axis=-1), rtol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (0, 0.999), (4, 0.6), (99, 1.0)])
def test_truncation_against_a_slow_loop(top_k, top_p):
    logits = np.random.default_rng(3).normal(size=(8, 25)).astype(np.float32) * 2
    kept = np.isfinite(np.asarray(truncated(jnp.asarray(logits), top_k, top_p)))
    for row in range(8):
        order = np.argsort(-logits[row])[: top_k or None]
        probability = slow_softmax(logits[row][order])
        expected, mass = set(), 0.0
        for index, p in zip(order, probability, strict=True):
            if mass >= top_p:
                break
            expected.add(int(index))
            mass += p
        assert set(np.flatnonzero(kept[row]).tolist()) == expected


def test_truncation_equals_transformers():
    generation = pytest.importorskip("transformers", reason="compares with transformers' logits processors")
    torch = pytest.importorskip("torch", reason="transformers needs it")
    logits = np.random.default_rng(4).normal(size=(5, 30)).astype(np.float32) * 2
    theirs = generation.TopKLogitsWarper(9)(None, torch.tensor(logits))
    theirs = generation.TopPLogitsWarper(0.8)(None, theirs)
    ours = truncated(jnp.asarray(logits), 9, 0.8)
    assert np.array_equal(np.isfinite(np.asarray(ours)), np.isfinite(theirs.numpy()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature is -1.0"),
        ({"temperature": float("inf")}, "sampling.temperature is inf"),
        ({"top_k": -1}, "sampling.top_k is -1"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0; allowed is 0 < top_p <= 1"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
