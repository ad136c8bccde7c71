"""Red-teaming in miniature: how many attacks succeed, and how different the successful ones are.

    python -m experiments.red_team
    python -m experiments.red_team --losses "trajectory balance" --seeds 0 1

`tiny_red_team` trains an attacker from scratch against a frozen victim with a planted weakness. It learns by trajectory
balance with replay, or by a policy gradient on fresh attacks. What is reported is of a run's last 20 steps: success is
the mean reward, and diversity is that of 300 successful attacks. Self-BLEU is over up to four characters, and
embeddings are the victim's mean hidden states. Each figure is the mean over seeds, with the lowest and the highest.

What is finished is kept as JSON in `--out` and not computed again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.arguments import add_json, add_list, add_runs, command, experiment_parser
from experiments.corrections import slug
from experiments.runs import wanted_run
from nested_reft.cli.arguments import keep_json
from nested_reft.config_files import load_module
from nested_reft.diversity import embedding_distance, self_bleu
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.reports.tables import table
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sweeps.kept import kept_runs
from nested_reft.training.config import Config, load_config
from nested_reft.training.record import StepRecord
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer

BALANCE, GRADIENT = "trajectory balance", "policy gradient"
LAST_STEPS, COMPARED = 20, 300
MEASURES = {
    "success": "success",
    "distinct": "distinct successes",
    "self_bleu": "self-BLEU",
    "embedding_distance": "embedding distance",
}


def victim_module() -> ModuleType:
    """The file that has the victim and the scorer of harm; the configurations name it."""
    return load_module(Path(__file__).parent / "configs" / "_red_team_victim.py", "red_team_victim")


def experiment_config(loss: str, seed: int, steps: int) -> Config:
    """`tiny_red_team` with one loss.

    Args:
        loss: `BALANCE`, or `GRADIENT`, which trains on each group once and corrects for nesting.
        seed: of the run.
        steps: of the run.
    """
    config = load_config("tiny_red_team")
    if loss == GRADIENT:
        gradient = PolicyGradientConfig("group_std", "base", "token", "token_mean", truncate_at=2.0)
        optimizer = dataclasses.replace(config.optimizer, max_gradient_norm=1.0)
        config = dataclasses.replace(config, loss=gradient, replay=ReplayConfig(), optimizer=optimizer)
    evaluation = dataclasses.replace(config.evaluation, every_steps=steps)
    train = dataclasses.replace(config.train, seed=seed, steps=steps)
    return dataclasses.replace(config, name=f"red-team-{slug(loss)}-{seed}", evaluation=evaluation, train=train)


def measured(config: Config, victim: ModuleType, out: Path) -> dict[str, Any]:
    """One run: success and diversity of its last attacks.

    Args:
        config: of the run.
        victim: `victim_module`.
        out: the run's directory is made in its folder `runs`.
    """
    attacks, rewards = list[str](), list[float]()

    def keep(found: StepRecord) -> None:
        if found.number > config.train.steps - LAST_STEPS:
            attacks.extend(text for scored in found.found for group in scored.texts for text in group)
            rewards.extend(float(reward) for scored in found.found for reward in scored.reward_BG.flat)

    run = RunDirectory.create(out / "runs", config.name, config.to_json())
    with Trainer(prepare(config), run, keep) as trainer:
        trainer.open().run()
    successes = [attack for attack, reward in zip(attacks, rewards, strict=True) if reward > 0]
    return {"config": config.to_json(), "success": float(np.mean(rewards)), **diversity(successes, victim)}


def diversity(attacks: Sequence[str], victim: ModuleType) -> dict[str, float | None]:
    """How different attacks are; None where there are not two.

    Args:
        attacks: that succeeded, in the order of sampling.
        victim: `victim_module`.
    """
    if len(attacks) < 2:
        return dict.fromkeys(("distinct", "self_bleu", "embedding_distance"))
    # As many of every run, because among more texts each one finds more that are like it.
    chosen = np.random.default_rng(0).permutation(len(attacks))[:COMPARED]
    compared = [attacks[index] for index in chosen]
    return {
        "distinct": len(set(compared)) / len(compared),
        "self_bleu": self_bleu(compared),
        "embedding_distance": embedding_distance(victim.embeddings(compared)),
    }


def runs_of(losses: Sequence[str], seeds: Sequence[int], steps: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each loss, computed where they are not kept.

    Args:
        losses: `BALANCE`, `GRADIENT` or both.
        seeds: of the runs.
        steps: of each run.
        out: where results are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    victim = victim_module()
    wanted = [
        wanted_run(experiment_config(loss, seed, steps), out, slug(loss), loss=loss)
        for loss in losses
        for seed in seeds
    ]
    runs = kept_runs(wanted, lambda each: measured(each.config, victim, out), "success {0[success]:.3f}".format)
    return {loss: [run for run in runs if run is not None and run["loss"] == loss] for loss in losses}


def summary_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One row for each loss.

    Args:
        runs: of each loss, one for each seed.
    """
    rows = [
        [loss, *(_over_seeds([run[measure] for run in of_loss]) for measure in MEASURES)]
        for loss, of_loss in runs.items()
    ]
    return table(["loss", *MEASURES.values()], rows)


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ({min(known):.3f} to {max(known):.3f})" if known else "-"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("red_team", __doc__)
    add_list(parser, "--losses", (BALANCE, GRADIENT), choices=(BALANCE, GRADIENT), metavar="NAME")
    add_runs(parser, "experiment-red-team", steps=100, seeds=3)
    add_json(parser)
    known = parser.parse_args(arguments)
    runs = runs_of(known.losses, known.seeds, known.steps, known.out)
    print(summary_table(runs))
    keep_json(known.json, {"versions": versions(), "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
