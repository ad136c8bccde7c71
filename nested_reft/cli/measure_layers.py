"""`nested-reft measure-layers`: how much leaving out each layer alone, or a part of it, changes the policy."""

from __future__ import annotations

import argparse

import jax
import numpy as np
from jaxtyping import Float

from nested_reft.bridge_fitting import add_bridges
from nested_reft.cli.arguments import command_parser, local_file, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.policy import setup_of
from nested_reft.data.pipeline import batch_prompts
from nested_reft.divergence import Texts, measure_layer_divergence, save_divergence, texts_of
from nested_reft.json_files import check_writable
from nested_reft.layer_plan import Part
from nested_reft.reports.tables import table
from nested_reft.sharding import to_host
from nested_reft.training.keys import RunKeys
from nested_reft.training.setup import Setup
from nested_reft.types import Rollouts, take

PARTS = {"layer": Part.SKIP, "bridge": Part.BRIDGE, "attention": Part.NO_ATTENTION, "mlp": Part.NO_MLP}


def run(arguments: list[str]) -> None:
    """Measures every layer on the full model's own completions, writes the file and prints the table."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_writable(known.out)
        if "bridge" in known.parts and known.prompts < 2:
            raise ValueError("--prompts is 1; bridges are fitted on one half of the prompts, so they need 2 or more")
        # Loading the model comes last, after all that can be refused without it.
        setup = setup_of(known.policy, known.config)
    config = setup.config
    rollouts = _full_rollouts(setup, known.prompts)
    with checking_input():
        measured = {part: _measured(setup, rollouts, part) for part in dict.fromkeys(known.parts)}
    about = {
        "policy": known.policy,
        "config": config.name,
        "prompts": rollouts.length_BG.shape[0],  # a source may have fewer than were asked for
        "tokens": int(rollouts.length_BG.sum()),
        "temperature": config.rollout.sampling.temperature,
        "unit": "nats per completion token, KL(full || full without the layer or part, or with its bridge)",
    }
    save_divergence(known.out, measured, about)
    # The cheapest layer of the first measurement comes first.
    order = np.argsort(next(iter(measured.values())))
    say(table(["layer", *measured], [[int(i), *(f"{values[i]:.3f}" for values in measured.values())] for i in order]))
    say(f"written: {known.out}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "measure-layers", "KL(full || full without the layer) per token, for each layer.", compiles=True
    )
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument("--prompts", type=whole(1, 10**6), default=16, help="training prompts of the first source")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["layer"],
        help="what to leave out: whole layers, attention or MLP alone; 'bridge' fits a bridge to each layer on one half"
        " of the prompts and measures on the other",
    )
    parser.add_argument("--out", type=local_file, required=True, help="JSON file for nesting.divergence_file")
    return parser


def _full_rollouts(setup: Setup, num_prompts: int) -> Rollouts:
    """One completion by the full model of each of the first training prompts."""
    examples = setup.data.train_examples[0][:num_prompts]
    prompts = batch_prompts(examples, [0] * len(examples), setup.data.prompt_size)
    return setup.policy.generate(prompts, None, RunKeys(jax.random.key(setup.config.train.seed)).measurement)


def _measured(setup: Setup, rollouts: Rollouts, part: str) -> Float[np.ndarray, " L"]:
    model, temperature = setup.policy.model, setup.config.rollout.sampling.temperature
    texts = texts_of(rollouts)
    if part == "bridge":
        # Texts that were fitted on would make the bridges look better than they are.
        half = rollouts.length_BG.shape[0] // 2
        _fit(setup, texts_of(rollouts, half))
        texts = texts_of(take(to_host(rollouts), range(half, rollouts.length_BG.shape[0])))
    return measure_layer_divergence(model, texts, temperature, PARTS[part])


def _fit(setup: Setup, texts: Texts) -> None:
    """Gives the model new bridges of the configuration's rank and ridge, each fitted alone."""
    model, bridge = setup.policy.model, setup.config.nesting.bridge
    tokens = int(to_host(texts[-1]).sum())
    what = f"one half of the prompts has {tokens} tokens of answers to fit bridges on"
    bridge.check_tokens(tokens, model.config.width, what, "raise --prompts")
    add_bridges(model, [texts], bridge.ridge, rank=bridge.rank)
