"""Keeping the nested policy up to date: how deep it nests, its bridges, what is known of its layers, its weight."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Float

from nested_reft import bridging, mix_control, nesting_control
from nested_reft.divergence import measure_layer_divergence, texts_of
from nested_reft.estimators.health import Health
from nested_reft.layer_plan import left_out
from nested_reft.training.run_state import RunState
from nested_reft.types import Rollouts, Scored


@dataclass(frozen=True)
class Renewed:
    """What a step renewed.

    Attributes:
        bridge_tokens: completion tokens that bridges were fitted on; None where they were not.
        bridge_seconds: time of the fit.
        divergence_L: new divergences of the layers, in nats per token; None where they were not measured.
        measuring_seconds: time of the measurement.
    """

    bridge_tokens: int | None
    bridge_seconds: float
    divergence_L: Float[np.ndarray, " L"] | None
    measuring_seconds: float


def renew(
    state: RunState, number: int, found: Sequence[Scored], health: Health | None, next_plan_key: jax.Array
) -> Renewed:
    """What follows a step for the nested policy, before the plan of the next step is drawn.

    Args:
        state: of the run; its nesting control, share of the mixed weight, bridges, texts and divergences change.
        number: of the step, counted from 0.
        found: everything that the step generated.
        health: how far off-policy the step's rollouts were.
        next_plan_key: key of the next step's plan.
    """
    num_skipped = state.nesting.num_skipped
    # Until there are bridges the full model samples, which says nothing about how deep to nest.
    if state.nests:
        depth = _depth_health(state.nesting.num_skipped, found) if state.config.measures_mismatch else health
        state.nesting = nesting_control.update(state.nesting, state.config.nesting_control, depth)
    # Whatever made the rollouts differ from the target, the next batch's share answers to it.
    level = "token" if getattr(state.config.loss, "level", "token") == "token" else "sequence"
    mixed = health if _has_depth(state, num_skipped, found) else None
    state.mix = mix_control.update(state.mix, state.config.mix_control, level, mixed)
    if state.nesting.num_skipped != num_skipped:
        state.mix = mix_control.at_another_depth(state.mix)
    return fit_and_measure(state, number, [scored.rollouts for scored in found], next_plan_key)


def _has_depth(state: RunState, num_skipped: int, found: Sequence[Scored]) -> bool:
    """Whether all batches are of the present depth, where the run itself changes it."""
    config = state.config
    if config.nesting_control.hold is None and not config.nesting.bridge.is_on:
        return True
    # Until bridges are fitted batches leave out nothing. Others were ordered before the depth changed.
    return all(len(left_out(np.asarray(scored.rollouts.part_BGL[0, 0]))) == num_skipped for scored in found)


def _depth_health(num_skipped: int, found: Sequence[Scored]) -> Health | None:
    """What samples of the present depth say of it, at the version that drew them; None where there are none.

    The ratios of an update also tell of the samples' age, which no depth would cure. Batches that were ordered before
    the depth changed say nothing about the present one.
    """
    for scored in found:
        mismatch = None if scored.stats is None else scored.stats.mismatch
        if mismatch is not None and len(left_out(np.asarray(scored.rollouts.part_BGL[0, 0]))) == num_skipped:
            # A batch without a token that counts has zeros for all that it measured.
            return Health(**mismatch) if mismatch["ess_token"] > 0 else None
    return None


def fit_and_measure(state: RunState, number: int, found: Sequence[Rollouts], next_plan_key: jax.Array) -> Renewed:
    """Fits the bridges and measures the layers where it is time.

    Args:
        state: of the run; its bridges, texts and divergences change.
        number: of the step, counted from 0.
        found: what was sampled, at least one batch.
        next_plan_key: key of the next step's plan.
    """
    config = state.config.nesting
    state.bridging = bridging.add(state.bridging, config.bridge, found)
    fits = bridging.is_due(state.bridging, config.bridge, number)
    texts, tokens = state.bridging.texts, state.bridging.tokens
    fit = partial(
        state.learner.fit_bridges,
        texts,
        config.bridge,
        shared_prefix=state.data.shared_prefix,
        compute_dtype=state.config.train.compute_dtype,
    )
    started = time.monotonic()
    if fits:
        state.bridging = bridging.fitted(state.bridging, config.bridge, number)
    if fits and config.choice != "fixed":
        # Each layer's alone: whatever plan is drawn has bridges, and layers can be measured one by one.
        fit(None)
    fitted = time.monotonic()
    measures = fits and config.choice == "measured"
    measures |= bool(config.remeasure_every) and number % config.remeasure_every == 0
    if measures:
        # The first batch is measured, because every step has one.
        sample = texts_of(found[0], config.remeasure_prompts, config.remeasure_completions)
        policy = state.learner.policy()
        state.divergence_L = measure_layer_divergence(policy.model, sample, policy.sampling.temperature, config.part)
    measured = time.monotonic()
    if fits and config.is_deterministic:
        fit(state.draw_plan(next_plan_key))
    if fits and config.bridge.distil_steps:
        # Plans that change are taught as they are drawn.
        draws = [jax.random.fold_in(next_plan_key, step) for step in range(config.bridge.distil_steps)]
        state.learner.distil_bridges(texts, config.bridge, [state.draw_plan(key) for key in draws])
    return Renewed(
        bridge_tokens=tokens if fits else None,
        bridge_seconds=fitted - started + time.monotonic() - measured,
        divergence_L=state.divergence_L if measures else None,
        measuring_seconds=measured - fitted,
    )
