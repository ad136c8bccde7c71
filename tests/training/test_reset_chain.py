"""A chain whose only reward is at its end, which resets solve and PPO from the start does not.

The chain has 7 steps with 8 actions each, and one action of each goes on. The policy is a table, so the loss, the
advantages and the starts are all that is tested here. By chance, one completion in 2 million is right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_reft.dataset_reset import ResetConfig, ResetState, choose
from nested_reft.losses import presets
from nested_reft.losses.objective import TargetPass
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.types import Prompts, TrainBatch

STEPS, ACTIONS, SHAPE = 7, 8, (4, 8, 7)
RIGHT = np.array([3, 1, 4, 1, 5, 2, 6])
PPO = PolicyGradient(presets.ppo("base", kl_coefficient=0.0))
OPTIMIZER = optax.adam(0.1)
# Logits and a value for each step, off the chain (0) and on it (1).
START = {"logits": jnp.zeros((STEPS, 2, ACTIONS)), "value": jnp.zeros((STEPS, 2))}


@jax.jit
def update(parameters, memory, key, forced_BG):
    """One PPO update on completions that begin with the first tokens of the right one."""

    def act(on_BG, now):
        step, step_key = now
        logits_BGA = parameters["logits"][step, on_BG.astype(int)]
        chosen_BG = jnp.where(step < forced_BG, jnp.asarray(RIGHT)[step], jax.random.categorical(step_key, logits_BGA))
        return on_BG & (chosen_BG == jnp.asarray(RIGHT)[step]), (on_BG, chosen_BG)

    steps = (jnp.arange(STEPS), jax.random.split(key, STEPS))
    ended_BG, (on_CBG, token_CBG) = jax.lax.scan(act, jnp.ones(SHAPE[:2], bool), steps)
    on_BGC, token_BGC = (jnp.moveaxis(each, 0, -1).astype(int) for each in (on_CBG, token_CBG))

    def target_pass(parameters):
        logprob_BGCA = jax.nn.log_softmax(parameters["logits"][jnp.arange(STEPS), on_BGC])
        logprob_BGC = jnp.take_along_axis(logprob_BGCA, token_BGC[..., None], axis=-1)[..., 0]
        return TargetPass(logprob_BGC, jnp.zeros(SHAPE), None, parameters["value"][jnp.arange(STEPS), on_BGC])

    old = target_pass(parameters)
    batch = TrainBatch(
        prompt_BP=jnp.zeros((SHAPE[0], 1), int),
        prompt_length_B=jnp.ones(SHAPE[0], int),
        tokens_BGC=token_BGC,
        length_BG=jnp.full(SHAPE[:2], STEPS),
        forced_BG=forced_BG,
        counted_BG=jnp.ones(SHAPE[:2], bool),
        signal_BG=ended_BG.astype(jnp.float32),
        behavior_logprob_BGC=old.logprob_BGC,
        old_logprob_BGC=old.logprob_BGC,
        old_value_BGC=old.value_BGC,
    )
    ready = PPO.with_token_signals(batch, 0.0)
    gradient = jax.grad(lambda parameters: PPO.loss(target_pass(parameters), ready).mean())(parameters)
    change, memory = OPTIMIZER.update(gradient, memory, parameters)
    return optax.apply_updates(parameters, change), memory, (ended_BG & (forced_BG == 0)).sum()


@pytest.mark.parametrize("config", [ResetConfig(share=0.75, per="completion"), ResetConfig()], ids=["resets", "start"])
def test_resets_solve_a_chain_and_the_start_does_not(config):
    """After equal updates the policy walks the chain from its start, or has not been rewarded once."""
    prompts = Prompts(np.zeros((4, 1), np.int32), np.ones(4, int), np.zeros(4, int), ("",) * 4, ("",) * 4, ({},) * 4)
    parameters, rewarded = jax.tree.map(jnp.copy, START), 0
    memory = OPTIMIZER.init(parameters)
    for step in range(150):
        reset_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
        chosen = choose(ResetState(), config, prompts, [RIGHT.tolist()] * 4, reset_key, step, SHAPE[1], STEPS - 1)
        forced_BG = jnp.zeros(SHAPE[:2], int) if chosen.forced is None else jnp.asarray(chosen.forced.length_BG)
        parameters, memory, right = update(parameters, memory, key, forced_BG)
        rewarded += int(right)
    on_chain = jax.nn.softmax(parameters["logits"][:, 1])[jnp.arange(STEPS), RIGHT]
    if config.is_on:
        assert jnp.prod(on_chain) > 0.9 and rewarded > 0
    else:
        assert jnp.prod(on_chain) < 1e-4 and rewarded == 0
