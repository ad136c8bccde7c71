"""`nested-reft sample`: full and nested completions of one prompt, one under the other."""

from __future__ import annotations

import argparse
import math

import jax

from nested_reft.cli.arguments import check_seed, command_parser
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.policy import plan_without
from nested_reft.layer_skip import LayerPlan, NestingConfig, draw_plan
from nested_reft.rollout.policy import DEFAULT_MAX_TOKENS, Policy
from nested_reft.untrusted import printable


def run(arguments: list[str]) -> None:
    """Prints the completions of the full model and of a nested one."""
    known = _parser().parse_args(arguments)
    with checking_input():
        # What can be refused without the model is refused before it is loaded.
        _check_ranges(known)
        policy = Policy.load(known.policy)
        nested = _nested_plan(known, policy.num_layers)
        max_tokens = _max_tokens(known.max_tokens, policy, known.prompt)
    # Both draw with one seed, so that only the layers differ.
    for label, plan in (("full", LayerPlan.full(policy.num_layers)), ("nested", nested)):
        (completions,) = policy.sample(known.prompt, plan, known.samples, known.temperature, max_tokens, known.seed)
        skipped = f", without layers {list(plan.skipped(policy.num_layers))}" if label == "nested" else ""
        print(f"{label} ({plan.num_kept} of {policy.num_layers} layers{skipped})")
        for completion in completions:
            # The text is untrusted: a model may write control characters of the terminal.
            print(f"  {printable(completion.text)}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sample", "Completions of one prompt by the full model and by a nested one.")
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("prompt", help="what the user says")
    parser.add_argument("--skip-ratio", type=float, default=0.2, help="share of layers skipped, drawn uniformly")
    parser.add_argument("--skip-layers", type=int, nargs="+", default=[], help="skip these layers instead")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the run's own, 1 for a model")
    parser.add_argument("--max-tokens", type=int, help="default: 64, or the room that the prompt leaves")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _check_ranges(known: argparse.Namespace) -> None:
    """Refuses numbers that cannot work before the model is loaded, in the words of the options."""
    check_seed(known.seed)
    for flag, value in (("--max-tokens", known.max_tokens), ("--samples", known.samples)):
        if value is not None and not 1 <= value < 2**31:
            raise ValueError(f"{flag} is {value}; allowed is 1 to {2**31 - 1}")
    if not 0 <= known.skip_ratio < 1:
        raise ValueError(f"--skip-ratio is {known.skip_ratio}; allowed is 0 or more and less than 1")
    if known.temperature is not None and not 0 <= known.temperature < math.inf:
        raise ValueError(f"--temperature is {known.temperature}; allowed is 0 (greedy) or more")


def _nested_plan(known: argparse.Namespace, num_layers: int) -> LayerPlan:
    """The layers that `--skip-layers` leaves, or a draw of as many as `--skip-ratio` says."""
    nesting = NestingConfig(skip_ratio=known.skip_ratio)
    nesting.validate_for(num_layers)
    named = plan_without(num_layers, known.skip_layers)
    return named or draw_plan(jax.random.key(known.seed), nesting, num_layers)


def _max_tokens(asked: int | None, policy: Policy, prompt: str) -> int:
    """The longest completion: what was asked, or the default cut to the room that the prompt leaves."""
    prompt_tokens, positions = policy.prompt_tokens(prompt), policy.model.config.max_positions
    # At least 1, so that a prompt that fills the model is refused below and not asked for 0 tokens.
    room = max(positions - prompt_tokens, 1)
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if asked is None else asked
    if not prompt_tokens or prompt_tokens + max_tokens > positions:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and --max-tokens is {max_tokens};"
            f" allowed are 1 to {positions} in all"
        )
    return max_tokens
