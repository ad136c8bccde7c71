"""Rollouts and their rewards: what a trainer, or a searcher beside it, does before an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from nested_reft.layer_skip import LayerPlan
from nested_reft.models.low_precision import low_precision
from nested_reft.models.transformer import Transformer
from nested_reft.rewards.reward import component_metrics, score
from nested_reft.rollout.dynamic_sampling import mixed_groups
from nested_reft.rollout.exact import generate_exact, next_draft_length
from nested_reft.rollout.generate import generate
from nested_reft.rollout.mixture import mixture_rollouts
from nested_reft.sharding import replicate, shard_batch
from nested_reft.train.setup import Setup
from nested_reft.train.step import TrainState
from nested_reft.types import Prompts, Rollouts, Scored


class Generation:
    """Completions of prompts under one configuration, and their rewards.

    Attributes:
        draft_length: of the next `exact` rollouts; follows their acceptance rate.
        draft_metrics: of the last ones; empty in other modes.
    """

    def __init__(self, setup: Setup, mesh: Mesh):
        """Args:
        setup: the run's.
        mesh: where prompts are spread.
        """
        config, self._tokenizer = setup.config, setup.tokenizer
        self._config, self._num_layers, self._mesh = config, setup.model.config.num_layers, mesh
        self._shared_prefix = setup.shared_prefix
        self._stop_ids = replicate(np.array(setup.tokenizer.stop_ids, np.int32), mesh)
        self.draft_length, self.draft_metrics = config.rollout.draft_length, dict[str, float]()
        self._copied: tuple[TrainState, Transformer] | None = None

    def rollout(self, state: TrainState, prompts: Prompts, plan: LayerPlan, key: jax.Array) -> Rollouts:
        """Completions of the nested policy, of its defensive mixture with the full one, or drafted by it."""
        alpha, group_size = self._config.loss.mixture_alpha, self._config.rollout.group_size
        if self._config.rollout.mode == "exact":
            return self._exact(state, prompts, plan, key)
        if alpha is None:
            return self._sample(state, prompts, plan, key, group_size, self._stop_ids)
        return mixture_rollouts(
            lambda layers, sample_key, count: self._sample(state, prompts, layers, sample_key, count, self._stop_ids),
            key,
            plan,
            self._num_layers,
            len(prompts),
            group_size,
            alpha,
        )

    def full_length(self, state: TrainState, prompts: Prompts, plan: LayerPlan, key: jax.Array) -> Rollouts:
        """Completions under a plan that no stop token ends, so that speeds can be compared."""
        never = replicate(np.full(len(self._tokenizer.stop_ids), -1, np.int32), self._mesh)
        return self._sample(state, prompts, plan, key, self._config.rollout.group_size, never)

    def score(self, rollouts: Rollouts, prompts: Prompts) -> Scored:
        """Decodes and scores completions."""
        tokens_BGC, length_BG = np.asarray(rollouts.tokens_BGC), np.asarray(rollouts.length_BG)
        texts = self._tokenizer.decode_completions(tokens_BGC, length_BG)
        reward_BG, accuracy_BG, scored_BG, parts = score(
            texts,
            prompts,
            np.asarray(rollouts.finished_BG),
            self._config.reward,
            length_BG,
            self._config.rollout.max_completion_tokens,
        )
        return Scored(prompts, rollouts, texts, reward_BG, accuracy_BG, scored_BG, parts)

    def _sample(
        self, state: TrainState, prompts: Prompts, plan: LayerPlan, key: jax.Array, group_size: int, stop_ids: Array
    ) -> Rollouts:
        rollouts = generate(
            self._behavior_model(state),
            shard_batch(prompts.tokens_BP, self._mesh),
            shard_batch(prompts.length_B, self._mesh),
            replicate(plan, self._mesh),
            stop_ids,
            key,
            state.updates,
            group_size=group_size,
            max_completion_tokens=self._config.rollout.max_completion_tokens,
            sampling=self._config.rollout.sampling,
            shared_prefix=self._shared_prefix,
        )
        return jax.block_until_ready(rollouts)

    def _behavior_model(self, state: TrainState) -> Transformer:
        """What samples: the target's weights, or their copy in fewer bits, made once per update."""
        if self._config.rollout.weights == "target":
            return state.model
        if self._copied is None or self._copied[0] is not state:
            self._copied = None  # before its successor is made
            self._copied = (state, low_precision(state.model, self._config.rollout.weights))
        return self._copied[1]

    def _exact(self, state: TrainState, prompts: Prompts, plan: LayerPlan, key: jax.Array) -> Rollouts:
        """Completions of the full model, drafted by the nested one; adapts the draft length for the next batch."""
        config = self._config.rollout
        exact = generate_exact(
            state.model,
            shard_batch(prompts.tokens_BP, self._mesh),
            shard_batch(prompts.length_B, self._mesh),
            replicate(plan, self._mesh),
            self._stop_ids,
            key,
            state.updates,
            group_size=config.group_size,
            max_completion_tokens=config.max_completion_tokens,
            sampling=config.sampling,
            draft_length=self.draft_length,
            shared_prefix=self._shared_prefix,
        )
        acceptance = float(exact.acceptance)
        self.draft_metrics = {"draft_length": self.draft_length, "draft_acceptance": acceptance}
        self.draft_length = next_draft_length(self.draft_length, acceptance, plan.num_kept / self._num_layers)
        return exact.rollouts


def generation_metrics(batches: Sequence[Scored], rollout_seconds: float, num_sources: int) -> dict[str, Any]:
    """What the policy did on everything that was generated, trained on or not."""
    length_BG = np.concatenate([np.asarray(scored.rollouts.length_BG) for scored in batches])
    scored_BG = np.concatenate([scored.scored_BG for scored in batches])
    source_B = np.concatenate([scored.prompts.source_B for scored in batches])

    def mean(name: str) -> float:
        value_BG = np.concatenate([getattr(scored, name) for scored in batches])
        return float(value_BG[scored_BG].mean()) if scored_BG.any() else 0.0

    parts = {name: np.concatenate([scored.parts[name] for scored in batches]) for name in batches[0].parts}
    return component_metrics(parts, scored_BG) | {
        "reward": mean("reward_BG"),
        "accuracy": mean("accuracy_BG"),
        "unscored": int((~scored_BG).sum()),
        "completion_tokens": float(length_BG.mean()),
        "finished": float(np.concatenate([np.asarray(scored.rollouts.finished_BG) for scored in batches]).mean()),
        "mixed_groups": float(np.concatenate([mixed_groups(scored) for scored in batches]).mean()),
        "generation_batches": len(batches),
        "rollout_seconds": rollout_seconds,
        "tokens_per_second": float(length_BG.sum() / rollout_seconds),
        "sources": np.bincount(source_B, minlength=num_sources).tolist(),
    }
