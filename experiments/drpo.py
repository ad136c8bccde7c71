"""DR-PO against PPO with a learned reward that can be over-optimised, at equal updates.

    python -m experiments.drpo                             # 5 seeds of five shares of resets, about half an hour
    python -m experiments.drpo --shares 0 0.5 --seeds 0 1

The task of `tiny_preferences`: numbers whose sevens a hidden rule, gold, counts. A reward model is trained on noisy
preferences, and PPO maximises it with a KL penalty. All runs of a seed share the reward model and the policy that they
start from, which has imitated the preferred answers; they take the same steps and draw as many completions. They differ
in `reset.share` alone: the probability that a rollout starts inside a preferred answer. 0 is PPO.

What is finished is kept as JSON in `--out` and not computed again, so the command can be stopped and repeated. It ends
with a table, a figure and, with `--json`, a file.

The measures: gold and learned reward, and KL to the start, of completions of held-out prompts from the bare prompt,
four for each. Resets act in training only. KL is the mean over completions of log pi - log pi_start, in nats. What gold
has lost is counted from the step at which the other seeds had the best mean, since the best step of a noisy curve is
partly luck. Intervals are 95 % percentile bootstraps over seeds (10,000 draws).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import add_json, add_list, add_runs, check_baseline, command, experiment_parser
from experiments.runs import EVERY, compile_once, runs_from_starts, wanted_run
from nested_reft.cli.arguments import keep_json, number, whole
from nested_reft.config_files import CONFIG_DIRECTORIES, load_module
from nested_reft.data.pipeline import batch_prompts
from nested_reft.evaluation import EvaluationConfig
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.reward_model import RewardModel
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sweeps.intervals import mean_over_seeds
from nested_reft.sweeps.kept import Result, Wanted, kept_runs
from nested_reft.training.config import MAX_STEPS, Config, load_config
from nested_reft.training.offline import as_offline
from nested_reft.training.record import StepRecord
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.trainer import Trainer
from nested_reft.training.warm_start import WarmStartConfig

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4  # of each held-out prompt
# With the 1e-3 of `tiny_preferences`, KL passes all levels of the table before the first measurement.
LEARNING_RATE = 2e-4
MEASURES = ("gold", "learned", "kl", "tokens")

Run = dict[str, Any]  # a row of MEASURES for each of its `steps`, with `share` and `seed`


def reward_config(seed: int, steps: int) -> Config:
    """The configuration of a seed's reward model.

    Args:
        seed: of parameters and order.
        steps: of its training.
    """
    config = as_offline(load_config("tiny_preferences"), "bradley_terry")
    return dataclasses.replace(
        config,
        name=f"drpo-reward-{seed}",
        train=dataclasses.replace(config.train, seed=seed, steps=steps),
        warm_start=WarmStartConfig(),
        evaluation=EvaluationConfig(every_steps=steps, samples_per_prompt=0),
    )


def experiment_config(share: float, seed: int, steps: int, reward_model: str) -> Config:
    """`tiny_preferences` with one share of resets, without the warm start, which all runs of a seed share.

    Args:
        share: beta of the resets.
        seed: of the run.
        steps: of the run.
        reward_model: the run directory of the seed's reward model.
    """
    config = load_config("tiny_preferences")
    return dataclasses.replace(
        config,
        name=f"drpo-{share:g}-{seed}",
        reset=dataclasses.replace(config.reset, share=share),
        reward=dataclasses.replace(config.reward, model=(reward_model,)),
        train=dataclasses.replace(config.train, seed=seed, steps=steps, checkpoint_every=steps),
        # What is measured is measured here.
        evaluation=EvaluationConfig(every_steps=steps, samples_per_prompt=0),
        warm_start=WarmStartConfig(),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=LEARNING_RATE),
    )


def reward_model(seed: int, steps: int, out: Path, only_kept: bool = False) -> str | None:
    """The run directory of a seed's reward model, trained where it is not kept.

    Args:
        seed: of the model.
        steps: of its training.
        out: where runs are kept.
        only_kept: train nothing; None stands for a model that is not kept.
    """

    def compute(each: Wanted) -> Result:
        config = each.config
        run = Trainer(prepare(config), RunDirectory.create(out / "runs", config.name, config.to_json()))
        return {"config": config.to_json(), "summary": run.open().run()}

    def told(result: Result) -> str:
        return f"held-out accuracy {result['summary']['after']['sevens']['accuracy']:.3f}"

    wanted = Wanted(reward_config(seed, steps), out / f"reward-seed{seed}-steps{steps}.json", {})
    (kept,) = kept_runs([wanted], compute, told, only_kept=only_kept)
    return None if kept is None else str(Path(kept["summary"]["run_directory"]).absolute())


def measured(policy: Policy, start: Policy, learned: RewardModel, setup: Setup) -> list[float]:
    """The measures of a policy, in the order of `MEASURES`; every call draws with the same key.

    Args:
        policy: what answers.
        start: what KL compares with.
        learned: the reward model.
        setup: its held-out prompts are asked.
    """
    # A prompt with several pairs is asked once.
    examples = list({encoded.text: encoded for encoded in setup.data.heldout_examples[0]}.values())
    prompts = batch_prompts(examples, [0] * len(examples), setup.data.prompt_size)
    key = jax.random.key(setup.config.train.seed)
    rollouts = jax.device_get(policy.generate(prompts, None, key, group_size=SAMPLES))
    texts = policy.tokenizer.decode_completions(rollouts.tokens_BGC, rollouts.length_BG)
    gold = np.mean([gold_rule()(text, {}) for group in texts for text in group])
    prompt_BP, length_B = jnp.asarray(prompts.tokens_BP), jnp.asarray(prompts.length_B)
    start_BGC = start.logprobs(prompt_BP, length_B, jnp.asarray(rollouts.tokens_BGC))
    ratio_BGC = rollouts.behavior_logprob_BGC - np.asarray(start_BGC)
    valid_BGC = np.arange(ratio_BGC.shape[-1]) < rollouts.length_BG[..., None]
    kl = np.where(valid_BGC, ratio_BGC, 0).sum(axis=-1).mean()
    learned_BG = learned.normalized(prompts, rollouts)
    return [float(value) for value in (gold, learned_BG.mean(), kl, rollouts.length_BG.mean())]


@cache
def gold_rule() -> Any:
    """The hidden rule of the task; its file is read once."""
    directory = next(each for each in CONFIG_DIRECTORIES if (each / "_tiny_preferences.py").is_file())
    return load_module(directory / "_tiny_preferences.py", "tiny_preferences_gold").gold


def measured_run(setup: Setup, out: Path) -> dict[str, Any]:
    """One run, measured each `EVERY` steps.

    Args:
        setup: the start and the data; its policy stays as it is.
        out: the run's directory is made in its folder `runs`.

    Returns:
        JSON-able values: `config`, `run_directory`, `steps`, the measures at each of them, `warning` of the run's
        summary, `seconds` and `versions`.
    """
    config, started = setup.config, time.monotonic()
    learned = RewardModel.load(config.reward.model[0])
    rows = [measured(setup.policy, setup.policy, learned, setup)]

    def after_step(found: StepRecord) -> None:
        if found.number % EVERY == 0:
            rows.append(measured(trainer.state.learner.policy(), setup.policy, learned, setup))

    trainer = Trainer(setup, RunDirectory.create(out / "runs", config.name, config.to_json()), after_step)
    summary = trainer.open().run()
    return {
        "config": config.to_json(),
        "run_directory": str(trainer.run_directory.path),
        "steps": list(range(0, config.train.steps + 1, EVERY)),
        **{name: list(column) for name, column in zip(MEASURES, zip(*rows, strict=True), strict=True)},
        "warning": summary["reward_hacking"]["warning"],
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }


def runs_of(
    shares: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    out: Path,
    reward_steps: int,
    warm_start: WarmStartConfig | None = None,
    only_kept: bool = False,
) -> list[Run]:
    """Every run that is asked for, computed where it is not kept.

    Args:
        shares: of resets.
        seeds: of the runs.
        steps: of each run.
        out: where results, reward models and shared starts are kept.
        reward_steps: of each reward model.
        warm_start: what the runs of a seed share; None takes that of `tiny_preferences`.
        only_kept: compute nothing.
    """
    warm_start = warm_start or load_config("tiny_preferences").warm_start
    models = {seed: reward_model(seed, reward_steps, out, only_kept) for seed in seeds}
    wanted = [
        wanted_run(experiment_config(share, seed, steps, model), out, f"share{share:g}", share=share)
        for seed, model in models.items()
        for share in shares
        # Without its reward model a run of the seed cannot be there.
        if model is not None
    ]
    return runs_from_starts(wanted, partial(measured_run, out=out), _told, warm_start, only_kept)


def _told(run: Run) -> str:
    return (
        f"{run['seconds']:.0f} s, gold {run['gold'][-1]:.3f}, learned {run['learned'][-1]:.3f}, KL {run['kl'][-1]:.2f}"
    )


def summarise(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each share at the last step, and beside the runs without resets of the same seeds.

    Args:
        runs: with one of share 0 for every seed.

    Returns:
        JSON-able results by share. Of each measure the values of all seeds, their mean and its interval; `gold_gain`
        over share 0; `gold_best`, gold at the best step that `_best_steps` names, and `gold_lost`, how far it fell
        since; `warned`, runs whose summary warned of hacking.
    """
    baseline = {run["seed"]: run["gold"][-1] for run in runs if run["share"] == 0}
    found = {}
    for share in dict.fromkeys(run["share"] for run in runs):
        own = [run for run in runs if run["share"] == share]
        columns = {name: [run[name][-1] for run in own] for name in MEASURES}
        columns["gold_start"] = [run["gold"][0] for run in own]
        columns["gold_best"] = [run["gold"][best] for run, best in zip(own, _best_steps(own), strict=True)]
        columns["gold_lost"] = [best - run["gold"][-1] for run, best in zip(own, columns["gold_best"], strict=True)]
        columns["gold_gain"] = [run["gold"][-1] - baseline[run["seed"]] for run in own]
        found[f"{share:g}"] = {
            "seeds": [run["seed"] for run in own],
            **{name: mean_over_seeds(values) for name, values in columns.items()},
            "warned": sum(run["warning"] is not None for run in own),
            "seconds_per_run": float(np.mean([run["seconds"] for run in own])),
        }
    return found


def _best_steps(runs: Sequence[Run]) -> list[int]:
    """For each run the measurement at which the other seeds have the best mean gold.

    A run's own best is partly the luck of that measurement, so gold would seem to fall since then even where it stays.
    """
    gold_SxM = np.array([run["gold"] for run in runs])
    others_SxM = gold_SxM.sum(axis=0) - gold_SxM if len(runs) > 1 else gold_SxM
    return others_SxM.argmax(axis=1).tolist()


def gold_at_kl(runs: Sequence[Run], kl: Sequence[float]) -> dict[str, list[dict[str, Any] | None]]:
    """Gold reward of each share where its runs first reach a KL, by interpolation between measurements.

    Args:
        runs: of all shares.
        kl: levels, in nats.

    Returns:
        By share, for each level, the values of all seeds, their mean and its interval; None where a run of the share
        never gets there.
    """

    def reached(run: Run, level: float) -> float | None:
        for before, after in zip(range(len(run["kl"]) - 1), range(1, len(run["kl"])), strict=True):
            low, high = run["kl"][before], run["kl"][after]
            if low <= level < high:
                part = (level - low) / (high - low)
                return run["gold"][before] + part * (run["gold"][after] - run["gold"][before])
        return None

    found: dict[str, list[dict[str, Any] | None]] = {}
    for share in dict.fromkeys(run["share"] for run in runs):
        own = [run for run in runs if run["share"] == share]
        values = [[gold for run in own if (gold := reached(run, level)) is not None] for level in kl]
        # A mean over the runs that get there alone would be of other seeds at each level.
        found[f"{share:g}"] = [mean_over_seeds(each) if len(each) == len(own) else None for each in values]
    return found


def _cell(each: dict[str, Any] | None) -> str:
    """A mean and its interval as text."""
    return "-" if each is None else "{:.3f} ({:.3f}..{:.3f})".format(each["mean"], *each["interval"])


def summary_table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text.

    Args:
        summary: of `summarise`.
    """
    names = ("gold_start", "gold", "gold_gain", "gold_best", "gold_lost", "learned", "kl", "tokens")
    titles = ("gold before", "gold after", "over PPO", "best gold", "lost since", "learned", "KL", "tokens")
    rows = [
        [
            share,
            len(one["seeds"]),
            *(_cell(one[name]) for name in names),
            one["warned"],
            f"{one['seconds_per_run']:.0f}",
        ]
        for share, one in summary.items()
    ]
    return table(["reset share", "seeds", *titles, "warned", "s/run"], rows)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Gold and learned reward over steps, and gold reward over KL; means of seeds, each seed thin.

    Args:
        runs: of all shares.
        path: the PNG file.
    """
    figure = figure_maker()(figsize=(14, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, share in enumerate(dict.fromkeys(run["share"] for run in runs)):
        own = [run for run in runs if run["share"] == share]
        means = {name: np.mean([run[name] for run in own], axis=0) for name in MEASURES}
        label = "PPO" if share == 0 else f"DR-PO, {share:g}"
        for axis, x, y in ((axes[0], "steps", "gold"), (axes[1], "steps", "learned"), (axes[2], "kl", "gold")):
            for run in own:
                axis.plot(run[x], run[y], color=f"C{index}", alpha=0.2, linewidth=1)
            axis.plot(own[0]["steps"] if x == "steps" else means[x], means[y], color=f"C{index}", lw=2.5, label=label)
    for axis, x, y in zip(axes, ("step", "step", "KL to the start (nats)"), ("gold", "learned", "gold"), strict=True):
        axis.set(xlabel=x, ylabel=f"{y} reward from the bare prompt")
        axis.grid(alpha=0.3)
    axes[0].legend(title="share of resets")
    figure.suptitle("A reward model that can be over-optimised")
    figure.savefig(path, dpi=100)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the table and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("drpo", __doc__)
    share = number("0 to 1", lambda value: 0 <= value <= 1)
    add_list(parser, "--shares", SHARES, type=share, help="0 to 1; 0 has to be there")
    add_runs(parser, "experiment-drpo", steps=120, least=EVERY, multiple=EVERY)
    parser.add_argument("--reward-steps", type=whole(1, MAX_STEPS), default=100, help="of each reward model")
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    check_baseline("--shares", known.shares, 0)
    compile_once(known.out)
    runs = runs_of(known.shares, known.seeds, known.steps, known.out, known.reward_steps)
    summary, levels = summarise(runs), [0.5, 1.0, 2.0, 4.0, 8.0]
    print(summary_table(summary))
    at_kl = gold_at_kl(runs, levels)
    cells = [[share, *map(_cell, values)] for share, values in at_kl.items()]
    print(table(["gold at KL (nats) of", *(f"{level:g}" for level in levels)], cells))
    draw(runs, known.out / "drpo.png")
    facts = {"steps": known.steps, "versions": versions(), "shares": summary}
    keep_json(known.json, facts | {"gold_at_kl": {"levels": levels, "shares": at_kl}})
    print(f"written: {known.out / 'drpo.png'}")


if __name__ == "__main__":
    sys.exit(main())
