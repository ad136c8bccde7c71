"""Token sampling and token log-probabilities: the one place where logits become either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Blocks and their entries are both far fewer than the vocabulary, so both sums of a draw are short. A TPU works on
# 128 values side by side.
BLOCK = 128
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it, in sampling and in every log-probability of the
            update; 0 is greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least p; 1 keeps
            all. Truncation of either kind takes support away from the behavior policy, so no importance
            weight makes its samples unbiased, and losses whose weight reads it are refused.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        # Far outside of these, quotients of logits overflow in float32, or no longer differ.
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"rollout.sampling.temperature is {self.temperature}; allowed is 0 (greedy), or {MIN_TEMPERATURE:g} to"
                f" {MAX_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise ValueError(f"rollout.sampling.top_k is {self.top_k}; allowed is 0 (keep all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.sampling.top_p is {self.top_p}; allowed is 0 < top_p <= 1")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the distribution."""
        return self.top_k != 0 or self.top_p != 1


GREEDY = SamplingConfig(temperature=0.0)


def token_logprob(logits: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """log softmax(logits)[token], in nats, over the full vocabulary; the logits are `tempered` ones.

    Rollouts take it from the sums they draw from (`sample_token`), to rounding. Greedy
    decoding (temperature 0) has no density; its log-probabilities are those at temperature 1.

    Args:
        logits: tempered, one row per token.
        token: the id whose log-probability is wanted.

    Returns:
        One value per row, 0 or less.
    """
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def tempered(logits: Float[Array, "*rows V"], temperature: float) -> Float[Array, "*rows V"]:
    """Float32 logits divided by the temperature, or as they are for greedy decoding.

    Args:
        logits: what the model gives, at temperature 1.
        temperature: 0 or more.
    """
    logits = logits.astype(jnp.float32)
    # The temperature is known when the program compiles, so a division by 1 need not run.
    return logits if temperature in (0, 1) else logits / temperature


def row_keys(key: jax.Array, number_B: Int[Array, " B"], group_size: int) -> Key[Array, "B G"]:
    """The key of each completion: fold_in(fold_in(key, number of its prompt), g).

    It depends on nothing that stands beside the row, so a batch may be split, filled up, reordered or spread over
    devices.

    Args:
        key: PRNG key of all prompts.
        number_B: a number for each prompt, 0 or more; prompts of one number draw alike.
        group_size: G.
    """

    def of_prompt(number: Array) -> Array:
        return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, number)))(jnp.arange(group_size))

    return jax.vmap(of_prompt)(number_B)


def row_uniforms(key: Key[Array, "*rows"], position: Int[Array, "*#rows"] | int) -> Float[Array, "2 *rows"]:
    """The two random numbers in [0, 1) that each row's draw at a position takes.

    Args:
        key: PRNG key of each row, of `row_keys`.
        position: of the token that is drawn, counted from the first token of its completion, forced ones included.
    """

    def draw(key: Array, position: Array) -> Array:
        # A folded key is a hash of key and position, and its words are the random bits. To draw from that key would
        # hash twice more, which a CPU notices in the decode steps of a small model.
        return jax.random.key_data(jax.random.fold_in(key, position))[:2]

    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    words = jnp.moveaxis(draw(key, jnp.broadcast_to(position, key.shape)), -1, 0)
    # A float32 holds 24 bits exactly, so the largest value is still below 1.
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def sample_token(
    uniform: Float[Array, "2 *rows"], logits: Float[Array, "*rows V"], config: SamplingConfig
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"]]:
    """Draws one token per row.

    Args:
        uniform: of `row_uniforms`; greedy decoding does not read it.
        logits, config: the policy.

    Returns:
        The tokens and their log-probabilities under the distribution they were drawn from, that
        is, after temperature and truncation.
    """
    if config.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, token_logprob(tempered(logits, config.temperature), token)
    logits = truncated(tempered(logits, config.temperature), config.top_k, config.top_p)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    # The weights are relative to the largest, so the exponential does not overflow.
    token, logit, total = _draw(uniform, logits, -jnp.inf, lambda x, highest: jnp.exp(x - highest), highest)
    # The total is that of exp(x - highest), so this is the log-softmax at the token.
    return token, logit - highest[..., 0] - jnp.log(total)


def policy_probability(logits: Float[Array, "*rows V"], config: SamplingConfig) -> Float[Array, "*rows V"]:
    """The distribution that `sample_token` draws from, written out; one-hot where decoding is greedy.

    Args:
        logits: what the model gives, at temperature 1.
        config: temperature and truncation.

    Returns:
        Probabilities that sum to 1 over the vocabulary.
    """
    if config.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(truncated(tempered(logits, config.temperature), config.top_k, config.top_p), axis=-1)


def truncated(logits: Float[Array, "*rows V"], top_k: int, top_p: float) -> Float[Array, "*rows V"]:
    """Logits with everything outside top-k, then outside top-p of the rest, at -inf.

    Args:
        logits: tempered.
        top_k: tokens to keep; 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        # Tokens that tie with the k-th all stay.
        threshold = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if top_p < 1:
        # Two signs make the ascending sort a descending one.
        descending = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        # A token stays while those before it hold less than p. So the one that reaches p stays, and at least one
        # does.
        mass_before = jnp.cumsum(probability, axis=-1) - probability
        last = jnp.sum(mass_before < top_p, axis=-1, keepdims=True) - 1
        threshold = jnp.take_along_axis(descending, last, axis=-1)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


def draw_categorical(uniform: Float[Array, "2 *rows"], weight: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """Draws an index with probability proportional to `weight`, which need not be normalised.

    Args:
        uniform: of `row_uniforms`.
        weight: 0 or more, and more than 0 somewhere in each row.
    """
    return _draw(uniform, weight, 0.0, lambda x: x)[0]


def _draw(
    uniform: Float[Array, "2 *rows"],
    values: Float[Array, "*rows V"],
    padding: float,
    weight_of: Callable[..., Array],
    *row_values: Array,
) -> tuple[Int[Array, "*rows"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Draws an index with probability proportional to `weight_of(values, *row_values)`.

    First a block of 128 indices by its total, then an index within it, each by an inverse
    cumulative sum of one uniform: two random numbers per row where the Gumbel method draws one
    per vocabulary entry, which on a CPU costs more than the whole output head. The weights are
    made twice, for the totals and again for the one block, and so never stored.

    Args:
        uniform: of `row_uniforms`.
        values: what weights are made from.
        padding: a value of weight 0.
        weight_of: from values and row values `[*rows, 1]` to weights, none negative.

    Returns:
        The index, the value at it, and the sum of all weights.
    """
    # The last block is filled up to 128 entries without weight.
    widths = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % BLOCK)]
    blocks = jnp.pad(values, widths, constant_values=padding).reshape(*values.shape[:-1], -1, BLOCK)
    block_total = weight_of(blocks, *(x[..., None] for x in row_values)).sum(axis=-1)
    # Without the barrier XLA sums the totals by a second pass over all weights.
    block_total = jax.lax.optimization_barrier(block_total)
    block = _inverse_cumulative(uniform[0], block_total)
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    index = _inverse_cumulative(uniform[1], weight_of(within, *row_values))
    value = jnp.take_along_axis(within, index[..., None], axis=-1)[..., 0]
    return block * BLOCK + index, value, block_total.sum(axis=-1)


def _inverse_cumulative(uniform: Float[Array, "*rows"], weight: Float[Array, "*rows M"]) -> Int[Array, "*rows"]:
    cumulative = jnp.cumsum(weight, axis=-1)
    threshold = uniform[..., None] * cumulative[..., -1:]
    # With `<=`, a uniform of exactly 0 passes over leading entries that have no weight.
    drawn = jnp.sum(cumulative <= threshold, axis=-1)
    # Rounding may carry the threshold up to the total: stay on the last index with any weight.
    last = jnp.max(jnp.where(weight > 0, jnp.arange(weight.shape[-1]), 0), axis=-1)
    return jnp.minimum(drawn, last).astype(jnp.int32)
