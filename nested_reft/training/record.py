"""What a step did: typed, and turned into metrics, samples and a progress line here and nowhere else.

`METRICS` declares every name that can stand in a line of `metrics.jsonl`, with its unit and meaning.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nested_reft import curriculum, dataset_reset, replay
from nested_reft.curriculum import CurriculumState
from nested_reft.dataset_reset import ResetState
from nested_reft.estimators.advantages import group_advantages
from nested_reft.estimators.health import health_warning
from nested_reft.estimators.rejection import written_bounds
from nested_reft.evaluation import Evaluation
from nested_reft.kl_control import KlControlState
from nested_reft.layer_plan import LayerPlan, left_out, replaced_layers
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.registry import ObjectiveConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.mix_control import MixControlState
from nested_reft.nesting_control import NestingControlState, unmet_budget
from nested_reft.plan_price import Price
from nested_reft.replay_store import StoreSummary
from nested_reft.rewards.reward import component_metrics
from nested_reft.training.config import Config
from nested_reft.training.learner import Update
from nested_reft.training.nested_policy import Renewed
from nested_reft.training.orders import SearchReport
from nested_reft.types import Scored, concat
from nested_reft.untrusted import printable

LOGGED_PROMPTS = 4  # prompts of each step whose completions go to samples.jsonl


@dataclass(frozen=True)
class Metric:
    """One entry of the metric reference.

    Attributes:
        name: as in `metrics.jsonl`; `{source}` and `{part}` stand for a name of the run's own, `{reject_by}` for one of
            the ways to judge samples, `{reason}` for why a completion is not kept.
        unit: of its values; empty for counts and words.
        meaning: in words.
    """

    name: str
    unit: str
    meaning: str

    def matches(self, name: str) -> bool:
        """Whether a logged name is this metric's."""
        # A source may have any name, dots included, so a placeholder matches whatever stands there.
        return re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(self.name)), name) is not None


# The order is roughly that of a step: what was generated, what was learnt, what follows from it.
METRICS = (
    Metric("step", "", "number of the step, counted from 1; 0 is before the first"),
    Metric("reward", "reward", "mean total reward of all completions that have a score"),
    Metric("reward/{part}", "reward", "mean of one component of the reward, before its weight"),
    Metric("accuracy", "share", "share of right answers among the sampled completions"),
    Metric("unscored", "completions", "completions whose reward could not be computed; they count nowhere"),
    Metric("unscored/{part}", "completions", "those that failed in one way: timed_out, crashed or failed"),
    Metric("completion_tokens", "tokens", "mean length of a completion, its stop token included"),
    Metric("finished", "share", "share of completions that ended with a stop token"),
    Metric("mixed_groups", "share", "share of groups with right and wrong completions"),
    Metric("generation_batches", "batches", "batches generated for this update"),
    Metric("trained_groups", "groups", "mixed groups that the update trained on (dynamic sampling)"),
    Metric("shortfall", "", "in words, that dynamic sampling found too few mixed groups"),
    Metric("sources", "prompts", "prompts drawn from each training source, in their order"),
    Metric("replay/recent", "share", "trained completions of the version that sampled the step's newest batch"),
    Metric("replay/completions", "completions", "kept for replay, after the step's own came in"),
    Metric("replay/prompts", "prompts", "that they belong to"),
    Metric("replay/age", "versions", "mean number of versions that a kept completion is behind"),
    Metric("replay/reward", "reward", "mean of the kept completions"),
    Metric("turned_away/{reason}", "completions", "not kept or taken out since the run began, for one reason"),
    Metric("rollout_seconds", "seconds", "time of sampling, without scoring"),
    Metric("tokens_per_second", "tokens/second", "sampled tokens over the time of sampling"),
    Metric("step_seconds", "seconds", "time of the whole step"),
    Metric("staleness_mean", "versions", "mean age of the trained completions: updates since their weights"),
    Metric("staleness_max", "versions", "age of the oldest of them"),
    Metric("staleness_completions", "completions", "trained completions of each age, from 0 to the oldest"),
    Metric("search_wait_seconds", "seconds", "the learner's wait for search, also for a checkpoint, or its sampling"),
    Metric("searchers_busy", "share", "time of the searchers for the step's batches, over all the time that they had"),
    Metric("searched_tokens_per_second", "tokens/second", "sampled tokens over all time since the step before"),
    Metric("trained_tokens_per_second", "tokens/second", "tokens of the update over the time that was no waiting"),
    Metric("sync_seconds", "seconds", "time until new weights had come to the searchers of the step's batches"),
    Metric("orders_under_way", "batches", "batches that are being searched or wait for an update"),
    Metric("searchers_started", "searchers", "searchers that are ready or at work; search.searchers are asked for"),
    Metric("searchers_replaced", "searchers", "searchers that were lost and replaced since the process began"),
    Metric("compilations", "programs", "programs compiled since the run started; it must stand still"),
    Metric("left_out_layers", "", "indices of the layers that the nested policy does not run whole"),
    Metric("bridged_layers", "", "those of them that a bridge stands in for"),
    Metric("layers_without_attention", "", "those of them whose MLP alone runs"),
    Metric("layers_without_mlp", "", "those of them whose attention alone runs"),
    Metric("plan_price", "share", "least time of the plan's decode step over the full model's, by published rates"),
    Metric("draft_length", "tokens", "tokens drafted before each verification (exact rollouts)"),
    Metric("draft_acceptance", "share", "share of tested draft tokens that the full model kept"),
    Metric("empty", "", "true where no token counted or all were rejected, so that nothing changed"),
    Metric("nonfinite_updates", "updates", "left out in the step, since loss or gradient was not finite"),
    Metric("loss", "", "what was minimised, in the last pass over the batch (mean of its mini-batches)"),
    Metric("policy_loss", "", "its policy-gradient part"),
    Metric("cross_entropy", "nats/token", "of the demonstrations (supervised objective)"),
    Metric("pair_accuracy", "share", "preference pairs whose preferred answer has the higher score"),
    Metric("margin", "reward", "mean of that score minus the other one's; of DPO, beta times log ratios"),
    Metric("chosen_score", "reward", "mean score of preferred answers"),
    Metric("rejected_score", "reward", "mean score of the other ones"),
    Metric("gradient_norm", "", "global norm of the gradient, before clipping"),
    Metric("clipped_share", "share", "tokens that a clip left without gradient"),
    Metric("limited_share", "share", "tokens that were kept and whose weight was truncated"),
    Metric("weight_mean", "", "mean importance weight of the loss; rejected tokens have 0"),
    Metric("ess_weight", "share", "effective sample size of the loss's weights; rejected tokens have 0"),
    Metric("accepted_tokens", "share", "tokens that were kept (loss.reject_by, loss.obrs_lambda)"),
    Metric("accepted_completions", "share", "completions of which any token was kept"),
    Metric("kept_weight_mean", "", "mean importance weight of the tokens that were kept"),
    Metric("ess_kept", "share", "effective sample size of the weights of those tokens"),
    Metric("ess_token", "share", "effective sample size of the ratios pi / pi_b of tokens, in the first update"),
    Metric("ess_sequence", "share", "the same of whole completions"),
    Metric("ratio_mean", "", "mean of pi / pi_b; 1 in expectation"),
    Metric("sequence_ratio_mean", "", "mean of the product of pi / pi_b over each completion; 1 in expectation"),
    Metric("ratio_max", "", "largest pi / pi_b"),
    Metric("ratio_quantile_05", "", "5 % quantile of pi / pi_b"),
    Metric("ratio_quantile_50", "", "median of pi / pi_b"),
    Metric("ratio_quantile_95", "", "95 % quantile of pi / pi_b"),
    Metric("ratio_tail", "share", "tokens whose pi / pi_b lies outside [1/2, 2]"),
    Metric("kl_behavior_target", "nats/token", "estimate of KL(pi_b || pi) per sampled token"),
    Metric(
        "bounds/{reject_by}", "", "reject_below and reject_above that keep 95 %, then those for 99 %; null for none"
    ),
    Metric("entropy", "nats/token", "mean entropy of the target's next-token distributions"),
    Metric("reference_kl", "nats/token", "k3 estimate of KL(pi || reference)"),
    Metric("beta", "reward/nat", "weight of the KL to the reference (trajectory balance)"),
    Metric("log_z", "nats", "mean over groups of the estimated log Z"),
    Metric("residual_std", "nats", "root of the mean square of a completion's residual, log Zhat + S - r / beta"),
    Metric("reference_log_ratio", "nats/completion", "mean of S = log pi - log reference; on-policy k1's KL estimate"),
    Metric("self_distillation_kl", "nats/token", "KL(full || nested) that self-distillation minimises"),
    Metric("value_loss", "", "half the squared error of the critic's values, clipped as it was minimised"),
    Metric("value_clipped_share", "share", "tokens whose value lost its gradient to the clip"),
    Metric("value_mean", "reward", "mean value of the tokens' states"),
    Metric("return_mean", "reward", "mean of what the critic learns"),
    Metric("explained_variance", "share", "of the returns, by the values; 1 is a perfect critic, 0 a constant one"),
    Metric("completion_kl", "nats", "KL(pi || reference) before the update, over a completion without what was forced"),
    Metric("kl_coefficient", "", "weight of that penalty in the next step"),
    Metric("warning", "", "in words, with a remedy: too far off-policy, no plan meets the budget, most rejected"),
    Metric("next_num_left_out", "layers", "layers that the next batch leaves out (nesting control)"),
    Metric("nesting_reason", "", "in words, why"),
    Metric("next_mix_share", "share", "how much of the importance weight the next batch uses (mix control)"),
    Metric("mix_reason", "", "in words, why"),
    Metric("reset/share", "share", "completions that started inside a reference"),
    Metric("reset/referenced", "share", "prompts with a reference that can serve"),
    Metric("reset/forced_tokens", "tokens", "given tokens of all completions; they carry no gradient"),
    Metric("reset/fraction", "share", "of the reference that was given: 5, 25, 50, 75 and 95 % quantiles of h / n"),
    Metric("reset/coverage", "share", "references that a rollout has started from so far, of all that can serve"),
    Metric("reset/length_bias", "deviations", "mean tokens of the references that served, above the mean of all"),
    Metric("reset/score_bias", "deviations", "the same of the score that `reset.prefer` names"),
    Metric("reset/accuracy", "share", "right answers among the completions that started inside a reference"),
    Metric("reset/free_accuracy", "share", "right answers among the others"),
    Metric("reset/stage", "stages", "how far `reset.schedule backward` has moved towards the prompt"),
    Metric("layer_divergence", "nats/token", "new measurement of each layer's divergence"),
    Metric("remeasure_seconds", "seconds", "time that it took"),
    Metric("bridge_tokens", "tokens", "completion tokens that the bridges were fitted on, in steps that fit them"),
    Metric("bridge_seconds", "seconds", "time of the fit"),
    Metric("curriculum/{source}/probability", "share", "with which the step drew the source"),
    Metric("curriculum/{source}/learnability", "", "mean |advantage| of the source's latest responses"),
    Metric("curriculum/{source}/bonus", "", "its exploration bonus"),
    Metric("curriculum/{source}/count", "responses", "responses seen of it before the step"),
    Metric("curriculum/{source}/reward", "reward", "mean reward of the step's responses to it"),
    Metric("curriculum/{source}/accuracy", "share", "share of right ones among them"),
    Metric("curriculum_audit", "", "in words, which sources rose and fell, and why"),
    Metric("heldout/{source}", "share", "greedy accuracy on the held-out prompts of a source; of pairs, ordered right"),
    Metric("heldout_loss/{source}", "", "loss on the held-out examples of a source (sft, reward models, DPO)"),
)
"""Every metric of a step."""


@dataclass(frozen=True)
class StepRecord:
    """What one training step did.

    Attributes:
        number: of the step, counted from 1.
        plan: the layers of its nested policy.
        price: what the plan costs, at the least.
        found: everything that was generated, trained on or not.
        groups: what the update trained on.
        version: of the policy that it trained, before it did.
        stored: what is kept for replay; None without it.
        update: what the update did.
        curriculum_before, curriculum_after: what the curriculum knew.
        nesting: how deep the next batch nests, and why.
        mix: how much of the importance weight the next batch uses, and why.
        reset: where in their references the next rollouts may start.
        kl: how heavy the KL penalty on the next token rewards is.
        renewed: bridges that were fitted and layers that were measured, if any.
        search: how searching went.
        heldout: greedy results by source, in steps that evaluate.
        seconds: time of the step.
        compilations: programs compiled since the run started.
    """

    number: int
    plan: LayerPlan
    price: Price
    found: tuple[Scored, ...]
    groups: Scored
    version: int
    stored: StoreSummary | None
    update: Update
    curriculum_before: CurriculumState
    curriculum_after: CurriculumState
    nesting: NestingControlState
    mix: MixControlState
    reset: ResetState
    kl: KlControlState
    renewed: Renewed
    search: SearchReport
    seconds: float
    compilations: int
    heldout: dict[str, Evaluation] = dataclasses.field(default_factory=dict)

    @cached_property
    def all(self) -> Scored:
        """Everything that was generated, as one value."""
        return concat(self.found)

    @property
    def reward(self) -> float:
        """Mean total reward of the completions that have a score; 0 without any."""
        return self._mean(self.all.reward_BG)

    @property
    def accuracy(self) -> float:
        """Share of right answers among the completions that have a score; 0 without any."""
        return self._mean(self.all.accuracy_BG)

    def _mean(self, value_BG: Float[np.ndarray, "B G"]) -> float:
        # A completion without a score is not a wrong one, so it enters no mean.
        scored_BG = self.all.scored_BG
        return float(value_BG[scored_BG].mean()) if scored_BG.any() else 0.0

    @property
    def rollout_seconds(self) -> float:
        """Time of sampling, without scoring."""
        return sum(scored.stats.rollout_seconds for scored in self.found if scored.stats is not None)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were sampled."""
        rollouts = self.all.rollouts
        # Forced tokens were given, so they are no work of the sampler.
        return int((rollouts.length_BG - rollouts.forced_BG).sum())

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens over the time of sampling."""
        return self.sampled_tokens / self.rollout_seconds

    @property
    def staleness_BG(self) -> Int[np.ndarray, "B G"]:
        """The age of each completion that was trained on, in updates since the weights that sampled it."""
        return self.version - np.asarray(self.groups.rollouts.version_BG)

    def warnings(self, config: Config) -> dict[str, str]:
        """What the user should know, in words, by kind: that the step was too far off-policy, no plan near enough, or
        most of it rejected.

        Args:
            config: of the run.
        """
        if self.update.health is None:
            return {}
        parts, threshold = self.update.parts, config.train.ess_warning
        # What a mask rejects is no matter of the weights, and it has a warning of its own.
        size = None if self.update.empty else parts.get("ess_kept", parts.get("ess_weight"))
        # Trajectory balance aims at its optimum whoever sampled, so there the distance is no trouble.
        is_balance = isinstance(config.loss, TrajectoryBalanceConfig)
        found = {
            "off_policy": None if is_balance else health_warning(self.update.health, size, threshold),
            "budget": unmet_budget(self.nesting, config.nesting_control),
            "rejected": self._few_accepted(config.loss, threshold),
        }
        return {kind: warning for kind, warning in found.items() if warning is not None}

    def why_empty(self, config: Config) -> str:
        """Why an update changed nothing, in words, with a remedy.

        Args:
            config: of the run.
        """
        rejected = self.warnings(config).get("rejected")
        if rejected is not None:
            return rejected
        unscored = int((~self.all.scored_BG).sum())
        return (
            f"no completion had anything to teach. Their mean reward is {self.reward:.3g}, {self.accuracy:.1%} are"
            f" right, and {unscored} of {self.all.scored_BG.size} could not be scored: see reward and data.sources"
        )

    def _few_accepted(self, loss: ObjectiveConfig, threshold: float) -> str | None:
        """That a mask or a budget kept few tokens or none, and what would keep most."""
        if not isinstance(loss, PolicyGradientConfig) or not loss.may_reject:
            return None
        share = self.update.parts["accepted_tokens"]
        # An update of several passes may be left out in the last of them alone.
        if share >= threshold and not self.update.empty:
            return None
        did = "rejected every token, so nothing changed" if self.update.empty else f"kept {share:.1%} of the tokens"
        if loss.reject_by is None:
            return f"loss.obrs_lambda {loss.obrs_lambda} {did}. Lower it, or lower nesting.skip_ratio"
        low, high = written_bounds(loss.reject_by, self.update.bounds[loss.reject_by])[:2]
        wider = f"reject_below {low} and reject_above {high} would keep 95 % of the batch. Widen the bounds"
        if low is None and high is None:
            wider = "no bounds that may be set would keep 95 % of the batch. Use another reject_by"
        return (
            f"loss.reject_by '{loss.reject_by}' {did}: reject_below is {loss.reject_below} and reject_above"
            f" {loss.reject_above}; {wider}, or lower nesting.skip_ratio"
        )


def metrics(record: StepRecord, config: Config, source_names: tuple[str, ...]) -> dict[str, Any]:
    """The line of `metrics.jsonl` that a step becomes: JSON-able values by declared names.

    Args:
        record: of the step.
        config: of the run.
        source_names: of the training sources.
    """
    found = {
        **_update_metrics(record, config),
        **_nesting_metrics(record),
        **_generation_metrics(record, config, len(source_names)),
        **_age_metrics(record, config),
        **_search_metrics(record, config),
        **_curriculum_metrics(record, config, source_names),
        **(dataset_reset.step_metrics(record.reset, config.reset, record.all) if config.reset.is_on else {}),
        **{f"heldout/{source}": result.greedy_accuracy for source, result in record.heldout.items()},
        "step_seconds": record.seconds,
        "compilations": record.compilations,
    }
    return declared(found)


def declared(found: dict[str, Any]) -> dict[str, Any]:
    """The same metrics, each of which has its entry in `METRICS`.

    Args:
        found: values by name.
    """
    # A metric without unit and meaning is a mistake of this package, so it stops the run.
    undeclared = [name for name in found if not any(metric.matches(name) for metric in METRICS)]
    assert not undeclared, f"metrics {undeclared} are not declared in METRICS"
    return found


def update_metrics(update: Update) -> dict[str, Any]:
    """What every kind of update measures: loss, norm, the objective's parts, and what was left out.

    Args:
        update: of one step.
    """
    found = {"loss": update.loss, "gradient_norm": update.gradient_norm} | update.parts
    return found | {"nonfinite_updates": update.nonfinite} if update.nonfinite else found


def samples(record: StepRecord, config: Config, source_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The completions of the first prompts of a step, with what explains their rewards: lines of `samples.jsonl`.

    Args:
        record: of the step.
        config: of the run.
        source_names: of the training sources.
    """
    groups, weight_BGC = record.groups, record.update.weight_BGC
    rollouts, advantage_BG = groups.rollouts, _advantages(groups, config.loss)
    # A completion that was forced whole divides 0 by 1.
    sampled_BG = np.maximum(rollouts.length_BG - rollouts.forced_BG, 1)
    # The weights may be cut to a shorter C than the rollouts. What was cut off holds no tokens.
    mean_weight_BG = weight_BGC.sum(axis=-1) / sampled_BG
    lines = []
    for b in range(min(LOGGED_PROMPTS, len(groups))):
        lines += [
            {
                "source": source_names[int(groups.prompts.source_B[b])],
                "version": int(rollouts.version_BG[b, g]),
                "prompt": groups.prompts.texts[b],
                "answer": groups.prompts.answers[b],
                "text": groups.texts[b][g],
                "reward": float(groups.reward_BG[b, g]),
                # A completion without a score is not a wrong one.
                "accuracy": float(groups.accuracy_BG[b, g]) if groups.scored_BG[b, g] else None,
                "advantage": None if advantage_BG is None else float(advantage_BG[b, g]),
                "parts": {name: float(part_BG[b, g]) for name, part_BG in groups.parts.items()},
                "stop": "stop token" if rollouts.finished_BG[b, g] else "length",
                "tokens": int(rollouts.length_BG[b, g]),
                "forced_tokens": int(rollouts.forced_BG[b, g]),
                "temperature": float(f"{rollouts.temperature_BG[b, g]:.6g}"),
                # A mixture draws some completions of the group from the full model.
                "left_out_layers": left_out(np.asarray(rollouts.part_BGL[b, g])) if rollouts.nested_BG[b, g] else [],
                "mean_weight": float(mean_weight_BG[b, g]),
            }
            for g in range(rollouts.length_BG.shape[1])
        ]
    return lines


def _advantages(groups: Scored, loss: ObjectiveConfig) -> Float[np.ndarray, "B G"] | None:
    """The advantage of each completion; None where there is none but that of each token, or none at all."""
    # A critic and weighted baselines give one to each token, within the update.
    if not isinstance(loss, PolicyGradientConfig) or loss.advantage in ("gae", "weighted_leave_one_out"):
        return None
    # The update made them of arrays of the same shape, so nothing is compiled anew.
    return np.asarray(group_advantages(jnp.asarray(groups.reward_BG), jnp.asarray(groups.scored_BG), loss.advantage))


def progress(record: StepRecord, shown_accuracy: dict[str, float]) -> str:
    """The words behind the progress bar.

    Args:
        record: of the step.
        shown_accuracy: the latest held-out accuracies, by name.
    """
    # A batch without a token that counts has no health, and the bar shows `nan` for it.
    health = record.update.health
    shown = [
        f"reward {record.reward:.2f}",
        f"accuracy {record.accuracy:.2f}",
        f"{record.tokens_per_second:.0f} tok/s",
        f"ESS {np.nan if health is None else float(health.ess_token):.2f}",
        *(f"{printable(name)} {accuracy:.2f}" for name, accuracy in shown_accuracy.items()),
    ]
    return ", ".join(shown)


def _update_metrics(record: StepRecord, config: Config) -> dict[str, Any]:
    update = record.update
    found = update_metrics(update)
    # The zeros of an empty update would look like measurements, so the line says that it was empty.
    if update.empty:
        found["empty"] = True
    # Of tokens that were kept there are means only where there are such tokens.
    if found.get("accepted_tokens") == 0:
        found = {name: value for name, value in found.items() if name not in ("kept_weight_mean", "ess_kept")}
    found |= {f"bounds/{name}": written_bounds(name, bounds) for name, bounds in update.bounds.items()}
    if update.health is not None:
        # The fields of `Health` are named as their metrics are.
        found |= {f.name: float(getattr(update.health, f.name)) for f in dataclasses.fields(update.health)}
    if update.entropy is not None:
        found["entropy"] = update.entropy
    if "completion_kl" in update.parts:
        found["kl_coefficient"] = record.kl.coefficient
    warnings = record.warnings(config)
    return found | {"warning": "; ".join(warnings.values())} if warnings else found


def _nesting_metrics(record: StepRecord) -> dict[str, Any]:
    part_L = record.plan.host_parts(record.groups.rollouts.part_BGL.shape[-1])
    found: dict[str, Any] = {"left_out_layers": left_out(part_L)} | replaced_layers(part_L)
    found["plan_price"] = record.price.share_of_full
    # The reason is empty where nothing controls the nesting.
    if record.nesting.reason:
        found |= {"next_num_left_out": record.nesting.num_skipped, "nesting_reason": record.nesting.reason}
    if record.mix.reason:
        found |= {"next_mix_share": record.mix.share, "mix_reason": record.mix.reason}
    renewed = record.renewed
    if renewed.bridge_tokens is not None:
        found |= {"bridge_tokens": renewed.bridge_tokens, "bridge_seconds": renewed.bridge_seconds}
    if renewed.divergence_L is not None:
        found["layer_divergence"] = [round(float(value), 5) for value in renewed.divergence_L]
        found["remeasure_seconds"] = renewed.measuring_seconds
    return found


def _generation_metrics(record: StepRecord, config: Config, num_sources: int) -> dict[str, Any]:
    """What the policy did on everything that was generated, trained on or not."""
    found, rollouts = record.all, record.all.rollouts
    values = component_metrics(found.parts, found.scored_BG) | {
        "reward": record.reward,
        "accuracy": record.accuracy,
        "unscored": int((~found.scored_BG).sum()),
        "completion_tokens": float(rollouts.length_BG.mean()),
        "finished": float(rollouts.finished_BG.mean()),
        "mixed_groups": float(replay.mixed_groups(found).mean()),
        "generation_batches": len(record.found),
        "rollout_seconds": record.rollout_seconds,
        "tokens_per_second": record.tokens_per_second,
        "sources": np.bincount(found.prompts.source_B, minlength=num_sources).tolist(),
    }
    # Without dynamic sampling every group is trained on, mixed or not.
    if config.dynamic_sampling.filters_groups:
        mixed, wanted = int(replay.mixed_groups(found).sum()), config.data.prompts_per_batch
        values["trained_groups"] = min(mixed, wanted)
        short = replay.shortfall(mixed, config.dynamic_sampling, wanted)
        values |= {} if short is None else {"shortfall": short}
    tested = sum(scored.stats.drafts_tested for scored in record.found if scored.stats is not None)
    if tested:
        accepted = sum(scored.stats.drafts_accepted for scored in record.found if scored.stats is not None)
        values |= {"draft_length": config.rollout.draft_length, "draft_acceptance": accepted / tested}
    return values


def _age_metrics(record: StepRecord, config: Config) -> dict[str, Any]:
    """How old the trained completions are, and what there is to draw from; nothing where they are always fresh."""
    behind_BG, stored = record.staleness_BG, record.stored
    if stored is None and not config.search.makes_stale and not behind_BG.any():
        return {}
    newest = record.all.rollouts.version_BG.max()
    found: dict[str, Any] = {
        "staleness_mean": float(behind_BG.mean()),
        "staleness_max": int(behind_BG.max()),
        "staleness_completions": np.bincount(behind_BG.ravel()).tolist(),
    }
    if stored is None:
        return found
    return found | {
        "replay/recent": float((record.groups.rollouts.version_BG >= newest).mean()),
        "replay/completions": stored.completions,
        "replay/prompts": stored.prompts,
        "replay/age": stored.age,
        "replay/reward": stored.reward,
        **{f"turned_away/{reason}": count for reason, count in stored.turned_away.items()},
    }


def _search_metrics(record: StepRecord, config: Config) -> dict[str, Any]:
    """Who waited for whom; nothing where the learner samples just before each update."""
    search = record.search
    if not config.search.makes_stale and config.search.backend == "inline":
        return {}
    stats = [scored.stats for scored in record.found if scored.stats is not None]
    busy_seconds = sum(each.seconds for each in stats)
    return {
        "search_wait_seconds": search.waited_seconds + search.drained_seconds,
        "searchers_busy": busy_seconds / (config.search.searchers * search.period_seconds),
        "searched_tokens_per_second": record.sampled_tokens / search.period_seconds,
        "trained_tokens_per_second": float(
            record.groups.rollouts.length_BG.sum() / (record.seconds - search.waited_seconds)
        ),
        "sync_seconds": sum(each.sync_seconds for each in stats),
        "orders_under_way": search.under_way,
        "searchers_started": search.started,
        "searchers_replaced": search.replaced,
    }


def _curriculum_metrics(record: StepRecord, config: Config, source_names: tuple[str, ...]) -> dict[str, Any]:
    found = record.all
    return curriculum.step_metrics(
        record.curriculum_before,
        record.curriculum_after,
        config.curriculum,
        source_names,
        found.prompts.source_B,
        found.reward_BG,
        found.accuracy_BG,
        found.scored_BG,
    )
