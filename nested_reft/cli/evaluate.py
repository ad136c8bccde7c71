"""`nested-reft eval`: held-out accuracy of a run or a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from nested_reft.api import evaluate_sources
from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json, local_file, number, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.policy import check_answers_prompts, is_run, plan_in_words, plan_of_options, setup_of
from nested_reft.json_files import naming
from nested_reft.losses.bradley_terry import BradleyTerryConfig
from nested_reft.losses.registry import OfflineConfig
from nested_reft.reports.tables import evaluation_table, reward_table
from nested_reft.rewards.reward import check_answers
from nested_reft.training.reward_facts import reward_facts

# What an evaluation reads; an override of anything else would be believed and do nothing.
READ = (
    "data",
    "rollout.sampling",
    "rollout.max_completion_tokens",
    "reward",
    "evaluation",
    "mesh",
    "model",
    "train.seed",
)
BENCHMARK_READ = (
    "data.prompt",
    "rollout.sampling",
    "rollout.max_completion_tokens",
    "reward",
    "evaluation.batch_size",
    "evaluation.rows",
    "mesh",
    "model",
    "train.seed",
)


def run(arguments: list[str]) -> None:
    """Evaluates every source's held-out prompts and prints the table."""
    known, overrides = _parser().parse_known_args(arguments)
    with checking_input():
        check_json(known.json)
        check_json(known.completions)
        _check_options(known)
        _check_read(overrides, READ if known.benchmark is None else BENCHMARK_READ)
        if not is_run(known.policy):  # a run that is a reward model has pairs of its own to order
            check_answers_prompts(known.policy)
    if known.benchmark is not None:
        from nested_reft.cli.benchmark import run_benchmarks

        run_benchmarks(known, overrides)
        return
    with checking_input():
        setup = setup_of(known.policy, known.config, overrides, known.prompts)
        plan = plan_of_options(known, setup.policy, setup.config.train.seed)
        if isinstance(setup.config.loss, BradleyTerryConfig):
            _check_reward_options(known)
        elif isinstance(setup.config.loss, OfflineConfig):
            # Training read no reward, so nothing has asked yet whether the answers can be checked.
            examples = [encoded.example for source in setup.data.heldout_examples for encoded in source]
            check_answers(examples, setup.config.reward)
    if isinstance(setup.config.loss, BradleyTerryConfig):
        facts = reward_facts(setup.policy, setup.data, setup.config)
        say(reward_table(facts))
        keep_json(known.json, facts)
        return
    if known.nested and plan is not None:
        say(f"{plan.shape.kept} of {setup.policy.num_layers} layers{plan_in_words(plan, setup.policy.num_layers)}")
    completions: list[dict[str, Any]] = []
    found = evaluate_sources(setup, plan, samples=True, completions=completions)
    results = {name: result.to_json() for name, result in found.items()}
    say(evaluation_table(results))
    keep_json(known.json, results)
    if known.completions is not None:
        # JSON escapes whatever the model wrote.
        with naming(known.completions):
            known.completions.write_text("".join(json.dumps(line) + "\n" for line in completions), encoding="utf-8")
        say(f"completions: {known.completions}")


def _check_reward_options(known: argparse.Namespace) -> None:
    """Refuses what a reward model has no use for.

    Args:
        known: the command's options.

    Raises:
        ValueError: layers or completions are asked for.
    """
    for name in ("skip_layers", "nested", "completions"):
        if getattr(known, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is given, but '{known.policy}' is a reward model, which answers nothing")


def _check_options(known: argparse.Namespace) -> None:
    """Refuses options that change nothing where they are given.

    Args:
        known: the command's options.

    Raises:
        ValueError: one of benchmarks without a benchmark, or the other way round.
    """
    if known.benchmark is not None:
        if known.completions is not None:
            raise ValueError("--completions is given with --benchmark; allowed is --records, which holds them too")
        return
    for name, default in (("k", 1), ("temperature", None), ("folder", None), ("records", None), ("wrong", 0)):
        if getattr(known, name) != default:
            raise ValueError(f"--{name} is given without --benchmark, which it is about")


def _check_read(overrides: list[str], read: Sequence[str]) -> None:
    for word in overrides:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and not any(option == part or option.startswith(f"{part}.") for part in read):
            raise ValueError(f"{word.partition('=')[0]} changes nothing that eval reads; allowed are {_listed(read)}")


def _listed(read: Sequence[str]) -> str:
    return f"its own options, and fields of {', '.join(read)}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval", "Greedy accuracy and pass@k on held-out prompts. Overrides follow as --FIELD VALUE.", compiles=True
    )
    parser.add_argument("policy", help="a run directory, or a model as in model.name")
    parser.add_argument("--config", help="the configuration whose prompts to use; a run has its own")
    parser.add_argument(
        "--skip-layers", type=whole(0), nargs="+", default=[], help="evaluate the nested model without them"
    )
    parser.add_argument(
        "--nested",
        action="store_true",
        help="evaluate a plan as the run draws them, with the bridges that it has fitted",
    )
    parser.add_argument("--prompts", type=whole(1), help="the most held-out prompts of each source")
    parser.add_argument(
        "--completions", type=local_file, metavar="FILE", help="also write every completion here, a line each"
    )
    add_json(parser, "the results")
    what = "answer all questions of gsm8k, svamp, math, math500, or a JSONL file"
    parser.add_argument("--benchmark", nargs="+", metavar="NAME", help=what)
    of_benchmarks = parser.add_argument_group("with --benchmark")
    of_benchmarks.add_argument("--k", type=whole(1, 1024), default=1, help="completions of each question; 1 by default")
    temperature = number("0 (greedy), or 0.001 to 1000", lambda value: value == 0 or 1e-3 <= value <= 1e3)
    what = "by default 0 for one completion, and rollout.sampling's for more"
    of_benchmarks.add_argument("--temperature", type=temperature, metavar="T", help=what)
    what = "has published files in folders of the benchmarks' names; by default they are downloaded"
    of_benchmarks.add_argument("--folder", help=what)
    of_benchmarks.add_argument(
        "--records", type=local_file, metavar="FILE", help="keep every question here; goes on from what the file holds"
    )
    of_benchmarks.add_argument("--wrong", type=whole(0), default=0, metavar="N", help="print the first N wrong answers")
    return parser
