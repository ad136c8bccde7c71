"""The policy-gradient loss of nested rollouts.

One mechanism serves all of it. The importance weight h_t is a number, not a function of the
parameters, multiplied by exp(log pi - stop_gradient(log pi)), which is 1 and has the gradient
grad log pi. So a token's term h_t A_t has the gradient h_t A_t grad log pi(y_t | x, y_<t): REINFORCE
with weights. Clips decide which tokens keep that gradient, and a mask which tokens have a term.

With pi_b the policy that sampled, pi_old the full model just before the batch's first update and pi the model now:

    clip_policies     term of a token                         h is made of
    two (bypass)      m min(h A, clip(h) A)                   pi / pi_b
    three (decoupled) m h min(r A, clip(r) A), r = pi/pi_old  pi_old / pi_b, frozen for all updates on the batch

The mask m is 0 or 1 (`estimators.rejection`). It judges pi / pi_b, or pi_old / pi_b with three policies. With `two` a
token that the sampler underrates may be clipped before the optimizer has moved at all; with `three` the clip bounds
what the optimizer did and nothing else (Hilton et al., 2022, arXiv 2110.00641; AReaL, arXiv 2505.24298). At
pi = pi_old three policies give the plain weight h, and at pi_b = pi_old PPO. TIS (Yao et al., 2025), IcePop, verl's
decoupled mode and TRL's correction of its sampler have this form.

For `base` and `practical` at `token` level this equals differentiating the PPO surrogate itself; at
`sequence` and `geometric` level likewise, with the surrogate of the completion counted once under
`fixed_length` and `sequence_mean` (GSPO). Elsewhere it keeps h a weight, as Nested-ReFT has it:
`retrace` would lose the gradient of every token with rho > 1 if it were differentiated, and a
truncated weight that of every truncated token (CISPO keeps it, TIS likewise).

A token's term is multiplied by c_t and the sum divided by a weight W, both from `normalization`:

    token_mean        c = 1            W = tokens of the batch; long completions count more (DAPO)
    group_token_mean  c = 1 / tokens of the group         W = groups (DAPO, eq. 8)
    sequence_mean     c = 1 / |y|      W = completions; long completions' tokens count less (GRPO)
    fixed_length      c = 1 / constant W = completions; every token counts the same in every batch,
                                       the one divisor that depends on no sample (Dr. GRPO)

|y| counts the tokens that the policy chose. Sum and W add up over micro-batches and devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nested_reft.estimators.advantages import group_advantages, weighted_advantages
from nested_reft.estimators.health import kish
from nested_reft.estimators.importance import LOG_RATIO_LIMIT, LOGPROB_FLOOR, token_log_ratio
from nested_reft.estimators.kl import kl_estimate
from nested_reft.losses.config import Normalization, PolicyGradientConfig
from nested_reft.losses.objective import LossOutput, Needs, TargetPass
from nested_reft.losses.token_weights import TokenWeights, baseline_weight, clipped_ratio, token_weights
from nested_reft.losses.value import value_loss, with_advantages
from nested_reft.types import Scored, TrainBatch, Weighted


class PolicyGradient:
    """The policy-gradient objective of one configuration; see the module for its formula."""

    def __init__(self, config: PolicyGradientConfig):
        """Args:
        config: the parts of the loss.
        """
        self._config = config

    def needs(self, updates_per_batch: int) -> Needs:
        """Log-probabilities of the other policies that the weights and penalties compare with."""
        config = self._config
        moves, variant = updates_per_batch > 1, config.bias_mitigation
        needed = {
            # With one update per rollout theta_old is theta, and the update's own pass gives it.
            # A critic's pass over the batch gives it too.
            "old_logprob_BGC": moves
            and config.critic is None
            and (variant in ("practical", "mixture") or config.clip_policies == "three"),
            # The mixture's density takes both components' probabilities of every completion.
            "nested_logprob_BGC": variant == "mixture",
            "reference_logprob_BGC": config.reference_kl_coefficient > 0 or self._penalises_tokens,
        }
        return Needs(
            logprobs=tuple(name for name, is_needed in needed.items() if is_needed),
            mixture_density=variant == "mixture",
            entropy_gradient=config.entropy_coefficient > 0,
            self_distillation=config.self_distillation_coefficient > 0,
            # Both compare with the full model at rollout time, which is at hand for the present version alone.
            fresh_rollouts=variant in ("practical", "mixture"),
            may_reject=config.may_reject,
            acceptance_draw=config.obrs_lambda is not None,
            mix_share=variant == "interpolated",
            values=config.critic is not None,
        )

    @property
    def _penalises_tokens(self) -> bool:
        """Whether token rewards have a KL penalty."""
        return self._config.critic is not None and self._config.critic.kl_coefficient > 0

    def signal(self, groups: Scored) -> Float[Array, "B G"]:
        """What `group_advantages` gives: the advantage of each completion relative to its group, or its reward.

        Args:
            groups: their total rewards count; completions without a score enter no baseline.
        """
        if self._config.advantage == "gae":
            return jnp.where(jnp.asarray(groups.scored_BG), jnp.asarray(groups.reward_BG, jnp.float32), 0.0)
        return group_advantages(jnp.asarray(groups.reward_BG), jnp.asarray(groups.scored_BG), self._config.advantage)

    def with_token_signals(self, batch: TrainBatch, kl_coefficient: float | Float[Array, ""]) -> TrainBatch:
        """The batch with advantages and returns of tokens; see `losses.value`.

        Args:
            batch: whole, with the critic's old values.
            kl_coefficient: beta of its token rewards.
        """
        assert self._config.critic is not None
        return with_advantages(batch, self._config.critic, kl_coefficient)

    def metrics(self, parts: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
        """The parts; the moments of the weights become effective sample sizes, of all tokens and of the kept ones.

        Args:
            parts: the mean of each part over the whole batch.
        """
        # An effective sample size is no mean, so it is made here, from moments that do add up over micro-batches.
        parts = dict(parts)
        parts["ess_weight"] = kish(parts["weight_mean"], parts.pop("weight_square_mean"))
        if "value_loss" in parts:
            spread = parts.pop("return_square_mean") - parts["return_mean"] ** 2
            error = parts.pop("value_error_square_mean") - parts.pop("value_error_mean") ** 2
            # Equal returns leave nothing to explain.
            parts["explained_variance"] = jnp.where(spread > 0, 1 - error / jnp.where(spread > 0, spread, 1.0), 0.0)
        if "accepted_tokens" in parts:
            # Rejected tokens have weight 0, so both are sums over those that are kept, divided by too many.
            share = jnp.where(parts["accepted_tokens"] == 0, 1.0, parts["accepted_tokens"])
            parts["kept_weight_mean"], parts["ess_kept"] = parts["weight_mean"] / share, parts["ess_weight"] / share
        return parts

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        """`policy_gradient_loss` of the configured parts.

        Args:
            target: log-probabilities, entropies and, where needed, the self-distillation KL.
            batch: the rest of what the loss reads.
        """
        return policy_gradient_loss(
            target.logprob_BGC,
            batch,
            self._config,
            target.entropy_BGC,
            target.self_distillation_kl_BGC,
            target.value_BGC,
        )


def policy_gradient_loss(
    target_logprob_BGC: Float[Array, "B G C"],
    batch: TrainBatch,
    config: PolicyGradientConfig,
    entropy_BGC: Float[Array, "B G C"] | None = None,
    self_distillation_kl_BGC: Float[Array, "B G C"] | None = None,
    value_BGC: Float[Array, "B G C"] | None = None,
) -> LossOutput:
    """Negative surrogate objective, to be minimised.

        L = - sum_t c_t [ term_t - beta KL_t + eta entropy_t - gamma KL(full || nested)_t ] / W

    See the module for the term, c and W, `losses.token_weights` for weights and clips, `estimators.kl` for the penalty
    (`k1_in_reward` changes A_t instead). A token's whole weight is m h, or m h r with three policies. With
    `self_normalized`, the surrogate's W is the sum of these weights where it was a count: its gradient is then the
    weighted mean of A grad log pi, exactly the same for any split into micro-batches; c times W's count stays as above.
    The penalties carry no weight, so they are divided by the count as ever and do not depend on the behavior policy.

    Args:
        target_logprob_BGC: log pi, differentiated.
        batch: the rest; forced and padding tokens do not count. `mixture` needs
            `nested_logprob_BGC`, a KL penalty `reference_logprob_BGC`.
        config: the parts.
        entropy_BGC: entropy of each next-token distribution, differentiable; for the entropy bonus.
        self_distillation_kl_BGC: `estimators.kl.self_distillation_kl` of each next-token distribution,
            differentiable; for `self_distillation_coefficient`, gamma.
        value_BGC: V of each token's state, differentiable; for a critic.

    Returns:
        The loss as (sum, W), to be divided once (with `self_normalized`, the penalties as a second pair), the
        whole weights, and the parts that are logged: `policy_loss`,
        `clipped_share` (tokens without gradient), `limited_share` (truncated weights of tokens that are kept),
        `weight_mean` and `weight_square_mean` of the whole weights over tokens (`kish` of them is the effective sample
        size of the update), `reference_kl` (k3, nats per token) and `self_distillation_kl`; with a mask
        `accepted_tokens` and `accepted_completions` (shares; a completion is accepted with any of its tokens).

    Raises:
        ValueError: the configuration needs something that is not given.
    """
    _check_inputs(batch, config, entropy_BGC, self_distillation_kl_BGC)
    # Every array is cleared outside the mask before it is summed: a masked NaN times 0 would still be NaN.
    mask_BGC = batch.mask_BGC
    target_logprob_BGC = jnp.where(mask_BGC, jnp.maximum(target_logprob_BGC, LOGPROB_FLOOR), 0.0)
    # The weight is computed from the frozen log-probability. Otherwise its own gradient would enter the loss.
    frozen_BGC = jax.lax.stop_gradient(target_logprob_BGC)
    weights = token_weights(frozen_BGC, mask_BGC, batch, config)
    advantage_BGC = _token_advantages(frozen_BGC, mask_BGC, weights.factor_BGC * weights.ratio_BGC, batch, config)
    limited_BGC, clipped_BGC = clipped_ratio(
        weights.ratio_BGC, advantage_BGC, config.clip_low, config.clip_high, config.dual_clip
    )
    # The exponential is exactly 1 and has the gradient grad log pi; see the module. A clipped token keeps its value in
    # the loss and not its gradient.
    one_BGC = jnp.where(clipped_BGC, 1.0, jnp.exp(target_logprob_BGC - frozen_BGC))
    objective_BGC = weights.factor_BGC * limited_BGC * one_BGC * advantage_BGC
    whole_weight_BGC = weights.factor_BGC * weights.ratio_BGC

    coefficient_BGC, share_BGC = normalization_shares(mask_BGC, config.normalization, config.fixed_length_tokens)
    # The loss is not divided here, because other micro-batches still add to both sums.
    total_weight = (share_BGC * whole_weight_BGC).sum() if config.self_normalized else share_BGC.sum()
    policy_loss = Weighted(-(coefficient_BGC * objective_BGC).sum(), total_weight)

    parts = {"policy_loss": policy_loss} | _weight_parts(weights, clipped_BGC, mask_BGC, config)
    penalty_BGC, penalty_parts = _penalties(
        target_logprob_BGC, batch, config, entropy_BGC, self_distillation_kl_BGC, value_BGC
    )
    parts |= penalty_parts
    # The penalties are added to the surrogate without the importance weight, as GRPO adds them.
    penalty = Weighted((coefficient_BGC * penalty_BGC).sum(), share_BGC.sum())
    if config.self_normalized and _has_penalty(config):
        # The sum of weights is a matter of the surrogate. It would blow the penalty up wherever it is small.
        return LossOutput(policy_loss, parts, whole_weight_BGC * mask_BGC, penalty)
    # With one divisor for both, one backward pass serves both.
    return LossOutput(Weighted(policy_loss.sum + penalty.sum, total_weight), parts, whole_weight_BGC * mask_BGC)


def _token_mean(value_BGC: Array, mask_BGC: Array) -> Weighted:
    """A mean for the log, over the tokens that count."""
    return Weighted(jnp.where(mask_BGC, jax.lax.stop_gradient(value_BGC), 0.0).sum(), mask_BGC.sum(dtype=jnp.float32))


def _weight_parts(
    weights: TokenWeights, clipped_BGC: Array, mask_BGC: Array, config: PolicyGradientConfig
) -> dict[str, Weighted]:
    """What is logged of weights, clips and masks."""
    whole_weight_BGC = weights.factor_BGC * weights.ratio_BGC
    measured = {
        "clipped_share": clipped_BGC & weights.accepted_BGC,
        "limited_share": weights.truncated_BGC,
        "weight_mean": whole_weight_BGC,
        "weight_square_mean": whole_weight_BGC**2,
    }
    if config.may_reject:
        measured["accepted_tokens"] = weights.accepted_BGC
    parts = {name: _token_mean(value_BGC, mask_BGC) for name, value_BGC in measured.items()}
    if config.may_reject:
        has_tokens_BG, is_kept_BG = mask_BGC.any(axis=-1), weights.accepted_BGC.any(axis=-1)
        parts["accepted_completions"] = Weighted(*(x.sum(dtype=jnp.float32) for x in (is_kept_BG, has_tokens_BG)))
    return parts


def normalization_shares(
    mask_BGC: Bool[Array, "B G C"], normalization: Normalization, fixed_length_tokens: int | None = None
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """Each token's factor c in the loss's sum, and what it adds to the weight W; see the module.

    Zero at masked tokens. A completion without any token of its own counts nowhere.

    Args:
        mask_BGC: the tokens that count.
        normalization: a row of the module's table.
        fixed_length_tokens: the constant of `fixed_length`, 1 or more; the others do not read it.

    Returns:
        `(c, share)`: the sum of the shares is W.
    """
    mask = mask_BGC.astype(jnp.float32)
    if normalization == "token_mean":
        return mask, mask
    if normalization == "group_token_mean":
        # Each group adds 1 to W, however many tokens it has. An empty group divides 0 by 1.
        share_BGC = mask / jnp.maximum(mask.sum(axis=(1, 2), keepdims=True), 1)
        return share_BGC, share_BGC
    share_BGC = mask / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
    if normalization == "sequence_mean":
        return share_BGC, share_BGC
    assert fixed_length_tokens is not None
    # The sum is over tokens of equal factor, while W still counts completions.
    return mask / fixed_length_tokens, share_BGC


def _token_advantages(
    frozen_BGC: Array, mask_BGC: Array, weight_BGC: Array, batch: TrainBatch, config: PolicyGradientConfig
) -> Array:
    """A_t of every token; with `k1_in_reward` less beta times the KL reward that is still to come."""
    if batch.token_signal_BGC is not None:
        advantage_BGC = batch.token_signal_BGC
    elif config.advantage == "weighted_leave_one_out":
        # Here the signal is the reward, because the baseline needs the weights.
        advantage_BGC = weighted_advantages(batch.signal_BG, baseline_weight(weight_BGC, mask_BGC, config))
    else:
        advantage_BGC = jnp.broadcast_to(batch.signal_BG[..., None], frozen_BGC.shape)
    if config.reference_kl == "k1_in_reward" and batch.reference_logprob_BGC is not None:
        k1_BGC = jnp.where(mask_BGC, kl_estimate(frozen_BGC, batch.reference_logprob_BGC, "k1"), 0.0)
        # A token is charged for the divergence of itself and of all later tokens, as for any reward still to come.
        to_come_BGC = jnp.flip(jnp.cumsum(jnp.flip(k1_BGC, axis=-1), axis=-1), axis=-1)
        advantage_BGC = advantage_BGC - config.reference_kl_coefficient * to_come_BGC
    return jnp.where(mask_BGC, advantage_BGC, 0.0)


def _penalties(
    target_logprob_BGC: Array,
    batch: TrainBatch,
    config: PolicyGradientConfig,
    entropy_BGC: Array | None,
    self_distillation_kl_BGC: Array | None,
    value_BGC: Array | None,
) -> tuple[Array, dict[str, Weighted]]:
    """All that is added to the surrogate for each token that counts, and what is logged of it."""
    mask_BGC, reference_BGC = batch.mask_BGC, batch.reference_logprob_BGC
    penalty_BGC, parts = jnp.zeros_like(target_logprob_BGC), {}
    if reference_BGC is not None:
        # Whatever the penalty is, the log has k3: it is unbiased and has little noise.
        parts["reference_kl"] = _token_mean(kl_estimate(target_logprob_BGC, reference_BGC, "k3"), mask_BGC)
        # `k1` as a loss has a gradient of mean zero, so it acts on the advantage alone.
        if config.reference_kl in ("k2_loss", "k3_loss"):
            estimator = "k2" if config.reference_kl == "k2_loss" else "k3"
            kl_BGC = kl_estimate(target_logprob_BGC, reference_BGC, estimator)
            penalty_BGC += config.reference_kl_coefficient * kl_BGC
    if config.entropy_coefficient and entropy_BGC is not None:
        penalty_BGC -= config.entropy_coefficient * entropy_BGC
    if config.self_distillation_coefficient and self_distillation_kl_BGC is not None:
        parts["self_distillation_kl"] = _token_mean(self_distillation_kl_BGC, mask_BGC)
        penalty_BGC += config.self_distillation_coefficient * self_distillation_kl_BGC
    if config.critic is not None:
        assert value_BGC is not None and batch.old_value_BGC is not None and batch.return_BGC is not None
        limit = config.critic.value_clip
        value_loss_BGC, stopped_BGC = value_loss(value_BGC, batch.old_value_BGC, batch.return_BGC, limit)
        penalty_BGC += config.critic.value_coefficient * value_loss_BGC
        parts |= _critic_parts(value_loss_BGC, stopped_BGC, value_BGC, batch)
    return jnp.where(mask_BGC, penalty_BGC, 0.0), parts


def _has_penalty(config: PolicyGradientConfig) -> bool:
    """Whether anything is added to the surrogate."""
    coefficients = config.entropy_coefficient, config.self_distillation_coefficient
    return config.reference_kl in ("k2_loss", "k3_loss") or any(coefficients) or config.critic is not None


def _critic_parts(loss_BGC: Array, clipped_BGC: Array, value_BGC: Array, batch: TrainBatch) -> dict[str, Weighted]:
    """What is logged of a critic. Moments of returns and errors become the explained variance."""
    assert batch.return_BGC is not None
    error_BGC = batch.return_BGC - value_BGC
    measured = {
        "value_loss": loss_BGC,
        "value_clipped_share": clipped_BGC,
        "value_mean": value_BGC,
        "return_mean": batch.return_BGC,
        "return_square_mean": batch.return_BGC**2,
        "value_error_mean": error_BGC,
        "value_error_square_mean": error_BGC**2,
    }
    parts = {name: _token_mean(measured_BGC, batch.mask_BGC) for name, measured_BGC in measured.items()}
    if batch.reference_logprob_BGC is not None:
        kl_BGC = jnp.where(batch.mask_BGC, _sampled_kl(batch, batch.reference_logprob_BGC), 0.0)
        parts["completion_kl"] = Weighted(kl_BGC.sum(), batch.mask_BGC.any(axis=-1).sum(dtype=jnp.float32))
    return parts


def _sampled_kl(batch: TrainBatch, reference_logprob_BGC: Array) -> Array:
    """KL(pi_old || pi_ref) at each token's state, from the token that the behavior policy drew there: rho_t k3_t.

    Without rho = pi_old / pi_b it would say how the sampler's tokens fare, and could be negative.
    """
    assert batch.old_logprob_BGC is not None and batch.behavior_logprob_BGC is not None
    log_ratio_BGC = token_log_ratio(batch.old_logprob_BGC, batch.behavior_logprob_BGC)
    ratio_BGC = jnp.exp(jnp.minimum(log_ratio_BGC, LOG_RATIO_LIMIT))
    return ratio_BGC * kl_estimate(batch.old_logprob_BGC, reference_logprob_BGC, "k3")


def _check_inputs(
    batch: TrainBatch, config: PolicyGradientConfig, entropy_BGC: Array | None, self_distillation_kl_BGC: Array | None
) -> None:
    if config.bias_mitigation == "mixture":
        if batch.nested_logprob_BGC is None:
            raise ValueError(
                "bias_mitigation 'mixture' needs batch.nested_logprob_BGC: score every completion under the plan"
            )
        if batch.full_share_BG is None:
            raise ValueError("bias_mitigation 'mixture' needs batch.full_share_BG: the full model's probability")
    reads_behavior = config.bias_mitigation in ("base", "retrace", "interpolated") or config.reject_by
    if batch.behavior_logprob_BGC is None and reads_behavior:
        name = "reject_by" if config.reject_by else "bias_mitigation"
        raise ValueError(f"{name} '{getattr(config, name)}' needs batch.behavior_logprob_BGC")
    if config.bias_mitigation == "interpolated" and batch.mix_share_B is None:
        raise ValueError("bias_mitigation 'interpolated' needs batch.mix_share_B: the share of the weight")
    if config.obrs_lambda is not None and batch.acceptance_draw_BGC is None:
        raise ValueError("obrs_lambda is set: pass batch.acceptance_draw_BGC, uniform draws in [0, 1)")
    if config.reference_kl is not None and batch.reference_logprob_BGC is None:
        raise ValueError(f"reference_kl '{config.reference_kl}' needs batch.reference_logprob_BGC")
    if config.entropy_coefficient and entropy_BGC is None:
        raise ValueError("entropy_coefficient is set: pass the differentiable entropy_BGC")
    if config.self_distillation_coefficient and self_distillation_kl_BGC is None:
        raise ValueError("self_distillation_coefficient is set: pass the differentiable self_distillation_kl_BGC")
