"""What an update minimises: the contract between the learner and every loss.

An objective says which passes and log-probabilities it reads (`needs`), and what is summed over tokens (`loss`). One
that learns from rollouts also says what a completion's reward means to it (`signal`). It does not decide how
completions are sampled, which of them count, or what the curriculum learns from. One `make_update` serves all
objectives, so micro-batches, rematerialisation, shared prompts and adapters come with each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flax import struct
from jaxtyping import Array, Float

from nested_reft.types import Scored, TrainBatch, Weighted


@dataclass(frozen=True)
class Needs:
    """What an objective reads beside the target's own log-probabilities.

    Attributes:
        logprobs: fields of `TrainBatch` that the learner has to score before the first update.
        mixture_density: also the probability of the full model in each group, `full_share_BG`.
        entropy_gradient: gradients through the entropy, which cost a second array over the vocabulary.
        self_distillation: a nested pass, and the divergence of its distributions from the full ones.
        off_policy: whether completions were sampled by a behavior policy. Demonstrations were not, so
            there is nothing to say about how far off-policy they are.
        signal_is_weight: whether the signal is a completion's weight, so that a batch whose signals are all
            zero has nothing to learn from. An advantage of zero, in contrast, says that all is well.
        fresh_rollouts: whether all groups must come from the present version of the policy, because the
            objective takes that version for the one at rollout time, theta_old.
        may_reject: whether the loss may give all tokens the weight 0. Such an update is left out.
        acceptance_draw: random numbers by which samples are accepted, `acceptance_draw_BGC`.
        mix_share: the share of the importance weight, `mix_share_B`.
        values: a value of each token's state, of the model's own head. For `TokenSignals` the learner scores it before
            the first update as well, `old_value_BGC`, together with log pi_old.
        beta: gives `beta_B` from the number of batches that were learnt from before; None where there is none.
        reference_reset_every: after how many of them the policy becomes the reference; None for never.
    """

    logprobs: tuple[str, ...] = ()
    mixture_density: bool = False
    entropy_gradient: bool = False
    self_distillation: bool = False
    off_policy: bool = True
    signal_is_weight: bool = False
    fresh_rollouts: bool = False
    may_reject: bool = False
    acceptance_draw: bool = False
    mix_share: bool = False
    values: bool = False
    beta: Callable[[int], float] | None = None
    reference_reset_every: int | None = None


@struct.dataclass
class TargetPass:
    """What the forward pass of an update found at every completion token, differentiable.

    Attributes:
        logprob_BGC: log pi, in nats, at the temperature of the rollout.
        entropy_BGC: entropy of the distribution that the token came from; gradients pass only where
            the objective needs them.
        self_distillation_kl_BGC: KL(full || nested) of the distribution, or None where not needed.
        value_BGC: V of the state before the token, or None where not needed.
    """

    logprob_BGC: Float[Array, "B G C"]
    entropy_BGC: Float[Array, "B G C"]
    self_distillation_kl_BGC: Float[Array, "B G C"] | None = None
    value_BGC: Float[Array, "B G C"] | None = None


@struct.dataclass
class LossOutput:
    """A loss as sums, so that micro-batches, devices and processes add up before the one division.

    Attributes:
        total: the loss's sum and its divisor.
        parts: what is logged, by name; each is divided by a weight of its own.
        weight_BGC: the weight that each token's gradient had, zero at tokens that do not count.
        penalty: a second sum of the loss, where its divisor is another one. It costs one backward pass and one gradient
            more.
    """

    total: Weighted
    # Each part has a weight of its own, because a metric's mean is over tokens whatever the loss is divided by.
    parts: dict[str, Weighted]
    weight_BGC: Float[Array, "B G C"]
    penalty: Weighted | None = None

    @property
    def sums(self) -> tuple[Weighted, ...]:
        """What is differentiated and divided, each by itself."""
        return (self.total,) if self.penalty is None else (self.total, self.penalty)

    def mean(self) -> Float[Array, ""]:
        """The loss: each sum divided by its weight."""
        return self.total.mean() if self.penalty is None else self.total.mean() + self.penalty.mean()


@runtime_checkable
class TokenSignals(Protocol):
    """What an objective with a critic does beside the rest."""

    def with_token_signals(self, batch: TrainBatch, kl_coefficient: float | Float[Array, ""]) -> TrainBatch:
        """The whole batch with what each token's loss reads, before the first update on it.

        Args:
            batch: with old values and the log-probabilities that `needs` named.
            kl_coefficient: weight of the KL penalty on token rewards.
        """
        ...


@runtime_checkable
class Objective(Protocol):
    """What an update minimises."""

    def needs(self, updates_per_batch: int) -> Needs:
        """What the update must provide.

        Args:
            updates_per_batch: 1 or more. From the second on, the target has moved away from theta_old.
        """
        ...

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """What is logged: the parts' means, and what is made of several of them.

        Args:
            parts: the mean of each part over the whole batch.
        """
        ...

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """The loss of a batch or of a part of one; pure, and compiled into the update.

        Args:
            target: what the forward pass found; gradients pass through it.
            batch: completions, their signals, and the log-probabilities that `needs` named.

        Returns:
            Sums and their weights, not yet divided, so that parts of a batch add up.
        """
        ...


@runtime_checkable
class RolloutObjective(Objective, Protocol):
    """An objective that learns from scored rollouts; the others learn from completions that somebody wrote."""

    def signal(self, groups: Scored) -> Float[Array, "B G"]:
        """What the loss learns from each completion.

        Args:
            groups: B groups with their rewards, on the host, perhaps of several policies.

        Returns:
            One number per completion. Where there is no reward it is zero, or NaN if the loss still has to know.
            No gradient passes through it.
        """
        ...
