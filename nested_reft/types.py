"""The values that flow through one training step, and the key to array suffixes.

Dimension key (used as suffixes of array names and as jaxtyping axes):

    B  prompts               G  completions per prompt     N  B * G
    P  prompt tokens         C  completion tokens          T  sequence tokens
    V  vocabulary            D  width                      F  hidden width
    H  query heads           J  key/value heads            K  head size
    L  layers                S  layers kept by a plan      E  measured examples

Host values (text, answers) are plain dataclasses; what enters a compiled function is a
`flax.struct` dataclass of arrays. Masks are built from lengths, never from token values:
in several vocabularies the padding token is also the end-of-text token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.layer_skip import LayerPlan


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, on the host.

    Attributes:
        tokens_BP: token ids, right-padded.
        length_B: valid tokens of each row.
        source_B: index of the data source that each prompt came from.
        texts: the prompts as the model reads them, for the sample log.
        answers: the gold answers that the reward checks against.
        metadata: per prompt, whatever its source's verifier needs beyond the answer.
        references: optional known-good completions (dataset reset starts from them).
        checkers: how each answer is checked; None, or nothing at all, leaves it to the reward.
    """

    tokens_BP: Int[np.ndarray, "B P"]
    length_B: Int[np.ndarray, " B"]
    source_B: Int[np.ndarray, " B"]
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    references: tuple[str, ...] | None = None
    checkers: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.answers)


@struct.dataclass
class Rollouts:
    """Sampled completions of a batch of prompts, `G` per prompt.

    Attributes:
        prompt_BP, prompt_length_B: the prompts, stored once per group, right-padded.
        tokens_BGC: sampled token ids; positions at or after `length_BG` are zero.
        length_BG: valid tokens, the stop token included.
        finished_BG: True where a stop token ended the row, False where it was cut off.
        forced_BG: number of leading tokens that came from a dataset reset (no gradient).
        behavior_logprob_BGC: log pi_b(y_t | x, y_<t) in nats, of the distribution that the
            token was drawn from (temperature applied); zero after the end.
        plan: the layers that the nested policy kept.
        nested_BG: True where that policy drew the completion, False where the full model did
            (defensive mixture).
        policy_version: number of updates the sampled weights had seen.
    """

    prompt_BP: Int[Array, "B P"]
    prompt_length_B: Int[Array, " B"]
    tokens_BGC: Int[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    finished_BG: Bool[Array, "B G"]
    forced_BG: Int[Array, "B G"]
    behavior_logprob_BGC: Float[Array, "B G C"]
    plan: LayerPlan
    nested_BG: Bool[Array, "B G"]
    policy_version: Int[Array, ""]


@dataclass(frozen=True)
class Scored:
    """Rollouts with their rewards, which are on the host.

    Attributes:
        prompts: what was asked.
        rollouts: what was scored.
        texts: decoded completions, `texts[b][g]`; untrusted.
        reward_BG: total reward that the advantages are computed from.
        accuracy_BG: 1.0 where the answer is right, before any shaping.
        scored_BG: False where the reward could not be computed (never counted as wrong).
        parts: each reward component by name.
    """

    prompts: Prompts
    rollouts: Rollouts
    texts: tuple[tuple[str, ...], ...]
    reward_BG: Float[np.ndarray, "B G"]
    accuracy_BG: Float[np.ndarray, "B G"]
    scored_BG: Bool[np.ndarray, "B G"]
    parts: dict[str, Float[np.ndarray, "B G"]] = field(default_factory=dict)


@struct.dataclass
class TrainBatch:
    """What one update reads: rollouts as arrays, and an advantage for each completion.

    Attributes:
        prompt_BP, prompt_length_B, tokens_BGC, length_BG, forced_BG,
        behavior_logprob_BGC: as in `Rollouts`.
        advantage_BG: A(y), no gradient.
        old_logprob_BGC: log pi_{theta_old} of the full model at rollout time. `None` when one
            update follows one rollout: then theta_old = theta and the update's own pass gives it.
        reference_logprob_BGC: log pi_ref, or `None` without a KL penalty.
        nested_logprob_BGC: for a defensive mixture, log pi_{theta_old, plan} of every completion,
            also of those that the full model sampled; `behavior_logprob_BGC` stays that of the
            component which sampled. `None` otherwise.
        token_advantage_BGC: A_t of a value-based estimator, no gradient; replaces `advantage_BG`.
            `None` where the advantage is one for the whole completion.
        plan: the rollouts' nested policy, for self-distillation; `None` without. It has no axis B.
    """

    prompt_BP: Int[Array, "B P"]
    prompt_length_B: Int[Array, " B"]
    tokens_BGC: Int[Array, "B G C"]
    length_BG: Int[Array, "B G"]
    forced_BG: Int[Array, "B G"]
    behavior_logprob_BGC: Float[Array, "B G C"]
    advantage_BG: Float[Array, "B G"]
    old_logprob_BGC: Float[Array, "B G C"] | None = None
    reference_logprob_BGC: Float[Array, "B G C"] | None = None
    nested_logprob_BGC: Float[Array, "B G C"] | None = None
    token_advantage_BGC: Float[Array, "B G C"] | None = None
    plan: LayerPlan | None = None


@struct.dataclass
class Weighted:
    """A sum and the weight it is a sum over, so that parts add up before the one division.

    `mean` of added micro-batches and devices equals the mean of the whole batch, whatever the
    split; averaging means would not.
    """

    sum: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: Weighted) -> Weighted:
        return Weighted(self.sum + other.sum, self.weight + other.weight)

    def mean(self) -> Float[Array, ""]:
        """`sum / weight`, and zero when the weight is zero."""
        return jnp.where(self.weight == 0, 0.0, self.sum / jnp.where(self.weight == 0, 1.0, self.weight))


def valid_mask(length: Int[Array, "*rows"], size: int) -> Bool[Array, "*rows size"]:
    """True at positions before each row's length: `mask[..., t] = t < length[...]`."""
    return jnp.arange(size) < length[..., None]


def gradient_mask(length_BG: Int[Array, "B G"], forced_BG: Int[Array, "B G"], size: int) -> Bool[Array, "B G C"]:
    """True at the tokens that the policy chose: after the forced prefix, before the end."""
    position_C = jnp.arange(size)
    return (position_C >= forced_BG[..., None]) & (position_C < length_BG[..., None])
