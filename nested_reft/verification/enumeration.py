"""Estimators checked by enumeration: exact bias and variance on a model whose completions can all be listed.

A transformer with three tokens and completions of at most three has fifteen completions per prompt,
so the expectation over groups of three is a sum over 15^3 = 3375 of them, or 680 up to order. Each of these groups goes
through the production functions: `group_advantages`, the importance weights, `policy_gradient_loss`
and `completion_logprobs`, under real layer plans. The result is compared with the gradient of

    J(theta) = mean over prompts x of  sum_y pi_theta(y | x) R(x, y)   [- beta KL(pi_theta || pi_ref)]

obtained by differentiating that sum itself. The chain rule is used once to make it fast: the loss
sees the parameters only through the log-probabilities of the completions, so its gradient with respect
to those, times their Jacobian, is its gradient. The loss and the model compute in float32, the sums
over groups in float64: exact estimators show a relative bias of about 1e-6.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nested_reft.estimators.advantages import Advantage, group_advantages
from nested_reft.estimators.health import kish
from nested_reft.estimators.importance import BiasMitigation, Level
from nested_reft.losses import presets
from nested_reft.losses.config import Normalization, PolicyGradientConfig, claims_unbiased
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.types import TrainBatch
from nested_reft.verification.enumerable_model import (
    EnumeratedPolicies,
    Scenario,
    TinyModel,
    enumerate_policies,
)

GROUP_SIZE = 3
ALPHA = 1 / GROUP_SIZE  # so that the mixture with fixed counts draws one full completion per group
BETA = 0.1
EXACT = 1e-5  # relative bias that float32 explains
# Each optional part of a loss, with a value at which it acts.
OPTIONAL_PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"retrace_lambda": 0.9},
    {"truncate_at": 2.0},
    {"reject_by": "token_ratio", "reject_below": 0.5},
    {"reject_by": "sequence_ratio", "reject_above": 2.0},
    {"reject_by": "geometric_mean", "reject_above": 1.2},
    {"reject_by": "sequence_k3", "reject_above": 0.1},
    {"self_normalized": True},
    {"clip_policies": "three"},
    {"clip_policies": "three", "clip_level": "sequence"},
    {"clip_policies": "three", "clip_level": "sequence", "clip_high": 0.2},
    {"clip_low": 0.2},
    {"clip_high": 0.2},
    {"dual_clip": 3.0},
    {"reference_kl": "k1_in_reward", "reference_kl_coefficient": BETA},
    {"reference_kl": "k2_loss", "reference_kl_coefficient": BETA},
    {"reference_kl": "k3_loss", "reference_kl_coefficient": BETA},
    {"entropy_coefficient": BETA},
    {"self_distillation_coefficient": BETA},
)
Sampling = Literal["nested", "full", "mixture", "mixture with fixed counts"]


@dataclass(frozen=True)
class Estimator:
    """A loss, and how the completions of its groups are drawn.

    Attributes:
        name: as the table shows it.
        loss: the production configuration.
        sampling: `nested` draws all from the nested model and `full` all from the full one at rollout
            time; `mixture` draws each from the full model with probability 1/3, independently;
            `mixture with fixed counts` draws one of three from it, always.
    """

    name: str
    loss: PolicyGradientConfig
    sampling: Sampling = "nested"

    @property
    def claimed_scale(self) -> float | None:
        """The length that the expected gradient claims to have, as a share of the true one; None without a claim.

        `claims_unbiased` makes the claim, of the sampling that the loss is made for.
        """
        if not claims_unbiased(self.loss) or self.sampling != fitting_sampling(self.loss):
            return None
        return (GROUP_SIZE - 1) / GROUP_SIZE if self.loss.advantage == "group_mean" else 1.0


SCENARIOS = (
    Scenario("theta = theta_old, one plan", 0.0, ((1,),)),
    Scenario("theta = theta_old, plan drawn per batch", 0.0, ((0,), (1,), (2,), (3,))),
    Scenario("theta moved, plan drawn per batch", 0.05, ((0,), (1,), (2,), (3,))),
)


@dataclass(frozen=True)
class EstimatorReport:
    """Exact properties of one estimator in one scenario.

    With g the true gradient and g_hat the estimate from one group:

    Attributes:
        scenario, estimator: names.
        claimed_scale: what `scale` should be, with a direction bias of zero; None where nothing is claimed.
        relative_bias: |E g_hat - g| / |g|.
        direction_bias: the same after the best scaling of E g_hat: the sine of the angle between the
            two. A pure scale error leaves it at zero.
        scale: <E g_hat, g> / |g|^2: 1 when right, (G-1)/G for the group mean.
        variance: trace of the covariance of g_hat over groups, divided by |g|^2.
        ess: effective sample size of the weights that entered the loss, per token, in (0, 1].
    """

    scenario: str
    estimator: str
    claimed_scale: float | None
    relative_bias: float
    direction_bias: float
    scale: float
    variance: float
    ess: float

    @property
    def keeps_claim(self) -> bool:
        """False only where an estimator claims to be unbiased, perhaps up to a scale, and is not."""
        if self.claimed_scale is None:
            return True
        return self.direction_bias < EXACT and abs(self.scale - self.claimed_scale) < EXACT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def verify_estimators(
    estimators: Sequence[Estimator] | None = None, scenarios: Sequence[Scenario] = SCENARIOS, seed: int = 0
) -> list[EstimatorReport]:
    """Enumerates every estimator in every scenario.

    Args:
        estimators: all named ones when None.
        scenarios: where the policies stand.
        seed: of the model's parameters.

    Returns:
        One report for each pair, scenario by scenario.
    """
    estimators = named_estimators() if estimators is None else estimators
    model = TinyModel(seed)
    # The policies do not depend on the estimator, so each scenario is computed once.
    policies = [enumerate_policies(model, scenario) for scenario in scenarios]
    return [
        report(scenario.name, estimator, enumerated)
        for scenario, enumerated in zip(scenarios, policies, strict=True)
        for estimator in estimators
    ]


def named_estimators() -> list[Estimator]:
    """Every variant, level, limit, advantage, normalisation, sampling, penalty and preset, and every claim, named."""
    # This one is unbiased; each of the others changes something about it.
    exact = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", fixed_length_tokens=1)
    mixture = dataclasses.replace(exact, bias_mitigation="mixture")

    def vary(name: str, loss: PolicyGradientConfig = exact, sampling: Sampling = "nested", **changes: Any) -> Estimator:
        return Estimator(name, dataclasses.replace(loss, **changes), sampling)

    chosen = [
        vary("base, sequence, leave-one-out"),
        vary("base, sequence, no baseline", advantage="no_baseline"),
        vary("base, sequence, group mean", advantage="group_mean"),
        vary("base, sequence, group std", advantage="group_std"),
        vary("base, prefix", level="prefix"),
        vary("base, token", level="token"),
        vary("base, geometric", level="geometric"),
        vary("one", bias_mitigation="one", level="token"),
        vary("one, full rollouts", sampling="full", bias_mitigation="one", level="token"),
        vary("practical, sequence", bias_mitigation="practical"),
        vary("practical, token", bias_mitigation="practical", level="token"),
        vary("retrace 1, token", bias_mitigation="retrace", level="token"),
        vary("retrace 0.9, token", bias_mitigation="retrace", level="token", retrace_lambda=0.9),
        vary("retrace 0.9, prefix", bias_mitigation="retrace", level="prefix", retrace_lambda=0.9),
        vary("mixture, leave-one-out", mixture, "mixture"),
        vary("mixture, no baseline", mixture, "mixture", advantage="no_baseline"),
        vary("mixture, fixed counts, leave-one-out", mixture, "mixture with fixed counts"),
        vary("mixture, fixed counts, no baseline", mixture, "mixture with fixed counts", advantage="no_baseline"),
        vary("base, sequence, truncated at 2", truncate_at=2.0),
        vary("base, sequence, clipped 0.2, three policies", clip_policies="three", clip_low=0.2, clip_high=0.2),
        vary("base, sequence, self-normalised", self_normalized=True),
        vary("base, sequence, clipped 0.2", clip_low=0.2, clip_high=0.2),
        vary("base, sequence, token mean", normalization="token_mean", fixed_length_tokens=None),
        vary("base, sequence, sequence mean", normalization="sequence_mean", fixed_length_tokens=None),
        vary("base, sequence, k1 in reward", reference_kl="k1_in_reward", reference_kl_coefficient=BETA),
        vary("base, sequence, k2 as loss", reference_kl="k2_loss", reference_kl_coefficient=BETA),
        vary("base, sequence, k3 as loss", reference_kl="k3_loss", reference_kl_coefficient=BETA),
        Estimator("GRPO", presets.grpo("base", reference_kl_coefficient=0.0)),
        Estimator("Dr. GRPO", presets.dr_grpo("base", fixed_length_tokens=1)),
        Estimator("DAPO", presets.dapo("base")),
        Estimator("GSPO", presets.gspo("base")),
        Estimator("CISPO, 1 + epsilon 2", presets.cispo("base", truncate_at=2.0)),
        *(Estimator(name, correction(exact)) for name, correction in presets.CORRECTIONS.items()),
    ]
    listed = [(estimator.loss, estimator.sampling) for estimator in chosen]
    return chosen + [claim for claim in claims() if (claim.loss, claim.sampling) not in listed]


def claims() -> list[Estimator]:
    """Every estimator that claims to be unbiased, as `claims_unbiased` itself says it of all combinations."""
    found = [loss for loss in all_combinations() if claims_unbiased(loss)]
    return [Estimator(_name(loss), loss, fitting_sampling(loss)) for loss in found]


def fitting_sampling(loss: PolicyGradientConfig) -> Sampling:
    """How the completions are drawn that a loss is made for.

    Args:
        loss: whose weight decides.
    """
    return "mixture" if loss.bias_mitigation == "mixture" else "nested"


def all_combinations() -> list[PolicyGradientConfig]:
    """Every loss that the configuration accepts with at most one of its optional parts.

    One part is enough: a claim that forgets a part shows as soon as that part is there.
    """
    required = itertools.product(
        get_args(Advantage), get_args(BiasMitigation), get_args(Level), get_args(Normalization)
    )
    found = []
    for names, part in itertools.product(required, OPTIONAL_PARTS):
        length = 1 if names[-1] == "fixed_length" else None
        try:
            found.append(PolicyGradientConfig(*names, fixed_length_tokens=length, **part))
        except ValueError:  # a combination without a meaning
            continue
    return found


def _name(loss: PolicyGradientConfig) -> str:
    """An estimator's name: its required parts, and the optional ones that are not at their defaults."""
    optional = [f for f in dataclasses.fields(loss) if f.default is not dataclasses.MISSING]
    changed = {f.name: getattr(loss, f.name) for f in optional if getattr(loss, f.name) != f.default}
    # A length and a coefficient are numbers of a part that has its own name here.
    parts = [
        str(value) if name == "reference_kl" else f"{name} {value}"
        for name, value in changed.items()
        if not name.endswith(("_tokens", "kl_coefficient"))
    ]
    # Most of the list divides by a fixed length, which is therefore not said.
    divisor = [loss.normalization] * (loss.normalization != "fixed_length")
    return ", ".join([loss.bias_mitigation, loss.level, loss.advantage, *divisor, *parts]).replace("_", " ")


def report(scenario: str, estimator: Estimator, policies: EnumeratedPolicies) -> EstimatorReport:
    """Sums the loss's gradient over all groups, prompts and plans of a scenario.

    Args:
        scenario: its name, for the report.
        estimator: what is enumerated.
        policies: what `enumerate_policies` returned for that scenario.
    """
    num_plans = policies.nested_logprob_ZXYC.shape[0]
    num_prompts, num_completions = policies.completions.reward_XY.shape
    # Groups are listed once, for all prompts and plans.
    index_NG, orders_N = all_groups(num_completions, estimator.sampling)
    # It tells which rows of the Jacobian belong to which place of a group.
    one_hot_NGY = np.eye(num_completions)[index_NG]
    mean_M, square, weight_sums = np.zeros(policies.jacobian_XRM.shape[-1]), 0.0, np.zeros(3)
    for nested_logprob_XYC in policies.nested_logprob_ZXYC:
        coefficient_XNGC, weights_XN3 = group_gradients(estimator, policies, nested_logprob_XYC, index_NG)
        probability_XYS = slot_probabilities(estimator.sampling, policies.old_logprob_XYC, nested_logprob_XYC)
        for x in range(num_prompts):
            # Places are drawn independently, so their probabilities multiply.
            probability_N = np.prod([probability_XYS[x, index_NG[:, s], s] for s in range(GROUP_SIZE)], axis=0)
            # Prompts and plans are drawn uniformly, and one listed group stands for all its orders.
            probability_N = probability_N * orders_N / (num_prompts * num_plans)
            # One row per group, one column per token of each completion: what the Jacobian's rows are multiplied by.
            coefficient_NR = np.einsum("ngy,ngc->nyc", one_hot_NGY, coefficient_XNGC[x]).reshape(len(index_NG), -1)
            mean_M += (probability_N @ coefficient_NR) @ policies.jacobian_XRM[x]
            # |c J|^2 = c (J J^T) c^T: with the Gram matrix no gradient of a single group is ever written out.
            square += float(probability_N @ ((coefficient_NR @ policies.gram_XRR[x]) * coefficient_NR).sum(axis=1))
            weight_sums += probability_N @ weights_XN3[x]
    truth_M = policies.reward_gradient_M
    if estimator.loss.reference_kl is not None:
        # A penalty changes the objective, so the truth changes with it.
        truth_M = truth_M - estimator.loss.reference_kl_coefficient * policies.kl_gradient_M
    length = float(np.linalg.norm(truth_M))
    # The projection on the truth tells an error of scale from one of direction.
    along = float(mean_M @ truth_M)
    tokens, weight, weight_square = weight_sums
    return EstimatorReport(
        scenario=scenario,
        estimator=estimator.name,
        claimed_scale=estimator.claimed_scale,
        relative_bias=float(np.linalg.norm(mean_M - truth_M)) / length,
        direction_bias=float(np.linalg.norm(truth_M - mean_M * along / float(mean_M @ mean_M))) / length,
        scale=along / length**2,
        # The trace of the covariance is E|g_hat|^2 - |E g_hat|^2.
        variance=(square - float(mean_M @ mean_M)) / length**2,
        ess=float(kish(jnp.asarray(weight / tokens), jnp.asarray(weight_square / tokens))),
    )


def all_groups(num_completions: int, sampling: Sampling) -> tuple[Int[np.ndarray, "N G"], Int[np.ndarray, " N"]]:
    """Every group as completion indices, and in how many orders it can be drawn.

    Where all places of a group are drawn alike, one order stands for all; otherwise each is listed.

    Args:
        num_completions: Y.
        sampling: decides whether the places of a group are alike.
    """
    if sampling == "mixture with fixed counts":
        index_NG = np.array(list(itertools.product(range(num_completions), repeat=GROUP_SIZE)))
        return index_NG, np.ones(len(index_NG), np.int64)
    # The loss does not depend on the order within a group, which leaves 680 of 3375 groups.
    groups = list(itertools.combinations_with_replacement(range(num_completions), GROUP_SIZE))
    orders = [
        # Multinomial coefficient: equal completions make fewer different orders.
        math.factorial(GROUP_SIZE) // math.prod(math.factorial(count) for count in Counter(group).values())
        for group in groups
    ]
    return np.array(groups), np.array(orders)


def slot_probabilities(
    sampling: Sampling, old_logprob_XYC: Float[Array, "X Y C"], nested_logprob_XYC: Float[Array, "X Y C"]
) -> Float[np.ndarray, "X Y S"]:
    """Probability of each completion at each place S of a group, at rollout time.

    Args:
        sampling: which policy draws at which place.
        old_logprob_XYC: log-probabilities under the full model at rollout time, zero after the end.
        nested_logprob_XYC: the same under the nested model.

    Returns:
        Probabilities that sum to 1 over Y.
    """
    full_XY = np.exp(np.asarray(old_logprob_XYC, np.float64).sum(axis=-1))
    nested_XY = np.exp(np.asarray(nested_logprob_XYC, np.float64).sum(axis=-1))
    # With independent draws every place has the density of the whole mixture.
    mixture_XY = ALPHA * full_XY + (1 - ALPHA) * nested_XY
    slots = {
        "nested": [nested_XY] * GROUP_SIZE,
        "full": [full_XY] * GROUP_SIZE,
        "mixture": [mixture_XY] * GROUP_SIZE,
        "mixture with fixed counts": [full_XY] + [nested_XY] * (GROUP_SIZE - 1),
    }
    return np.stack(slots[sampling], axis=-1)


def group_gradients(
    estimator: Estimator,
    policies: EnumeratedPolicies,
    nested_logprob_XYC: Float[Array, "X Y C"],
    index_NG: Int[np.ndarray, "N G"],
) -> tuple[Float[np.ndarray, "X N G C"], Float[np.ndarray, "X N 3"]]:
    """Each group's estimate of grad J, with respect to its log-probabilities, from the production loss.

    Args:
        estimator: gives the loss.
        policies: what `enumerate_policies` returned.
        nested_logprob_XYC: log-probabilities under the plan that was drawn.
        index_NG: the groups that `all_groups` listed.

    Returns:
        The estimates, and the sums over each group's tokens of 1, h and h^2.
    """
    # The loss is told the policy that drew; for a mixture it reads both components instead.
    behavior_XYC = policies.old_logprob_XYC if estimator.sampling == "full" else nested_logprob_XYC
    logprobs = (
        policies.target_logprob_XYC,
        policies.old_logprob_XYC,
        policies.reference_logprob_XYC,
        nested_logprob_XYC,
        behavior_XYC,
    )
    gradients, weights = _group_gradients(
        estimator.loss,
        policies.completions.length_Y[index_NG],
        policies.completions.reward_XY[:, index_NG],
        *(np.asarray(logprob_XYC)[:, index_NG] for logprob_XYC in logprobs),
    )
    return np.asarray(gradients, np.float64), np.asarray(weights, np.float64)


@partial(jax.jit, static_argnums=0)
def _group_gradients(loss, length_NG, reward_XNG, target_XNGC, old_XNGC, reference_XNGC, nested_XNGC, behavior_XNGC):
    def of_prompt(reward_NG, target_NGC, old_NGC, reference_NGC, nested_NGC, behavior_NGC):
        """Of all groups of one prompt."""
        advantage_NG = group_advantages(reward_NG, jnp.ones(reward_NG.shape, bool), loss.advantage)
        num_groups = reward_NG.shape[0]
        batch = TrainBatch(
            # The loss reads log-probabilities and lengths; prompts and tokens only have to have the right shapes.
            prompt_BP=jnp.zeros((num_groups, 1), jnp.int32),
            prompt_length_B=jnp.ones(num_groups, jnp.int32),
            tokens_BGC=jnp.zeros(target_NGC.shape, jnp.int32),
            length_BG=length_NG,
            forced_BG=jnp.zeros_like(length_NG),
            counted_BG=jnp.ones(length_NG.shape, bool),
            behavior_logprob_BGC=behavior_NGC,
            full_share_B=jnp.full(num_groups, ALPHA),
            signal_BG=advantage_NG,
            old_logprob_BGC=old_NGC,
            reference_logprob_BGC=reference_NGC,
            nested_logprob_BGC=nested_NGC,
        )
        return jax.vmap(of_group)(target_NGC, batch)

    def of_group(target_GC, group):
        """The gradient with respect to one group's log-probabilities, and the sums behind its weights."""

        def mean_loss(target_BGC):
            output = policy_gradient_loss(target_BGC, jax.tree.map(lambda x: x[None], group), loss)
            return output.mean(), output.parts

        gradient_BGC, parts = jax.grad(mean_loss, has_aux=True)(target_GC[None])
        mean, square = parts["weight_mean"], parts["weight_square_mean"]
        # The loss is minimised and J is maximised, hence the sign.
        return -gradient_BGC[0], jnp.stack([mean.weight, mean.sum, square.sum])

    return jax.vmap(of_prompt)(reward_XNG, target_XNGC, old_XNGC, reference_XNGC, nested_XNGC, behavior_XNGC)
