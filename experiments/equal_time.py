"""Accuracy against seconds and against tokens: nested rollouts beside full ones, from one start per seed.

    python -m experiments.equal_time tiny
    python -m experiments.equal_time smollm2_long --variants full bridged bridged_bfloat16

All runs of a seed start from the same weights. What is finished is kept as JSON in `--out` and not computed again, so
the command can be stopped and repeated. It ends with tables and a figure; `equal_time_summary` says how they are made.

Seconds are those of training steps: rollouts, scoring, update and the fits of bridges. Evaluation does not count, and
neither does the time in which JAX traces and compiles, because a long run pays it once.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from experiments.arguments import add_json, add_list, add_runs, check_baseline, check_folder, command, experiment_parser
from experiments.equal_time_summary import draw, summarise, tables
from experiments.runs import compile_once, runs_from_starts, wanted_run
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.arguments import keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.compilation import listen, stop_listening
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.sources import TaskSource, exactly
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training import record
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config, load_config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.searcher import Searcher
from nested_reft.training.setup import Setup
from nested_reft.training.trainer import Trainer
from nested_reft.training.warm_start import WarmStartConfig
from nested_reft.types import Prompts, Scored

DIGITS = 128  # of the numbers of `tiny_long`
KEPT_METRICS = (
    "ess_token",
    "kl_behavior_target",
    "plan_price",
    "bridge_seconds",
    "draft_acceptance",
    "staleness_mean",
)


@dataclass(frozen=True)
class Task:
    """What is learnt, and which layers the variants leave out.

    Attributes:
        base: the run without nesting; its warm start makes the shared start of a seed. Curves are of sampled accuracy
            where its evaluation draws samples, else of greedy accuracy.
        plain: the layers that are skipped without a stand-in.
        bridged: the layers that bridges stand in for, fitted once.
        refit_every: steps between the fits of `bridged_refit`.
    """

    base: Config
    plain: NestingConfig
    bridged: NestingConfig
    refit_every: int


def tiny() -> Task:
    """The shipped `tiny`: repeat a number of 3 to 6 digits, at most 8 tokens."""
    return Task(
        base=_base("tiny", steps=100, every_steps=5, samples=4),
        plain=NestingConfig(skip_ratio=0.2),
        bridged=_cheapest(0.34, tokens=2048),
        refit_every=20,
    )


def tiny_long() -> Task:
    """The model of `tiny` with more positions: repeat a number of 128 digits, 129 tokens with its end."""
    base = _base("tiny", steps=48, every_steps=6, samples=2)
    source, shape = base.data.sources[0], base.model.shape
    assert isinstance(source, TaskSource) and shape is not None
    parameters = exactly(terms=1, digits=DIGITS)
    source = dataclasses.replace(source, name="many_digits", parameters=parameters, heldout_size=64)
    return Task(
        base=dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, shape=dataclasses.replace(shape, max_positions=2 * DIGITS + 4)),
            data=dataclasses.replace(base.data, sources=(source,), prompts_per_batch=4, max_prompt_tokens=DIGITS + 2),
            rollout=dataclasses.replace(base.rollout, max_completion_tokens=DIGITS + 2),
            # The checker `exact` reads numbers of at most 64 characters.
            reward=RewardConfig(checker="task"),
            warm_start=WarmStartConfig(steps=300, batch_size=16, learning_rate=3e-3, layer_dropout=0.4),
        ),
        plain=NestingConfig(skip_ratio=0.2),
        bridged=_cheapest(0.34, tokens=8192),
        refit_every=10,
    )


def smollm2() -> Task:
    """The first source of `smollm2_chain_sum`: sums of two one-digit numbers, at most 16 tokens."""
    base = _base("smollm2_chain_sum", steps=40, every_steps=4)
    data = dataclasses.replace(base.data, sources=base.data.sources[:1])
    return _smollm2(dataclasses.replace(base, data=data, curriculum=CurriculumConfig("uniform")))


def smollm2_long() -> Task:
    """`smollm2_step_sum`: chains of additions, at most 44 tokens."""
    return _smollm2(_base("smollm2_step_sum", steps=32, every_steps=4))


def _smollm2(base: Config) -> Task:
    bridge = BridgeConfig("per_run", tokens=4096)
    return Task(
        base=base,
        plain=NestingConfig(choice="fixed", layers=(3, 4, 5)),
        bridged=NestingConfig(choice="fixed", layers=(3, 4, 5, 6, 7, 12, 15, 27, 28), bridge=bridge),
        refit_every=8,
    )


def _cheapest(share: float, tokens: int) -> NestingConfig:
    """Bridges for the layers that cost least, as they are measured after each fit."""
    bridge = BridgeConfig("per_layer", tokens=tokens)
    return NestingConfig(skip_ratio=share, choice="measured", divergence_temperature=0.0, bridge=bridge)


def _base(name: str, steps: int, every_steps: int, samples: int = 0) -> Config:
    """A shipped configuration without nesting, evaluated more often and on fewer samples."""
    config = load_config(name)
    return dataclasses.replace(
        config,
        nesting=NestingConfig(),
        rollout=dataclasses.replace(config.rollout, weights="target"),
        train=dataclasses.replace(config.train, steps=steps),
        evaluation=EvaluationConfig(every_steps, samples, pass_k=max(samples, 1), batch_size=64),
    )


TASKS: dict[str, Callable[[], Task]] = {
    "tiny": tiny,
    "tiny_long": tiny_long,
    "smollm2": smollm2,
    "smollm2_long": smollm2_long,
}


def _refitted(task: Task) -> NestingConfig:
    bridge = dataclasses.replace(task.bridged.bridge, refit_every=task.refit_every)
    return dataclasses.replace(task.bridged, bridge=bridge)


# A mixture has a weight of its own, which its share of full completions bounds at 2.
MIXTURE = {"bias_mitigation": "mixture", "level": "sequence", "truncate_at": None}
# For each variant its nesting, and its changes of the rollouts and of the loss.
VARIANTS: dict[str, tuple[Callable[[Task], NestingConfig], dict[str, Any], dict[str, Any]]] = {
    "full": (lambda task: task.base.nesting, {}, {}),
    "plain": (lambda task: task.plain, {}, {}),
    "bridged": (lambda task: task.bridged, {}, {}),
    "bridged_refit": (_refitted, {}, {}),
    "full_bfloat16": (lambda task: task.base.nesting, {"weights": "bfloat16"}, {}),
    "bridged_bfloat16": (lambda task: task.bridged, {"weights": "bfloat16"}, {}),
    "exact": (lambda task: task.bridged, {"mode": "exact"}, {}),
    "mixture": (lambda task: task.bridged, {"mixture_alpha": 0.5}, MIXTURE),
}


def variant_config(task: Task, variant: str, seed: int, steps: int | None = None) -> Config:
    """The run of a variant, without the warm start, which all variants of a seed share.

    Args:
        task: what is learnt.
        variant: one of `VARIANTS`.
        seed: of the run.
        steps: of the run; None takes the task's.
    """
    nesting_of, rollout, loss = VARIANTS[variant]
    base = task.base
    assert isinstance(base.loss, PolicyGradientConfig)
    return dataclasses.replace(
        base,
        name=f"equal-time-{variant}-{seed}",
        nesting=nesting_of(task),
        rollout=dataclasses.replace(base.rollout, **rollout),
        loss=dataclasses.replace(base.loss, **loss),
        train=dataclasses.replace(base.train, seed=seed, steps=base.train.steps if steps is None else steps),
        warm_start=WarmStartConfig(),
    )


class CompilingTime:
    """Seconds in which JAX traced, lowered or compiled while the context was open.

    A program that is traced inside another reports its time twice, so the length of the intervals' union counts.
    """

    def __enter__(self) -> CompilingTime:
        self._intervals: list[tuple[float, float]] = []
        listen(self._heard)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        stop_listening(self._heard)

    def _heard(self, event: str, seconds: float) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.monotonic()
            self._intervals.append((now - seconds, now))

    @property
    def seconds(self) -> float:
        """Length of the union of all intervals."""
        total, end = 0.0, 0.0
        for begin, until in sorted(self._intervals):
            total += max(0.0, until - max(begin, end))
            end = max(end, until)
        return total


def timed_run(setup: Setup, judge_seconds: float = 0.0) -> dict[str, Any]:
    """One run: what each step cost, and held-out greedy accuracy where it is evaluated.

    Args:
        setup: the start and the data; its policy stays as it is, so that other runs can start from it.
        judge_seconds: that the rewards of each batch wait for a judge elsewhere.

    Returns:
        JSON-able values. `config` is what `finished` compares. `steps` holds a list for each measure, one value for
        each step: `seconds` (without `compiling_seconds`), `rollout_seconds`, `search_seconds` of its batches at their
        searchers, `update_seconds` of all but waiting for them, `tokens` that were sampled, and `KEPT_METRICS`, None
        where a step has none. `evaluations` holds `step`, `greedy` and `accuracy`, from step 0 on.
        `load` is the machine's load average before and after.
    """
    config, load = setup.config, [os.getloadavg()[0]]
    steps, evaluations, due = list[dict[str, Any]](), list[dict[str, Any]](), list[tuple[int, Policy]]()
    with tempfile.TemporaryDirectory() as directory, Trainer(setup, RunDirectory(Path(directory))).open() as trainer:
        if judge_seconds:
            _wait_for_judge(trainer.searcher, judge_seconds)
        for number in range(config.train.steps + 1):
            if number > 0:
                steps.append(_timed_step(trainer, number))
            if number % config.evaluation.every_steps == 0 or number == config.train.steps:
                due.append((number, trainer.state.learner.policy()))
            # Evaluations do not count, and searchers beside the learner would work on meanwhile, so theirs come last.
            if config.search.backend == "inline" or number == config.train.steps:
                evaluations += [{"step": at} | _heldout(trainer, policy) for at, policy in due]
                due.clear()
    return {
        "config": config.to_json(),
        "steps": _columns(steps),
        "evaluations": _columns(evaluations),
        "load": [*load, os.getloadavg()[0]],
        "versions": versions(),
    }


def _timed_step(trainer: Trainer, number: int) -> dict[str, Any]:
    """Takes a step, counted from 1; what it cost."""
    with CompilingTime() as compiling:
        found = trainer.step(number - 1)
    metrics = record.metrics(found, trainer.config, trainer.state.data.source_names)
    return {
        "seconds": found.seconds - compiling.seconds,
        "compiling_seconds": compiling.seconds,
        "rollout_seconds": found.rollout_seconds,
        "search_seconds": sum(scored.stats.seconds for scored in found.found if scored.stats is not None),
        "update_seconds": found.seconds - found.search.waited_seconds - compiling.seconds,
        "tokens": round(found.tokens_per_second * found.rollout_seconds),
    } | {name: metrics.get(name) for name in KEPT_METRICS}


def _wait_for_judge(searcher: Searcher, seconds: float) -> None:
    """Makes every batch wait as long for its rewards; no core works meanwhile, so searchers can wait side by side."""
    search = searcher.search

    def judged(policy: Policy, prompts: Prompts, plan: LayerPlan, key: jax.Array) -> Scored:
        scored = search(policy, prompts, plan, key)
        time.sleep(seconds)
        assert scored.stats is not None
        stats = dataclasses.replace(scored.stats, scoring_seconds=scored.stats.scoring_seconds + seconds)
        return dataclasses.replace(scored, stats=stats)

    searcher.search = judged


def _heldout(trainer: Trainer, policy: Policy) -> dict[str, float]:
    """Held-out accuracy of a full model: greedy, and the one that curves are of; every task has one source."""
    state = trainer.state
    (found,) = heldout_results(policy, state.data, trainer.config, trainer.keys.evaluation).values()
    sampled = found.sampled_accuracy
    return {"greedy": found.greedy_accuracy, "accuracy": found.greedy_accuracy if sampled is None else sampled}


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def runs_of(
    task: Task, variants: Sequence[str], seeds: Sequence[int], steps: int | None, out: Path
) -> list[dict[str, Any]]:
    """Every run that is asked for, computed where it is not kept; each with its `variant` and `seed`.

    Args:
        task: what is learnt.
        variants: of `VARIANTS`.
        seeds: of the runs.
        steps: of each run; None takes the task's.
        out: where results and shared starts are kept.
    """
    # The variants of a seed follow each other, so that a change of the machine's load meets all of them alike.
    wanted = [
        wanted_run(variant_config(task, variant, seed, steps), out, variant, variant=variant)
        for seed in seeds
        for variant in variants
    ]
    # Each variant has its own model, with bridges or without, and the same weights in it.
    return runs_from_starts(wanted, timed_run, _told, task.base.warm_start)


def _told(run: dict[str, Any]) -> str:
    return f"{sum(run['steps']['seconds']):.1f} s, accuracy {run['evaluations']['accuracy'][-1]:.3f}"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the tables and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("equal_time", __doc__)
    parser.add_argument("task", choices=TASKS)
    add_list(parser, "--variants", VARIANTS, choices=VARIANTS)
    add_runs(parser, "experiment-equal-time", steps=None)
    add_json(parser, "the summary")
    known = parser.parse_args(arguments)
    check_baseline("--variants", known.variants, "full")
    task, out = TASKS[known.task](), known.out / known.task
    with checking_input():
        check_folder(out)
        for variant in known.variants:
            # Too few steps for a fit of bridges, for example, would show at the end only.
            check_start(variant_config(task, variant, known.seeds[0], known.steps))
    compile_once(out)
    runs = runs_of(task, known.variants, known.seeds, known.steps, out)
    summary = summarise(runs)
    print(tables(summary))
    figure = known.out / f"{known.task}.png"
    draw(runs, summary, figure, title=known.task)
    keep_json(known.json, {"task": known.task, "versions": versions(), "variants": summary})
    print(f"written: {figure}")


if __name__ == "__main__":
    sys.exit(main())
