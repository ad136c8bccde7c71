"""`nested-reft fit-bridges`: bridges of a model or a run, fitted on its own answers and kept in a file."""

from __future__ import annotations

import argparse

import jax
import numpy as np
from tqdm.auto import tqdm

from nested_reft.bridge_file import FittedBridges, model_in_words, save_bridges
from nested_reft.bridging import BridgeState
from nested_reft.cli.arguments import check_out, command_parser, local_file
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.policy import setup_of
from nested_reft.models.fingerprint import fingerprint
from nested_reft.sharding import to_host
from nested_reft.training.keys import RunKeys
from nested_reft.training.nested_policy import fit_and_measure
from nested_reft.training.run_state import RunState, initial_run_state
from nested_reft.training.setup import Setup
from nested_reft.types import Rollouts


def run(arguments: list[str]) -> None:
    """Samples with the full model, fits as a run would, and writes the file."""
    known, overrides = _parser().parse_known_args(arguments)
    with checking_input():
        check_out(known.out, ".safetensors")
        setup = setup_of(known.policy, known.config, overrides, plans=True)
        if not setup.config.nesting.bridge.is_on:
            raise ValueError(
                f"nesting.bridge.kind of '{setup.config.name}' is 'off'; give --nesting.bridge.kind per_layer, or"
                " per_run"
            )
    # The run below takes over the weights.
    weights, updates = fingerprint(setup.policy.model), setup.policy.version
    state, nesting = initial_run_state(setup), setup.config.nesting
    state.bridging = BridgeState()  # also where the configuration has bridges to begin with
    keys = RunKeys(jax.random.key(setup.config.train.seed))
    rollouts = _rollouts(setup, state, keys)
    renewed = fit_and_measure(state, 0, rollouts, keys.step(1).plan)
    num_layers = setup.policy.num_layers
    # Where plans change, each layer has a bridge that was fitted alone.
    plan = state.draw_plan(keys.step(1).plan) if nesting.is_deterministic else None
    fitted = FittedBridges(
        stack=state.learner.policy().model.stacked_bridges(),
        # Rounding may bring the divergence of a bridge that meets its layer below zero.
        divergence_L=np.zeros(num_layers) if renewed.divergence_L is None else np.maximum(renewed.divergence_L, 0),
        model=model_in_words(setup.config.model.name, setup.config.train.seed, updates),
        weights=weights,
        parts=None if plan is None else tuple(plan.host_parts(num_layers).tolist()),
    )
    save_bridges(known.out, fitted)
    which = "all layers" if plan is None else f"layers {list(plan.left_out(num_layers))}"
    say(f"bridges of {which}, fitted on {renewed.bridge_tokens} tokens in {renewed.bridge_seconds:.0f} s")
    say(f"written: {known.out}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "fit-bridges", "Fits the bridges of a configuration's nested policy and keeps them in a file.", compiles=True
    )
    parser.add_argument(
        "policy", help="a run directory, or a model as in model.name; overrides follow as --FIELD VALUE"
    )
    parser.add_argument("--config", help="the configuration whose prompts and nesting to use; a run has its own")
    parser.add_argument("--out", type=local_file, required=True, help="file for nesting.bridge.file")
    return parser


def _rollouts(setup: Setup, state: RunState, keys: RunKeys) -> list[Rollouts]:
    """Completions of the full model on training prompts, until there are as many tokens as a fit reads."""
    config, found = setup.config, list[Rollouts]()
    needed, tokens = config.nesting.bridge.tokens, 0
    sources = np.arange(config.data.prompts_per_batch, dtype=np.int32) % len(state.data.source_names)
    with tqdm(total=needed, unit="token", desc="sampling") as bar:
        while tokens < needed:
            key = jax.random.fold_in(keys.measurement, len(found))
            prompts = state.next_prompts(sources)
            rollout = config.rollout
            rollouts = to_host(
                setup.policy.generate(prompts, None, key, group_size=rollout.group_size, rows=rollout.rows)
            )
            found.append(rollouts)
            sampled = int(rollouts.length_BG.sum())
            tokens += sampled
            bar.update(sampled)
    return found
