"""Random training batches that the loss tests share."""

import jax
import jax.numpy as jnp

from nested_reft.types import TrainBatch


def random_batch(key: jax.Array, prompts: int = 2, group: int = 3, tokens: int = 4) -> tuple[jax.Array, TrainBatch]:
    """Target log-probabilities, and a batch off-policy by about 0.4 nats a token, with forced tokens and padding.

    Every completion has a share of the full model of its own, between 0.3 and 0.6.
    """
    shape = (prompts, group, tokens)
    keys = jax.random.split(key, 7)
    target_BGC = -jax.random.exponential(keys[0], shape)
    length_BG = jax.random.randint(keys[1], shape[:2], 1, tokens + 1)

    def near(index: int) -> jax.Array:
        return target_BGC + 0.4 * jax.random.normal(keys[index], shape)

    batch = TrainBatch(
        prompt_BP=jnp.zeros((prompts, 2), jnp.int32),
        prompt_length_B=jnp.full(prompts, 2, jnp.int32),
        tokens_BGC=jnp.zeros(shape, jnp.int32),
        length_BG=length_BG,
        forced_BG=jnp.zeros(shape[:2], jnp.int32).at[0, 0].set(1),
        counted_BG=jnp.ones(shape[:2], bool),
        signal_BG=jax.random.normal(keys[3], shape[:2]),
        behavior_logprob_BGC=near(2),
        full_share_BG=jnp.linspace(0.3, 0.6, prompts * group).reshape(shape[:2]),
        old_logprob_BGC=near(4),
        reference_logprob_BGC=near(5),
        nested_logprob_BGC=near(6),
    )
    return target_BGC, batch


def one_group(ratio_GC, advantage_G, length_G=None) -> tuple[jax.Array, TrainBatch]:
    """A group with the given ratios to the behavior policy."""
    ratio_BGC = jnp.asarray([ratio_GC], jnp.float32)
    zeros_BG = jnp.zeros(ratio_BGC.shape[:2], jnp.int32)
    target_BGC = jnp.full(ratio_BGC.shape, -1.0)
    batch = TrainBatch(
        prompt_BP=jnp.zeros((1, 1), jnp.int32),
        prompt_length_B=jnp.ones(1, jnp.int32),
        tokens_BGC=jnp.zeros(ratio_BGC.shape, jnp.int32),
        length_BG=zeros_BG + ratio_BGC.shape[-1] if length_G is None else jnp.array([length_G], jnp.int32),
        forced_BG=zeros_BG,
        counted_BG=zeros_BG == 0,
        signal_BG=jnp.array([advantage_G], jnp.float32),
        behavior_logprob_BGC=target_BGC - jnp.log(ratio_BGC),
    )
    return target_BGC, batch
