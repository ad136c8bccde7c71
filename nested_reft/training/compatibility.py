"""Which parts of a configuration go together: one small rule for each way in which they may not.

Every part checks its own fields. What needs two parts stands here, as a function of the whole
configuration that raises a ValueError with the fields, their values and what is allowed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.registry import OfflineConfig, make_objective
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.rollout.schedule import refills
from nested_reft.sharding import divisors

if TYPE_CHECKING:  # the configuration imports its rules
    from nested_reft.training.config import Config


def name_is_a_directory_name(config: Config) -> None:
    """The name becomes part of the run directory's."""
    # The first character is neither a dot, which would hide the directory, nor a dash, which a shell command would take
    # for an option.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", config.name):
        raise ValueError(
            f"name is {config.name!r}; allowed are letters, digits, '_', '.' and '-': it names the run's directory"
        )


def mini_batches_divide_prompts(config: Config) -> None:
    """A batch is dealt to mini-batches by its prompts, so that groups stay whole."""
    prompts, parts = config.data.prompts_per_batch, config.train.mini_batches
    if prompts % parts:
        raise ValueError(f"train.mini_batches is {parts}; it must divide data.prompts_per_batch, which is {prompts}")


def micro_batches_divide_prompts(config: Config) -> None:
    """An update is split along its prompts."""
    prompts, parts = config.data.prompts_per_batch // config.train.mini_batches, config.train.micro_batches
    if prompts % parts:
        raise ValueError(
            f"train.micro_batches is {parts}; it must divide data.prompts_per_batch / train.mini_batches, which is"
            f" {prompts}"
        )


def mesh_divides_batches(config: Config) -> None:
    """Devices share the prompts of each micro-batch, in training and in the warm start."""
    if config.mesh.data == "auto":
        return  # it is not known yet, and asked again when it is
    shares, warm_start, micro_batch = config.mesh.batch, config.warm_start, config.prompts_per_micro_batch
    # Where one axis alone shares the batch, the message is about that field.
    sizes = {name: getattr(config.mesh, name) for name in ("slices", "data", "fsdp")}
    named = " x ".join(f"mesh.{name}" for name, size in sizes.items() if size > 1)
    if micro_batch % shares:
        raise ValueError(
            f"{named} is {shares}; it must divide the prompts of a micro-batch, {micro_batch}: allowed are"
            f" {divisors(micro_batch)}"
        )
    # A warm start that does not run may keep sizes that would not fit.
    warm_batch = warm_start.batch_size // warm_start.micro_batches
    if warm_start.steps and warm_batch % shares:
        raise ValueError(
            f"{named} is {shares}; it must divide warm_start.batch_size / warm_start.micro_batches, {warm_batch}:"
            f" allowed are {divisors(warm_batch)}"
        )


def overlong_cache_fits_completions(config: Config) -> None:
    """The punishment begins within a completion."""
    cache, limit = config.reward.overlong_cache_tokens, config.rollout.max_completion_tokens
    if cache > limit:
        raise ValueError(
            f"reward.overlong_cache_tokens is {cache}; allowed is 0 to rollout.max_completion_tokens, which is {limit}"
        )


def mixture_weights_need_a_mixture(config: Config) -> None:
    """The mixture's density exists only where completions are drawn from one."""
    # The opposite is allowed: a mixture may be sampled and weighed by another variant.
    is_weight = isinstance(config.loss, PolicyGradientConfig) and config.loss.bias_mitigation == "mixture"
    if is_weight and config.rollout.mixture_alpha is None:
        raise ValueError(
            "loss.bias_mitigation is 'mixture' and rollout.mixture_alpha None: the weight needs completions that are"
            " drawn from the full model with a known probability; set rollout.mixture_alpha, 0 < mixture_alpha <= 1"
        )


def limits_can_act_on_a_mixture(config: Config) -> None:
    """Before the target moves, the weight of a mixture is at most 1 / alpha."""
    loss, alpha = config.loss, config.rollout.mixture_alpha
    if not isinstance(loss, PolicyGradientConfig) or loss.bias_mitigation != "mixture" or alpha is None:
        return
    reaches = {"truncate_at": loss.truncate_at}
    # With three policies the weight is frozen, and the clip acts on another ratio.
    if loss.clip_policies == "two":
        reaches |= {"clip_high": None if loss.clip_high is None else 1 + loss.clip_high, "dual_clip": loss.dual_clip}
    for name, reach in reaches.items():
        if reach is not None and reach >= 1 / alpha and is_frozen(config):
            raise ValueError(
                f"loss.{name} is {getattr(loss, name)}, but bias_mitigation 'mixture' with rollout.mixture_alpha"
                f" {alpha} has weights of at most 1 / alpha = {1 / alpha:g}, which it would not change; leave it out or"
                " lower it"
            )


def exact_rollouts_leave_nothing_to_reject(config: Config) -> None:
    """Exact rollouts of the present version have the ratio 1, whatever drafts them."""
    if config.rollout.mode != "exact" or not is_on_policy(config):
        return
    for name in correcting_parts(config):
        raise ValueError(
            f"rollout.mode is 'exact' and {name} is set; exact rollouts are the target's own, so their ratios are 1 and"
            " it has nothing to do: leave it out, or use mode 'nested'"
        )


def is_frozen(config: Config) -> bool:
    """Whether the weight of the loss never compares with a target that has moved since its batch came.

    Args:
        config: with a policy-gradient loss.
    """
    three = isinstance(config.loss, PolicyGradientConfig) and config.loss.clip_policies == "three"
    return three or config.train.updates_per_batch == 1


def is_on_policy(config: Config) -> bool:
    """Whether all ratios that weights and masks read are 1: of samples of the full model at its present version.

    Args:
        config: the configuration.
    """
    search, rollout = config.search, config.rollout
    is_fresh = not (search.makes_stale or config.replay.is_on or search.temperatures)
    # In bfloat16 updates round where sampling does not, and caches where updates do not.
    is_rounded = rollout.weights != "target" or "bfloat16" in (config.train.compute_dtype, config.model.dtype)
    is_full = rollout.mode == "exact" or not leaves_layers_out(config)
    return is_full and is_fresh and not is_rounded and is_frozen(config)


def correcting_parts(config: Config) -> list[str]:
    """The fields of masks, budgets and mixes that are set, which ratios of 1 leave without work.

    Args:
        config: the configuration.
    """
    loss = config.loss
    fields = ("reject_by", "obrs_lambda") if isinstance(loss, PolicyGradientConfig) else ()
    found = [f"loss.{name}" for name in fields if getattr(loss, name) is not None]
    return found + ["mix_control.ess"] * (config.mix_control.ess is not None)


def exact_rollouts_need_no_control(config: Config) -> None:
    """Exact rollouts are on-policy at any depth."""
    if config.rollout.mode == "exact" and config.nesting_control.hold is not None:
        raise ValueError(
            f"rollout.mode is 'exact' and nesting_control.hold '{config.nesting_control.hold}'; exact rollouts are"
            " on-policy at any depth, so there is no budget to hold: use mode 'nested', or no nesting_control"
        )


def mix_has_one_source(config: Config) -> None:
    """The share of an interpolated weight is a constant or held by a budget, and nothing else has a share."""
    loss, ess = config.loss, config.mix_control.ess
    is_mixed = isinstance(loss, PolicyGradientConfig) and loss.bias_mitigation == "interpolated"
    share = loss.mix_share if isinstance(loss, PolicyGradientConfig) else None
    if is_mixed and (share is None) == (ess is None):
        raise ValueError(
            f"loss.mix_share is {share} and mix_control.ess {ess}; bias_mitigation 'interpolated' needs one of them: a"
            " constant share, or the smallest effective sample size that the share may leave"
        )
    if not is_mixed and ess is not None:
        raise ValueError(
            f"mix_control.ess is {ess}, but only loss.bias_mitigation 'interpolated' has a share to choose"
        )


def bridge_files_are_of_the_start(config: Config) -> None:
    """The bridges of a file are of the model as it is before a warm start."""
    file, steps = config.nesting.bridge.file, config.warm_start.steps
    if file is not None and steps:
        raise ValueError(
            f"nesting.bridge.file is '{file}' and warm_start.steps {steps}: the warm start would change the model that"
            " the bridges were fitted to. Leave the file out, so that they are fitted after it, or set warm_start.steps"
            " 0"
        )


def remeasuring_fits_the_batch(config: Config) -> None:
    """Layers are measured on the step's own rollouts."""
    nesting = config.nesting
    # The sizes have defaults, and nothing reads them where layers are not measured again.
    if not nesting.remeasure_every and not (nesting.bridge.is_on and nesting.choice == "measured"):
        return
    for name, most, of in (
        ("remeasure_prompts", config.data.prompts_per_batch, "data.prompts_per_batch"),
        ("remeasure_completions", config.rollout.group_size, "rollout.group_size"),
    ):
        if getattr(config.nesting, name) > most:
            raise ValueError(
                f"nesting.{name} is {getattr(config.nesting, name)}; allowed is 1 to {of}, which is {most}"
            )


def baseline_needs_a_group(config: Config) -> None:
    """A baseline is made from the other completions of a prompt, for the loss as for the curriculum."""
    if config.rollout.group_size > 1:
        return
    if isinstance(config.loss, TrajectoryBalanceConfig):
        raise ValueError(
            "loss.kind is 'trajectory_balance' and rollout.group_size 1: the normaliser of a prompt is estimated from"
            " its completions, and with one (K = 1) the loss is always zero. Set group_size 2 or more"
        )
    advantages = {}
    if isinstance(config.loss, PolicyGradientConfig):
        advantages["loss.advantage"] = config.loss.advantage
    # The other curricula learn from no advantage.
    if config.curriculum.kind == "dump":
        advantages["curriculum.advantage"] = config.curriculum.advantage
    for name, advantage in advantages.items():
        if advantage not in ("no_baseline", "gae"):
            raise ValueError(
                f"{name} is '{advantage}' and rollout.group_size 1: a baseline from the other completions needs 2 or"
                " more. Raise the group size or use advantage 'no_baseline'"
            )


def one_normaliser_needs_one_start(config: Config) -> None:
    """Trajectory balance estimates log Z of a prompt and its prefix, from all completions of the group."""
    if isinstance(config.loss, TrajectoryBalanceConfig) and config.reset.is_on and config.reset.per == "completion":
        raise ValueError(
            "reset.per is 'completion', with loss.kind 'trajectory_balance': completions that start elsewhere have"
            " another normaliser. Set reset.per 'group'"
        )


def right_references_need_a_verifier(config: Config) -> None:
    """A reward model compares answers and calls none of them right."""
    reset, checkers = config.reset, [source.checker or config.reward.checker for source in config.data.sources]
    # Those of replay are scored as all completions are.
    if reset.is_on and reset.only_right and reset.references != "replay" and "model" in checkers:
        raise ValueError(
            f"reset.only_right is True, but the answers of source '{config.data.sources[checkers.index('model')].name}'"
            " have the checker 'model', which tells no right reference from a wrong one; set only_right False, or"
            " another checker"
        )


def own_references_need_a_store(config: Config) -> None:
    """The policy's past completions are those that are kept for replay."""
    if config.reset.is_on and config.reset.references == "replay" and not config.replay.is_on:
        raise ValueError(
            "reset.references is 'replay' and replay.capacity 0: no completions are kept that a rollout could start"
            " from. Set replay.capacity, or reset.references 'given' or 'answers'"
        )


def dynamic_sampling_needs_a_group(config: Config) -> None:
    """A group of one completion is never mixed."""
    if config.dynamic_sampling.filters_groups and config.rollout.group_size < 2:
        raise ValueError(
            f"dynamic_sampling.max_generation_batches is {config.dynamic_sampling.max_generation_batches} and"
            " rollout.group_size 1: no group of one has right and wrong completions. Raise the group size, or set"
            " max_generation_batches 1"
        )


def replay_needs_weights_for_old_completions(config: Config) -> None:
    """What is replayed was sampled by an earlier version."""
    if config.replay.is_on and make_objective(config.loss).needs(config.train.updates_per_batch).fresh_rollouts:
        raise ValueError(
            f"replay.capacity is {config.replay.capacity} and loss.bias_mitigation"
            f" '{getattr(config.loss, 'bias_mitigation', None)}', which takes the present policy for the one that"
            " sampled: use bias_mitigation 'base' or 'retrace', loss.kind 'trajectory_balance', or replay.capacity 0"
        )


def replay_holds_a_batch(config: Config) -> None:
    """What a step finds must fit, or the store would never hold all of it."""
    replay, batch = config.replay, config.data.prompts_per_batch * config.rollout.group_size
    if replay.is_on and replay.capacity < batch:
        raise ValueError(
            f"replay.capacity is {replay.capacity}; allowed is 0 (off) or at least the completions of a batch,"
            f" data.prompts_per_batch * rollout.group_size, which are {batch}"
        )
    longest = config.rollout.max_completion_tokens
    if replay.maximum_tokens is not None and replay.maximum_tokens >= longest:
        raise ValueError(
            f"replay.maximum_tokens is {replay.maximum_tokens}, which no completion exceeds; allowed is less than"
            f" rollout.max_completion_tokens, which is {longest}, or None"
        )


def staleness_limit_lets_new_batches_in(config: Config) -> None:
    """A batch that searchers ordered ahead has an age when it comes, and its step trains on it at once."""
    search, limit = config.search, config.replay.max_staleness
    age = (search.lag + search.sync_every - 1) * config.train.updates_per_batch
    if config.replay.is_on and limit is not None and limit < age:
        raise ValueError(
            f"replay.max_staleness is {limit}, but with search.lag {search.lag}, search.sync_every {search.sync_every}"
            f" and train.updates_per_batch {config.train.updates_per_batch} new batches are up to {age} versions old"
            f" when they come; allowed is {age} or more, or None"
        )


def safety_needs_a_store(config: Config) -> None:
    """It decides what is kept for replay, and nothing else."""
    if config.reward.safety is not None and not config.replay.is_on:
        raise ValueError(
            f"reward.safety is '{config.reward.safety}' and replay.capacity 0: it judges what is kept for replay. Set"
            " replay.capacity, or leave reward.safety out"
        )


def replay_chooses_alone(config: Config) -> None:
    """A store admits completions one by one, and not by their groups."""
    if config.replay.is_on and config.dynamic_sampling.filters_groups:
        raise ValueError(
            f"replay.capacity is {config.replay.capacity} and dynamic_sampling.max_generation_batches"
            f" {config.dynamic_sampling.max_generation_batches}: both decide what is trained on. Set"
            " max_generation_batches 1 or replay.capacity 0"
        )


def ratios_need_full_support(config: Config) -> None:
    """Truncated sampling draws from a renormalised distribution, and the update knows only the whole one."""
    sampling, loss, hold = config.rollout.sampling, config.loss, config.nesting_control.hold
    if not sampling.truncates:
        return
    how = f"rollout.sampling truncates (top_k {sampling.top_k}, top_p {sampling.top_p:g})"
    # `practical` compares two full distributions, and `one` none, so truncation does not distort their weights.
    if isinstance(loss, PolicyGradientConfig) and loss.reject_by is not None:
        raise ValueError(
            f"{how}, but loss.reject_by is '{loss.reject_by}': what it judges would be the mass that is kept as well as"
            " the mismatch. Set top_k 0 and top_p 1, or use no reject_by"
        )
    if isinstance(loss, PolicyGradientConfig) and loss.bias_mitigation not in ("one", "practical"):
        raise ValueError(
            f"{how}, but loss.bias_mitigation '{loss.bias_mitigation}' compares with the distribution that was drawn"
            " from: on-policy, its ratio would be the mass that is kept and not 1. Set top_k 0 and top_p 1, or use"
            " bias_mitigation 'practical' or 'one'"
        )
    if hold is not None:
        raise ValueError(
            f"{how}, but nesting_control.hold is '{hold}': the mass that truncation cuts off would count as divergence"
            " of the nested policy. Set top_k 0 and top_p 1, or use no nesting_control"
        )
    critic = loss.critic if isinstance(loss, PolicyGradientConfig) else None
    if critic is not None and critic.kl_target is not None:
        raise ValueError(
            f"{how}, but loss.critic.kl_target is {critic.kl_target}: the KL that it holds is weighed by pi_old / pi_b,"
            " which would be the mass that is kept as well. Set top_k 0 and top_p 1, or leave kl_target out"
        )


def static_weights_name_every_source(config: Config) -> None:
    """One weight for each source of the configuration."""
    config.curriculum.validate_for([source.name for source in config.data.sources])


def static_weights_need_undivided_sources(config: Config) -> None:
    """A weight is given to a source that is known beforehand."""
    if config.curriculum.kind == "static" and config.data.split.kind != "none":
        raise ValueError(
            f"curriculum.kind is 'static' and data.split.kind '{config.data.split.kind}'; how many parts need a"
            " weight is not known beforehand: use another kind, or 'none'"
        )


def stale_groups_need_their_own_weight(config: Config) -> None:
    """Two weights compare with the full model of the version that sampled, and the learner has the present one only."""
    search, loss = config.search, config.loss
    variant = loss.bias_mitigation if isinstance(loss, PolicyGradientConfig) else None
    if search.makes_stale and variant in ("practical", "mixture"):
        raise ValueError(
            f"loss.bias_mitigation is '{variant}', with search.lag {search.lag} and search.sync_every"
            f" {search.sync_every}: its weight needs groups of the present policy. Use 'base' or 'retrace', which read"
            " the log-probabilities that the groups bring along, or lag 0 and sync_every 1"
        )


def mixed_temperatures_need_the_densities_that_drew(config: Config) -> None:
    """What scores the samples anew does so at one temperature."""
    temperatures, loss = config.search.temperatures, config.loss
    variant = loss.bias_mitigation if isinstance(loss, PolicyGradientConfig) else None
    if temperatures and (config.rollout.mode == "exact" or variant in ("practical", "mixture")):
        what = "rollout.mode is 'exact'" if config.rollout.mode == "exact" else f"loss.bias_mitigation is '{variant}'"
        raise ValueError(
            f"search.temperatures is {temperatures}, but {what}, which knows rollout.sampling.temperature only: allowed"
            " is none, or mode 'nested' with bias_mitigation 'base' or 'retrace'"
        )


def depths_take_turns_alone(config: Config) -> None:
    """Where batches take turns in how deep they nest, nothing else may decide it."""
    nesting, hold = config.nesting, config.nesting_control.hold
    if config.search.skip_ratios and (nesting.choice == "fixed" or nesting.bridge.is_on or hold is not None):
        raise ValueError(
            f"search.skip_ratios is {config.search.skip_ratios}, with nesting.choice '{nesting.choice}',"
            f" nesting.bridge.kind '{nesting.bridge.kind}' and nesting_control.hold {hold!r}: allowed is a choice that"
            " draws layers, without bridges and without control"
        )


def bfloat16_weights_need_adapters(config: Config) -> None:
    """Small updates round away in bfloat16 weights."""
    if config.model.dtype == "bfloat16" and config.lora.rank == 0:
        raise ValueError(
            "model.dtype is 'bfloat16' and lora.rank 0: updates of the size of a learning rate round away in"
            " bfloat16 weights; train adapters (lora.rank 1 or more, which are float32), or set model.dtype float32"
        )


def offline_objectives_sample_nothing(config: Config) -> None:
    """What decides how rollouts are drawn or kept has nothing to decide."""
    if not isinstance(config.loss, OfflineConfig):
        return
    is_on = {
        "reset.share": config.reset.is_on,
        "replay.capacity": bool(config.replay.capacity),
        "dynamic_sampling": config.dynamic_sampling.filters_groups,
        "nesting_control.hold": config.nesting_control.hold is not None,
        "data.split.kind": config.data.split.kind != "none",
        "reward.model": bool(config.reward.model),
    }
    for name, value in is_on.items():
        if value:
            raise ValueError(
                f"loss.kind is '{config.loss.kind}', which samples nothing, and {name} is set; leave it out, or use"
                " `nested-reft sft`, `reward-model` or `dpo`, which do that"
            )


RULES: tuple[Callable[[Config], None], ...] = (
    name_is_a_directory_name,
    mini_batches_divide_prompts,
    micro_batches_divide_prompts,
    mesh_divides_batches,
    overlong_cache_fits_completions,
    mixture_weights_need_a_mixture,
    limits_can_act_on_a_mixture,
    exact_rollouts_leave_nothing_to_reject,
    exact_rollouts_need_no_control,
    mix_has_one_source,
    bridge_files_are_of_the_start,
    remeasuring_fits_the_batch,
    baseline_needs_a_group,
    one_normaliser_needs_one_start,
    right_references_need_a_verifier,
    own_references_need_a_store,
    dynamic_sampling_needs_a_group,
    replay_needs_weights_for_old_completions,
    replay_holds_a_batch,
    staleness_limit_lets_new_batches_in,
    safety_needs_a_store,
    replay_chooses_alone,
    ratios_need_full_support,
    static_weights_name_every_source,
    static_weights_need_undivided_sources,
    stale_groups_need_their_own_weight,
    mixed_temperatures_need_the_densities_that_drew,
    depths_take_turns_alone,
    bfloat16_weights_need_adapters,
    offline_objectives_sample_nothing,
)
"""Every rule; `Config` asks all of them when it is made."""


def bridges_can_be_fitted(config: Config) -> None:
    """A fit waits for its tokens, and until it comes the full model samples."""
    bridge, data, rollout = config.nesting.bridge, config.data, config.rollout
    # With the bridges of a file and no refits, nothing waits.
    if not bridge.is_on or (bridge.file is not None and not bridge.refit_every):
        return
    batch = data.prompts_per_batch * rollout.group_size * rollout.max_completion_tokens
    batches = config.train.steps * config.dynamic_sampling.max_generation_batches
    if bridge.tokens > batch * batches:
        lost = "nothing nested" if bridge.file is None else f"nesting.bridge.refit_every {bridge.refit_every} never act"
        raise ValueError(
            f"nesting.bridge.tokens is {bridge.tokens}, and train.steps {config.train.steps}: the run samples at most"
            f" {batch * batches} completion tokens, so no bridge would ever be fitted and {lost}; allowed are up to as"
            " many tokens, or more steps"
        )


def settings_of_nesting_are_read(config: Config) -> None:
    """What nothing reads would be believed to work."""
    nesting, control, rollout = config.nesting, config.nesting_control, config.rollout
    bridge = nesting.bridge
    if isinstance(config.loss, OfflineConfig):
        why = f"loss.kind is '{config.loss.kind}', which samples nothing"
        _refuse_unread("nesting.bridge", bridge, ("kind",), why)
        _refuse_unread("nesting", nesting, ("skip_ratio", "choice", "leave_out", "divergence_file"), why)
        return
    if not leaves_layers_out(config):
        why = "no layer is left out, since nesting.skip_ratio is 0 and there is no nesting_control"
        _refuse_unread("nesting.bridge", bridge, ("kind",), why)
        # How layers would be chosen may stay: a skip ratio of 0 makes the full model of any configuration.
        _refuse_unread("nesting", nesting, ("leave_out",), why)
    if nesting.choice != "measured":
        why = f"nesting.choice is '{nesting.choice}', and only 'measured' reads it"
        _refuse_unread("nesting", nesting, ("divergence_file",), why)
    if not (nesting.remeasure_every or (nesting.choice == "measured" and bridge.is_on)):
        unread = ("remeasure_prompts", "remeasure_completions")
        _refuse_unread("nesting", nesting, unread, "the run measures no layer")
    if not bridge.distil_steps:
        _refuse_unread("nesting.bridge", bridge, ("distil_learning_rate",), "nesting.bridge.distil_steps is 0")
    if control.hold is None:
        unread = tuple(entry.name for entry in dataclasses.fields(control))
        _refuse_unread("nesting_control", control, unread, "nesting_control.hold is None")
    elif control.max_skipped == 0:
        raise ValueError(
            f"nesting_control.max_skipped is 0 and nesting_control.hold '{control.hold}': there is nothing to control;"
            " allowed is 1 or more layers, or no nesting_control"
        )
    if rollout.mode != "exact":
        _refuse_unread("rollout", rollout, ("draft_length",), f"rollout.mode is '{rollout.mode}', which drafts nothing")


def rows_leave_some_waiting(config: Config) -> None:
    """Rows that no completion waits for would be believed to save memory."""
    rows, batch = config.rollout.rows, config.data.prompts_per_batch * config.rollout.group_size
    if rows and not refills(rows, batch) and not isinstance(config.loss, OfflineConfig):
        raise ValueError(
            f"rollout.rows is {rows}, and data.prompts_per_batch * rollout.group_size make {batch} completions, so none"
            f" would wait; allowed are 1 to {batch - 1}, or 0 to decode all at once"
        )
    evaluation = config.evaluation
    batch = evaluation.batch_size * max(evaluation.samples_per_prompt, 1)
    if evaluation.rows and not refills(evaluation.rows, batch):
        raise ValueError(
            f"evaluation.rows is {evaluation.rows}, and a batch of evaluation.batch_size"
            f" ({evaluation.batch_size}) prompts has {batch} completions at most, so none would wait; allowed are 1 to"
            f" {batch - 1}, or 0 to decode all at once"
        )


def leaves_layers_out(config: Config) -> bool:
    """Whether any plan of a run may leave layers out.

    Args:
        config: of the run.
    """
    nesting = config.nesting
    shares = (nesting.skip_ratio, *config.search.skip_ratios)
    return nesting.choice == "fixed" or any(shares) or bool(config.nesting_control.max_skipped)


def _refuse_unread(path: str, part: Any, names: Sequence[str], why: str) -> None:
    """Refuses those fields of a part that are not at their defaults.

    Raises:
        ValueError: names the fields, their values and the cause.
    """
    declared = {entry.name: entry.default for entry in dataclasses.fields(part)}
    unread = [
        f"{path}.{name} is {getattr(part, name)!r} (allowed is {declared[name]!r})"
        for name in names
        if getattr(part, name) != declared[name]
    ]
    if unread:
        raise ValueError(f"{', '.join(unread)}, but {why}")


START_RULES: tuple[Callable[[Config], None], ...] = (
    bridges_can_be_fitted,
    settings_of_nesting_are_read,
    rows_leave_some_waiting,
)
"""Rules for runs that begin. A run of an earlier version may break one, and it can still be read and continued."""


def check_start(config: Config) -> None:
    """Refuses a new run that would not do what its configuration says.

    Args:
        config: of the run.

    Raises:
        ValueError: a fit of bridges would never come, or nothing reads a setting.
    """
    for rule in START_RULES:
        rule(config)
