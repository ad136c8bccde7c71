"""Searching: completions of prompts under a policy, and their rewards."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nested_reft.estimators.health import Health, off_policy_health
from nested_reft.layer_plan import LayerPlan
from nested_reft.reward_model import score_rollouts
from nested_reft.rewards.limits import RewardError
from nested_reft.rewards.reward import FAILURES, RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.mixture import mixture_rollouts
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import to_host
from nested_reft.types import ForcedPrefixes, Prompts, Rollouts, Scored, SearchStats, gradient_mask


class Searcher:
    """Policy, prompts, plan and key in; scored rollouts out.

    It keeps no state between calls, so the same code runs in the training loop, in threads beside it and
    in other processes. Arrays come to the host here, once.
    """

    def __init__(
        self, rollout: RolloutConfig, reward: RewardConfig, shared_prefix: int = 0, measures_mismatch: bool = False
    ):
        """Args:
        rollout: how completions are sampled.
        reward: how they are scored, and which of them count.
        shared_prefix: leading tokens that all prompts have in common.
        measures_mismatch: score the completions with the full model as well, for `SearchStats.mismatch`.
        """
        self._rollout, self._reward, self._shared_prefix = rollout, reward, shared_prefix
        self._measures_mismatch = measures_mismatch

    def search(self, policy: Policy, prompts: Prompts, plan: LayerPlan, key: jax.Array) -> Scored:
        """Samples completions of each prompt and scores them.

        Args:
            policy: what samples.
            prompts: B prompts, perhaps with forced prefixes.
            plan: the layers of the nested policy.
            key: PRNG key of the batch.

        Returns:
            B groups on the host. A completion counts in the loss where it could be scored and, with
            `reward.overlong_filter`, was not cut off.

        Raises:
            RewardError: none of the completions could be scored.
        """
        started = time.monotonic()
        rollouts, drafts = self._rollouts(policy, prompts, plan, key)
        # JAX returns before the devices are done, and the time must be that of the sampling.
        jax.block_until_ready(rollouts)
        stats = SearchStats(time.monotonic() - started, *(int(count) for count in to_host(drafts)))
        sampled = time.monotonic()
        full_BGC = self._full_logprobs(policy, rollouts) if self._measures_mismatch else None
        rollouts = to_host(rollouts)
        limit = self._rollout.max_completion_tokens
        texts, reward_BG, accuracy_BG, scored_BG, parts = score_rollouts(policy, prompts, rollouts, self._reward, limit)
        if scored_BG.size and not scored_BG.any():
            counts = ", ".join(f"{name} {int(parts[name].sum())}" for name in FAILURES)
            raise RewardError(
                f"no completion of this step could be scored ({counts}), so there is nothing to learn from; the warning"
                " above has the first message"
            )
        # Completions without a reward have no advantage, so their tokens must not enter the divisor either.
        counted_BG = rollouts.counted_BG & scored_BG
        # The reward of a completion that was cut off still counts for its group, since only the mask changes.
        if self._reward.overlong_filter:
            counted_BG &= rollouts.finished_BG
        rollouts = dataclasses.replace(rollouts, counted_BG=np.asarray(counted_BG))
        mismatch = None if full_BGC is None else _mismatch(rollouts, full_BGC)
        stats = dataclasses.replace(stats, scoring_seconds=time.monotonic() - sampled, mismatch=mismatch)
        return Scored(prompts, rollouts, texts, reward_BG, accuracy_BG, scored_BG, parts, stats)

    def _full_logprobs(self, policy: Policy, rollouts: Rollouts) -> Array:
        return policy.logprobs(
            rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC, shared_prefix=self._shared_prefix
        )

    def _rollouts(
        self, policy: Policy, prompts: Prompts, plan: LayerPlan, key: jax.Array
    ) -> tuple[Rollouts, tuple[Array, ...]]:
        """Completions of the nested policy, of its mixture with the full one, or drafted by it."""
        config = self._rollout
        if config.mode == "exact":
            exact = policy.generate_exact(
                prompts,
                plan,
                key,
                group_size=config.group_size,
                draft_length=config.draft_length,
                shared_prefix=self._shared_prefix,
            )
            return exact.rollouts, (exact.tested, exact.accepted)

        def sample(layers: LayerPlan, sample_key: jax.Array, count: int, forced: ForcedPrefixes | None) -> Rollouts:
            return policy.generate(
                prompts,
                layers,
                sample_key,
                group_size=count,
                shared_prefix=self._shared_prefix,
                forced=forced,
                rows=config.rows,
            )

        # The prefixes are passed on here, because a mixture hands each component only those of its own slots.
        if config.mixture_alpha is None:
            return sample(plan, key, config.group_size, prompts.forced), ()
        mixed = mixture_rollouts(
            sample,
            key,
            plan,
            policy.num_layers,
            len(prompts),
            config.group_size,
            config.mixture_alpha,
            prompts.forced,
        )
        return mixed, ()


@jax.jit
def _health(full_BGC: Array, behavior_BGC: Array, length_BG: Array, forced_BG: Array, counted_BG: Array) -> Health:
    mask_BGC = gradient_mask(length_BG, forced_BG, counted_BG, full_BGC.shape[-1])
    return off_policy_health(full_BGC, behavior_BGC, mask_BGC)


def _mismatch(rollouts: Rollouts, full_BGC: Array) -> dict[str, float]:
    """`Health` of samples against the full model whose nested policy drew them, so that age has no part in it."""
    lengths = (rollouts.length_BG, rollouts.forced_BG, rollouts.counted_BG)
    health = to_host(_health(full_BGC, *map(jnp.asarray, (rollouts.behavior_logprob_BGC, *lengths))))
    return {f.name: float(getattr(health, f.name)) for f in dataclasses.fields(health)}
