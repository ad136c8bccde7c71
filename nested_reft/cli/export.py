"""`nested-reft export`: a run's trained model as a directory that `transformers` loads."""

from __future__ import annotations

import argparse
import shutil

from nested_reft.checkpoints import check_directory
from nested_reft.cli.arguments import command_parser, local_file
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.reward_model import FACTS, read_facts
from nested_reft.rollout.policy import Policy
from nested_reft.run_mirror import local_run
from nested_reft.training.setup import run_config


def run(arguments: list[str]) -> None:
    """Writes the directory."""
    known = _parser().parse_args(arguments)
    with checking_input():
        # Nothing is written over: another model in that directory would be mixed with this one.
        if known.directory.exists():
            raise ValueError(f"'{known.directory}' exists already; give a new directory")
        run = local_run(known.run)
        check_directory(run / "checkpoints")
        if not (run / "checkpoints").exists():
            raise ValueError(f"'{known.run}' is not a run directory: it has no checkpoints")
        # A reward model has no meaning without what normalises its rewards.
        facts = run / FACTS
        is_reward_model = run_config(run).loss.kind == "bradley_terry"
        if is_reward_model and not facts.is_file():
            raise ValueError(f"'{known.run}' is a reward model and has no {FACTS} yet; train it to its end first")
        if is_reward_model:
            read_facts(str(run))
        policy = Policy.load(run)
        save_huggingface(policy.model, known.directory, policy.tokenizer, scores=is_reward_model)
        if is_reward_model:
            shutil.copyfile(facts, known.directory / FACTS)
    say(f"written: {known.directory}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("export", "Writes a directory that transformers loads; adapters are merged.")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("directory", type=local_file, help="a directory that does not exist yet")
    return parser
