"""`nested-reft sample`: full and nested completions of one prompt, one under the other."""

from __future__ import annotations

import argparse
import dataclasses

import jax

from nested_reft.cli.arguments import command_parser, number, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.policy import check_answers_prompts, plan_in_words, plan_without
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.rollout.policy import DEFAULT_MAX_TOKENS, Policy
from nested_reft.rollout.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE
from nested_reft.sharding import mesh_bytes
from nested_reft.untrusted import printable


def run(arguments: list[str]) -> None:
    """Prints the completions of the full model and of a nested one."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_answers_prompts(known.policy)
        policy = Policy.load(known.policy)
        if known.chat is not None:
            policy = dataclasses.replace(policy, prompt=policy.prompt.with_chat(known.chat))
        elif policy.prompt.chat and policy.tokenizer.chat_template is None:
            raise ValueError(f"'{known.policy}' has no chat template, as base models have none; give --no-chat")
        plans = {"full": LayerPlan.full(policy.num_layers)}
        nested = _nested_plan(known, policy)
        if nested.shape.kept < policy.num_layers:
            plans["nested"] = nested
        max_tokens = _max_tokens(known.max_tokens, policy, known.prompt)
        _check_samples(known.samples, max_tokens, policy, known.prompt)
    # All draw with one seed, so that only the layers differ.
    for label, plan in plans.items():
        (completions,) = policy.sample(known.prompt, plan, known.samples, known.temperature, max_tokens, known.seed)
        say(f"{label} ({plan.shape.kept} of {policy.num_layers} layers{plan_in_words(plan, policy.num_layers)})")
        for completion in completions:
            # A completion stays one line, whatever the model wrote.
            say(f"  {printable(completion.text)}")
    if "nested" not in plans:
        unfitted = policy.plans is not None and not policy.plans.nests
        why = "has not fitted its bridges yet" if unfitted else "skips no layers"
        say(f"the run {why}; to see a nested model, give --skip-ratio or --skip-layers")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sample", "Completions of one prompt by the full model and by a nested one.", compiles=True)
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("prompt", help="what the user says")
    parser.add_argument(
        "--skip-ratio",
        type=number("0 or more and less than 1", lambda value: 0 <= value < 1),
        help="share of layers skipped, drawn uniformly; default: as the run draws them, one layer for a model",
    )
    parser.add_argument("--skip-layers", type=whole(0), nargs="+", default=[], help="skip these layers instead")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the chat template, or give the prompt as it is (base models); default: as the run does, --chat",
    )
    parser.add_argument(
        "--temperature",
        type=number(
            f"0 (greedy), or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            lambda value: value == 0 or MIN_TEMPERATURE <= value <= MAX_TEMPERATURE,
        ),
        help="0 is greedy; default: the run's own, 1 for a model",
    )
    parser.add_argument("--max-tokens", type=whole(1), help="default: 64, or the room that the prompt leaves")
    parser.add_argument("--samples", type=whole(1), default=2)
    parser.add_argument("--seed", type=whole(0), default=0)
    return parser


def _nested_plan(known: argparse.Namespace, policy: Policy) -> LayerPlan:
    """The layers that the options leave; without any, those that the run would draw, or all but one of a model."""
    num_layers, key = policy.num_layers, jax.random.key(known.seed)
    if known.skip_layers:
        return plan_without(num_layers, known.skip_layers) or LayerPlan.full(num_layers)
    if known.skip_ratio is not None:
        nesting = NestingConfig(skip_ratio=known.skip_ratio)
        count, most = nesting.num_skipped(num_layers), nesting.most_skipped(num_layers)
        if count > most or (known.skip_ratio and not count):
            raise ValueError(
                f"--skip-ratio is {known.skip_ratio:g}, which of {num_layers} layers is {count}; allowed is to skip 0"
                f" to {most}, so the first and the last one stay"
            )
        return draw_plan(key, nesting, num_layers)
    if policy.plans is not None:
        return policy.plans.draw(key)
    nesting = NestingConfig()
    return draw_plan(key, nesting, num_layers, num_skipped=min(1, nesting.most_skipped(num_layers)))


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


def _check_samples(samples: int, max_tokens: int, policy: Policy, prompt: str) -> None:
    """Refuses more samples than the devices could hold the keys and values of."""
    model = policy.model.config
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_size * 4  # keys and values in float32
    most = int(mesh_bytes(policy.mesh) // (token_bytes * (policy.prompt_tokens(prompt) + max_tokens)))
    if samples > most:
        raise ValueError(
            f"--samples is {samples}; allowed is 1 to {most}: the devices hold no more keys and values of as many"
            " completions"
        )
