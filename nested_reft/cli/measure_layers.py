"""`nested-reft measure-layers`: how much skipping each layer alone changes the policy, for measured plans."""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from nested_reft.cli.arguments import command_parser, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.policy import setup_of
from nested_reft.data.pipeline import batch_prompts
from nested_reft.divergence import measure_layer_divergence, save_divergence, texts_of
from nested_reft.json_files import check_writable
from nested_reft.reports.tables import table
from nested_reft.training.keys import RunKeys
from nested_reft.training.setup import Setup
from nested_reft.types import Rollouts


def run(arguments: list[str]) -> None:
    """Measures every layer on the full model's own completions, writes the file and prints the table."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_writable(known.out)
        # Loading the model comes last, after all that can be refused without it.
        setup = setup_of(known.policy, known.config)
    config = setup.config
    temperature = config.rollout.sampling.temperature
    rollouts = _full_rollouts(setup, known.prompts)
    divergence_L = measure_layer_divergence(setup.policy.model, texts_of(rollouts), temperature)
    about = {
        "policy": known.policy,
        "config": config.name,
        "prompts": rollouts.length_BG.shape[0],  # a source may have fewer than were asked for
        "tokens": int(rollouts.length_BG.sum()),
        "temperature": temperature,
        "unit": "nats per completion token, KL(full || full without the layer)",
    }
    save_divergence(known.out, divergence_L, about)
    # The cheapest layer to skip comes first.
    say(table(["layer", "divergence"], [[int(i), f"{divergence_L[i]:.3f}"] for i in np.argsort(divergence_L)]))
    say(f"written: {known.out}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "measure-layers", "KL(full || full without the layer) per token, for each layer.", compiles=True
    )
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument("--prompts", type=whole(1, 10**6), default=16, help="training prompts of the first source")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for nesting.divergence_file")
    return parser


def _full_rollouts(setup: Setup, num_prompts: int) -> Rollouts:
    """One completion by the full model of each of the first training prompts."""
    examples = setup.data.train_examples[0][:num_prompts]
    prompts = batch_prompts(examples, [0] * len(examples), setup.data.prompt_size)
    return setup.policy.generate(prompts, None, RunKeys(jax.random.key(setup.config.train.seed)).measurement)
