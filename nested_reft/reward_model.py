"""Learned rewards: a language model with a scalar head that reads a completion and gives it a number.

A reward is normalised by held-out answers: 0 is the mean of the preferred ones, and 1 is a standard deviation of all
above it. Both numbers lie beside the model, in `reward_model.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.heartbeat import beat
from nested_reft.models.transformer import Transformer
from nested_reft.rewards.reward import RewardConfig, score
from nested_reft.rollout.policy import Policy
from nested_reft.run_mirror import local_run
from nested_reft.sharding import on_mesh, spread, to_host
from nested_reft.tokenizer import Tokenizer
from nested_reft.types import Prompts, valid_mask

FACTS = "reward_model.json"


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A trunk with its head, and what makes rewards of different models comparable.

    Attributes:
        policy: the model with its tokenizer; it samples nothing here.
        mean: of the rewards of held-out preferred answers.
        std: of the rewards of all held-out answers.
    """

    policy: Policy
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def load(cls, path: str) -> RewardModel:
        """The reward model of a finished run, or of a directory that `nested-reft export` wrote.

        Args:
            path: the run or the directory.

        Raises:
            ValueError: it holds no reward model, or one that was not trained to its end.
        """
        facts = read_facts(path)
        policy = Policy.load(path)
        if policy.model.value_head is None:
            raise ValueError(f"'{path}' has a {FACTS}, but its model has no scalar head; train or export it again")
        return cls(policy, facts["mean"], facts["std"])

    def rewards(self, prompt_BP: Any, prompt_length_B: Any, tokens_BGC: Any, length_BG: Any) -> Float[Array, "B G"]:
        """The reward of each completion, not normalised.

        Args:
            prompt_BP, prompt_length_B: prompts, right-padded, and their lengths.
            tokens_BGC, length_BG: completions, right-padded, and their lengths, stop tokens included.
        """
        placed = spread((prompt_BP, prompt_length_B, tokens_BGC, length_BG), self.policy.mesh)
        with on_mesh(self.policy.mesh):
            return _rewards(self.policy.model, *placed)

    def normalized(self, prompts: Prompts, rollouts: Any) -> Float[np.ndarray, "B G"]:
        """The normalised reward of each completion, on the host.

        Args:
            prompts: what was asked.
            rollouts: the completions; of `Rollouts`, only their tokens and lengths are read.
        """
        found = self.rewards(prompts.tokens_BP, prompts.length_B, rollouts.tokens_BGC, rollouts.length_BG)
        return ((to_host(found) - self.mean) / self.std).astype(np.float32)


@jax.jit
def _rewards(model: Transformer, prompt_BP: Array, prompt_length_B: Array, tokens_BGC: Array, length_BG: Array):
    # One token more, because the state that has seen a whole completion stands where the next token would.
    tokens_BGC = jnp.pad(tokens_BGC, ((0, 0), (0, 0), (0, 1)))
    valid_BP = valid_mask(prompt_length_B, prompt_BP.shape[1])
    hidden_BGCD = model.completion_hidden(prompt_BP, valid_BP, tokens_BGC)
    end_BGCD = jnp.take_along_axis(hidden_BGCD, length_BG[..., None, None], axis=2)
    rewards_BG = model.values(end_BGCD[:, :, 0])
    assert model.value_head is not None
    # No pair teaches the bias, so it is left out; exported models have none.
    return rewards_BG - model.value_head.bias[...]


def read_facts(path: str) -> dict[str, float]:
    """What normalises a reward model's rewards: `mean` and `std`.

    Args:
        path: a run directory, or what was exported of one.

    Raises:
        ValueError: it holds no reward model, a broken one, or one that has been trained on since.
    """
    file = local_run(path) / FACTS
    if not file.is_file():
        raise ValueError(
            f"reward.model is '{path}', which has no {FACTS}; allowed is a finished run of `nested-reft reward-model`,"
            " or what `nested-reft export` made of it"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        facts = {name: float(found[name]) for name in ("mean", "std")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"'{file}' cannot be read: {error!r}") from None
    newest = newest_checkpoint(file.with_name("checkpoints"))
    if newest is not None and newest != found.get("checkpoint", newest):
        raise ValueError(
            f"'{file}' is of checkpoint {found['checkpoint']}, and the newest of the run is {newest}: it was continued"
            " since. Train it to its end first"
        )
    if not (math.isfinite(facts["mean"]) and math.isfinite(facts["std"]) and facts["std"] > 0):
        raise ValueError(f"'{file}' has mean {facts['mean']} and std {facts['std']}; allowed are numbers, and std > 0")
    return facts


@functools.lru_cache(maxsize=16)
def _loaded(path: str, written: float, mesh: Mesh | None) -> RewardModel:
    """One copy for each mesh, which training and evaluation share; `written` tells a file that was replaced since."""
    if mesh is None:
        return RewardModel.load(path)
    model = _loaded(path, written, None)
    return model if model.policy.mesh == mesh else dataclasses.replace(model, policy=model.policy.on(mesh))


def reward_models(paths: Sequence[str], mesh: Mesh | None = None) -> list[RewardModel]:
    """The reward models of `reward.model`; each is loaded once.

    Args:
        paths: runs or exported directories.
        mesh: where they work; None is one device.

    Raises:
        ValueError: one holds no reward model.
    """
    for path in paths:
        read_facts(path)  # which says so where there is no such file
    return [_loaded(path, (local_run(path) / FACTS).stat().st_mtime, mesh) for path in paths]


def check_reward_models(paths: Sequence[str], tokenizer: Tokenizer, longest: int) -> None:
    """Refuses reward models that would read the policy's tokens as other text, or not to their end.

    Args:
        paths: of `reward.model`.
        tokenizer: the policy's.
        longest: tokens of the longest prompt and completion together.

    Raises:
        ValueError: one holds no reward model, has another tokenizer, or too few positions.
    """
    for path, model in zip(paths, reward_models(paths), strict=True):
        if not model.policy.tokenizer.reads_as(tokenizer):
            raise ValueError(
                f"reward.model is '{path}', whose tokenizer is not the policy's, so it would read other text; train a"
                " reward model on the policy's own model"
            )
        positions = model.policy.model.config.max_positions
        if longest > positions:
            raise ValueError(
                f"data.max_prompt_tokens + rollout.max_completion_tokens is {longest}; reward.model '{path}' allows"
                f" {positions} positions"
            )


def score_rollouts(
    policy: Policy, prompts: Prompts, rollouts: Any, config: RewardConfig, max_completion_tokens: int
) -> tuple[
    tuple[tuple[str, ...], ...],
    Float[np.ndarray, "B G"],
    Float[np.ndarray, "B G"],
    Bool[np.ndarray, "B G"],
    dict[str, Float[np.ndarray, "B G"]],
]:
    """Decodes completions and scores them, by reward models too where there are any.

    Args:
        policy: what sampled them; reward models work on its devices.
        prompts: what was asked.
        rollouts: the completions, `Rollouts` whose arrays are on the host.
        config: how they are scored.
        max_completion_tokens: the limit that they were sampled with.

    Returns:
        The texts, and what `rewards.score` returns.
    """
    beat()  # whoever scores has sampled a batch
    texts = policy.tokenizer.decode_completions(rollouts.tokens_BGC, rollouts.length_BG)
    models = reward_models(config.model, policy.mesh)
    learned = np.stack([model.normalized(prompts, rollouts) for model in models]) if models else None
    return texts, *score(
        texts, prompts, rollouts.finished_BG, config, rollouts.length_BG, max_completion_tokens, learned
    )
