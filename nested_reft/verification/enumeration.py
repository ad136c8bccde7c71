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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nested_reft.estimators.advantages import group_advantages
from nested_reft.estimators.health import kish
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.objective import TargetPass
from nested_reft.losses.registry import make_objective
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.types import TrainBatch
from nested_reft.verification.enumerable_model import EnumeratedPolicies, Scenario, TinyModel, enumerate_policies
from nested_reft.verification.estimator_list import ALPHA, GROUP_SIZE, Estimator, Sampling, named_estimators

EXACT = 1e-5  # relative bias that float32 explains
MOST_DRAWN = 1 - 2**-24  # the largest number below 1 in float32
# About 0.05, 0.1 and 0.2 nats a token; the last layer is the cheapest one.
DEPTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "the last layer": ((3,),),
    "one layer": tuple(itertools.combinations(range(4), 1)),
    "two layers": tuple(itertools.combinations(range(4), 2)),
}
AGES = (0, 1, 4)
SCENARIOS = tuple(Scenario(depth, plans, age) for depth, plans in DEPTHS.items() for age in AGES)


@dataclass(frozen=True)
class EstimatorReport:
    """Exact properties of one estimator in one scenario.

    With g the true gradient and g_hat the estimate from one group:

    Attributes:
        scenario, depth, updates: where the policies stand, in words and in parts.
        kl_per_token: mean of log pi_b - log pi over the sampled tokens, in nats: how large the mismatch is.
        group, estimator: what it is an example of, and its name.
        sampling: how its completions are drawn.
        claimed_scale: what `scale` should be, with a direction bias of zero; None where nothing is claimed.
        relative_bias: |E g_hat - g| / |g|.
        direction_bias: the same after the best scaling of E g_hat: the sine of the angle between the
            two. A pure scale error leaves it at zero.
        scale: <E g_hat, g> / |g|^2: 1 when right, (G-1)/G for the group mean.
        variance: trace of the covariance of g_hat over groups, divided by |g|^2.
        accepted: share of the completions of which any token has a weight above 0; masks and budgets reject others.
        ess: effective sample size of the weights that entered the loss, per token, in (0, 1].
    """

    scenario: str
    depth: str
    updates: int
    kl_per_token: float
    group: str
    estimator: str
    sampling: Sampling
    claimed_scale: float | None
    relative_bias: float
    direction_bias: float
    scale: float
    variance: float
    accepted: float
    ess: float

    @property
    def standard_deviation(self) -> float:
        """Root of the variance: the noise of one group's estimate, as a share of |g|."""
        return math.sqrt(max(self.variance, 0.0))

    @property
    def noise(self) -> float:
        """The standard deviation when the estimate is scaled to the right length; infinite where it points away."""
        return self.standard_deviation / self.scale if self.scale > 0 else math.inf

    @property
    def keeps_claim(self) -> bool:
        """False only where an estimator claims to be unbiased, perhaps up to a scale, and is not."""
        if self.claimed_scale is None:
            return True
        return self.direction_bias < EXACT and abs(self.scale - self.claimed_scale) < EXACT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {
            "standard_deviation": self.standard_deviation,
            "noise": self.noise if math.isfinite(self.noise) else None,
        }


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
    # The policies do not depend on the estimator, so each scenario is computed once.
    policies = enumerate_policies(TinyModel(seed), scenarios)
    by_estimator = [reports(estimator, scenarios, policies) for estimator in estimators]
    return [found[index] for index in range(len(scenarios)) for found in by_estimator]


def reports(
    estimator: Estimator, scenarios: Sequence[Scenario], policies: Sequence[EnumeratedPolicies]
) -> list[EstimatorReport]:
    """Sums the loss's gradient over all groups, prompts and plans of each scenario.

    Args:
        estimator: what is enumerated.
        scenarios: named in the reports.
        policies: what `enumerate_policies` returned for them.
    """
    num_completions = policies[0].completions.reward_XY.shape[1]
    # Each completion may come out in two ways: accepted, or rejected.
    outcomes = num_completions * (2 if estimator.sampling == "nested, accepted at random" else 1)
    # Groups are listed once, for all scenarios, prompts and plans.
    index_NG, orders_N = all_groups(outcomes, estimator.sampling)
    gradients = group_gradients(estimator, policies, index_NG)
    return [
        _report(estimator, scenario, enumerated, index_NG, orders_N, *gradient)
        for scenario, enumerated, gradient in zip(scenarios, policies, gradients, strict=True)
    ]


def _report(
    estimator: Estimator,
    scenario: Scenario,
    policies: EnumeratedPolicies,
    index_NG: Int[np.ndarray, "N G"],
    orders_N: Int[np.ndarray, " N"],
    coefficient_ZXNGC: Float[np.ndarray, "Z X N G C"],
    weights_ZXN4: Float[np.ndarray, "Z X N 4"],
) -> EstimatorReport:
    """The expectations over groups, prompts and plans of one scenario."""
    num_plans, num_prompts = weights_ZXN4.shape[:2]
    num_groups, (num_completions, num_tokens) = len(index_NG), policies.completions.tokens_YC.shape
    mean_M, square, weight_sums = np.zeros(policies.jacobian_XRM.shape[-1]), 0.0, np.zeros(4)
    for z, nested_logprob_XYC in enumerate(policies.nested_logprob_ZXYC):
        probability_XYS = slot_probabilities(estimator.sampling, policies.old_logprob_XYC, nested_logprob_XYC)
        if isinstance(estimator.loss, PolicyGradientConfig) and estimator.loss.obrs_lambda is not None:
            # As in the loss: with three policies the weight, and with it the acceptance, corrects the sampler alone.
            is_decoupled = estimator.loss.clip_policies == "three"
            corrected_XYC = policies.old_logprob_XYC if is_decoupled else policies.target_logprob_XYC
            over_nested_XYC = np.asarray(corrected_XYC - nested_logprob_XYC, np.float64)
            accepted_XY = np.minimum(1, np.exp(over_nested_XYC.sum(axis=-1)) / estimator.loss.obrs_lambda)
            shares_XY1 = np.concatenate([accepted_XY, 1 - accepted_XY], axis=1)[..., None]
            probability_XYS = np.tile(probability_XYS, (1, 2, 1)) * shares_XY1
        for x in range(num_prompts):
            # Places are drawn independently, so their probabilities multiply.
            probability_N = np.prod([probability_XYS[x, index_NG[:, s], s] for s in range(GROUP_SIZE)], axis=0)
            # Prompts and plans are drawn uniformly, and one listed group stands for all its orders.
            probability_N = probability_N * orders_N / (num_prompts * num_plans)
            # One row per group, one column per token of each completion: what the Jacobian's rows are multiplied by.
            coefficient_NYC = np.zeros((num_groups, num_completions, num_tokens))
            # Place by place, because one completion can stand at several places of a group.
            for s in range(GROUP_SIZE):
                completion_N = index_NG[:, s] % num_completions
                coefficient_NYC[np.arange(num_groups), completion_N] += coefficient_ZXNGC[z, x, :, s]
            coefficient_NR = coefficient_NYC.reshape(num_groups, -1)
            mean_M += (probability_N @ coefficient_NR) @ policies.jacobian_XRM[x]
            # |c J|^2 = c (J J^T) c^T: with the Gram matrix no gradient of a single group is ever written out. `einsum`
            # does without the threads of BLAS, which on a busy machine wait for each other longer than they compute.
            product_NR = np.einsum("nr,rs->ns", coefficient_NR, policies.gram_XRR[x])
            square += float(probability_N @ (product_NR * coefficient_NR).sum(axis=1))
            weight_sums += probability_N @ weights_ZXN4[z, x]
    # A penalty changes the objective, so the truth changes with it.
    truth_M = policies.reward_gradient_M - estimator.kl_coefficient * policies.kl_gradient_M
    length = float(np.linalg.norm(truth_M))
    # The projection on the truth tells an error of scale from one of direction.
    along = float(mean_M @ truth_M)
    tokens, weight, weight_square, kept = weight_sums
    return EstimatorReport(
        scenario=scenario.name,
        depth=scenario.depth,
        updates=scenario.updates,
        kl_per_token=policies.kl_per_token,
        group=estimator.group,
        estimator=estimator.name,
        sampling=estimator.sampling,
        claimed_scale=estimator.claimed_scale,
        relative_bias=float(np.linalg.norm(mean_M - truth_M)) / length,
        direction_bias=float(np.linalg.norm(truth_M - mean_M * along / float(mean_M @ mean_M))) / length,
        scale=along / length**2,
        # The trace of the covariance is E|g_hat|^2 - |E g_hat|^2.
        variance=(square - float(mean_M @ mean_M)) / length**2,
        accepted=float(kept) / GROUP_SIZE,
        ess=float(kish(jnp.asarray(weight / tokens), jnp.asarray(weight_square / tokens))),
    )


def all_groups(num_completions: int, sampling: Sampling) -> tuple[Int[np.ndarray, "N G"], Int[np.ndarray, " N"]]:
    """Every group as indices of outcomes, and in how many orders it can be drawn.

    Where all places of a group are drawn alike, one order stands for all; otherwise each is listed.

    Args:
        num_completions: Y, or 2 Y where a completion may be accepted (index y) or rejected (Y + y).
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
        "nested, accepted at random": [nested_XY] * GROUP_SIZE,
        "full": [full_XY] * GROUP_SIZE,
        "mixture": [mixture_XY] * GROUP_SIZE,
        "mixture with fixed counts": [full_XY] + [nested_XY] * (GROUP_SIZE - 1),
    }
    return np.stack(slots[sampling], axis=-1)


def group_gradients(
    estimator: Estimator, policies: Sequence[EnumeratedPolicies], index_NG: Int[np.ndarray, "N G"]
) -> list[tuple[Float[np.ndarray, "Z X N G C"], Float[np.ndarray, "Z X N 4"]]]:
    """Each group's estimate of grad J, with respect to its log-probabilities, from the production loss.

    Args:
        estimator: gives the loss.
        policies: what `enumerate_policies` returned.
        index_NG: the groups that `all_groups` listed.

    Returns:
        For each scenario, the estimates under each of its plans, and the sums over each group's tokens of 1, h and
        h^2 with its number of completions that have a weight.
    """
    pairs = [(enumerated, z) for enumerated in policies for z in range(len(enumerated.nested_logprob_ZXYC))]
    num_prompts, num_completions = policies[0].completions.reward_XY.shape
    # Beyond the completions, the outcomes begin again, rejected.
    completion_NG, rejected_NG = index_NG % num_completions, index_NG >= num_completions

    def rows(of_plan: Callable[[EnumeratedPolicies, int], Any]) -> Array:
        """The values `[X, Y, ...]` of each scenario and plan, with a row for each of these, prompt and group."""
        values_KXNG = np.stack([np.asarray(of_plan(*pair))[:, completion_NG] for pair in pairs])
        return jnp.asarray(values_KXNG.reshape(-1, *values_KXNG.shape[3:]))

    # One call for all scenarios, operation by operation: compiling each loss would take longer than running it.
    gradient_RGC, weights_R4 = gradients_of_rows(
        estimator.loss,
        rows(lambda p, z: np.broadcast_to(p.completions.length_Y, p.completions.reward_XY.shape)),
        rows(lambda p, z: p.completions.reward_XY),
        rows(lambda p, z: p.target_logprob_XYC),
        rows(lambda p, z: p.old_logprob_XYC),
        rows(lambda p, z: p.reference_logprob_XYC),
        rows(lambda p, z: p.nested_logprob_ZXYC[z]),
        # The loss is told the policy that drew; for a mixture it reads both components instead.
        rows(lambda p, z: p.old_logprob_XYC if estimator.sampling == "full" else p.nested_logprob_ZXYC[z]),
        # The lowest draw accepts always, and the highest wherever acceptance is not certain.
        jnp.asarray(np.tile(rejected_NG * MOST_DRAWN, (len(pairs) * num_prompts, 1)).astype(np.float32)),
    )
    shape = (len(pairs), num_prompts, len(index_NG))
    coefficient_KXNGC = np.asarray(gradient_RGC, np.float64).reshape(*shape, *gradient_RGC.shape[1:])
    weights_KXN4 = np.asarray(weights_R4, np.float64).reshape(*shape, 4)
    ends = np.cumsum([len(enumerated.nested_logprob_ZXYC) for enumerated in policies])[:-1]
    return list(zip(np.split(coefficient_KXNGC, ends), np.split(weights_KXN4, ends), strict=True))


def gradients_of_rows(
    loss: PolicyGradientConfig | TrajectoryBalanceConfig,
    length_RG: Int[Array, "R G"],
    reward_RG: Float[Array, "R G"],
    target_RGC: Float[Array, "R G C"],
    old_RGC: Float[Array, "R G C"],
    reference_RGC: Float[Array, "R G C"],
    nested_RGC: Float[Array, "R G C"],
    behavior_RGC: Float[Array, "R G C"],
    draw_RG: Float[Array, "R G"],
) -> tuple[Float[Array, "R G C"], Float[Array, "R 4"]]:
    """For each group by itself, minus the gradient of its loss, and the sums behind its weights.

    Trajectory balance has the gradient of its objective times 2 / beta, which is taken off here.

    Args:
        loss: the production configuration.
        length_RG, reward_RG: of R groups of G completions.
        target_RGC, old_RGC, reference_RGC, nested_RGC, behavior_RGC: log-probabilities under each policy.
        draw_RG: by which completions are accepted, where the loss rejects at random.
    """
    num_groups, objective = len(length_RG), make_objective(loss)
    if isinstance(loss, TrajectoryBalanceConfig):
        signal_RG, beta, scale = reward_RG, loss.beta, loss.beta / 2
    else:
        assert loss.advantage != "gae", "a critic is no matter of enumeration"
        signal_RG = group_advantages(reward_RG, jnp.ones(reward_RG.shape, bool), loss.advantage)
        beta, scale = None, 1.0
    groups = TrainBatch(
        # The loss reads log-probabilities and lengths; prompts and tokens only have to have the right shapes.
        prompt_BP=jnp.zeros((num_groups, 1), jnp.int32),
        prompt_length_B=jnp.ones(num_groups, jnp.int32),
        tokens_BGC=jnp.zeros(target_RGC.shape, jnp.int32),
        length_BG=length_RG,
        forced_BG=jnp.zeros_like(length_RG),
        counted_BG=jnp.ones(length_RG.shape, bool),
        signal_BG=signal_RG,
        behavior_logprob_BGC=behavior_RGC,
        full_share_BG=jnp.full(length_RG.shape, ALPHA),
        old_logprob_BGC=old_RGC,
        reference_logprob_BGC=reference_RGC,
        nested_logprob_BGC=nested_RGC,
        acceptance_draw_BGC=jnp.broadcast_to(draw_RG[..., None], target_RGC.shape),
        mix_share_B=jnp.full(num_groups, getattr(loss, "mix_share", None) or 0.0),
        beta_B=None if beta is None else jnp.full(num_groups, beta),
    )

    def of_group(target_GC: Array, group: TrainBatch) -> tuple[Array, Array]:
        # The loss takes a batch, here of one group.
        def mean_loss(target_BGC: Array):
            one = jax.tree.map(lambda x: x[None], group)
            output = objective.loss(TargetPass(target_BGC, jnp.zeros_like(target_BGC)), one)
            weight_BGC = output.weight_BGC
            kept = (weight_BGC > 0).any(axis=-1).sum()
            return output.mean(), jnp.stack([one.mask_BGC.sum(), weight_BGC.sum(), (weight_BGC**2).sum(), kept])

        gradient_BGC, weights_4 = jax.grad(mean_loss, has_aux=True)(target_GC[None])
        # The loss is minimised and J is maximised, hence the sign.
        return -scale * gradient_BGC[0], weights_4

    return jax.vmap(of_group)(target_RGC, groups)
