"""Very small runs that the tests of training share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import LayerPlan
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory
from nested_reft.train import record
from nested_reft.train.config import Config, load_config
from nested_reft.train.learner import Learner
from nested_reft.train.phases import reinforcement_task
from nested_reft.train.record import StepRecord
from nested_reft.train.searcher import Searcher
from nested_reft.train.setup import Setup, prepare
from nested_reft.train.step import UpdatePlans, make_update
from nested_reft.train.trainer import Trainer
from nested_reft.types import Prompts, Scored

WITH_KL = PolicyGradientConfig(
    "leave_one_out", "base", "token", "token_mean", reference_kl="k3_loss", reference_kl_coefficient=0.1
)
# Every update moves the model, whether or not an untrained one earns any reward.
MOVING = dataclasses.replace(WITH_KL, entropy_coefficient=1.0)
UNTIMED = ("seconds", "tokens_per_second", "compilations")


def nano(**changes: Any) -> Config:
    """The `tiny` configuration, smaller still and without its warm start; `a__b=c` changes field b of part a."""
    config = load_config("tiny")
    changes = {
        "warm_start__steps": 0,
        "train__steps": 4,
        "optimizer__warmup_steps": 0,  # the first update of a warm-up is at rate zero
        "optimizer__schedule": "constant",
        "train__checkpoint_every": 2,
        "data__prompts_per_batch": 4,
        "rollout__group_size": 4,
        "evaluation": EvaluationConfig(every_steps=2, samples_per_prompt=2, pass_k=2, batch_size=8),
    } | changes
    source = dataclasses.replace(config.data.sources[0], train_size=20, heldout_size=8)
    config = dataclasses.replace(config, name="nano", data=dataclasses.replace(config.data, sources=(source,)))
    parts: dict[str, Any] = {}
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        before = parts.get(part, getattr(config, part))
        parts[part] = dataclasses.replace(before, **{attribute: value}) if attribute else value
    # All at once: what goes together in the end need not do so on the way.
    return dataclasses.replace(config, **parts)


def two_sources(**changes: Any) -> Config:
    """`nano` with a second, easier source."""
    levels = {"two_terms": exactly(terms=2, digits=1), "three_terms": exactly(terms=3, digits=1)}
    sources = difficulty_ladder("chain_sum", levels, train_size=20, heldout_size=8, seed=1)
    return nano(data__sources=sources, **changes)


def trainer(config: Config | Setup, path: Path, resume: bool = False, on_step: Any = None) -> Trainer:
    """An open trainer that writes into `path`, which holds what resuming a run from the command line needs."""
    setup = prepare(config) if isinstance(config, Config) else config
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(setup.config.to_json()))
    return Trainer(setup, RunDirectory(path), on_step=on_step).open(resume=resume)


def metrics_of(run: Trainer, found: StepRecord) -> dict[str, Any]:
    """A step of `run` as its line of `metrics.jsonl`."""
    return record.metrics(found, run.config, run.data.source_names)


def metrics_at(run: Trainer, number: int) -> dict[str, Any]:
    """Takes step `number` of `run`, and gives its line of `metrics.jsonl`."""
    return metrics_of(run, run.step(number))


def stop_after(run: Trainer, steps: int) -> None:
    """Writes the checkpoint of a run whose first `steps` steps were taken one by one, and closes it."""
    run.state.step, run.state.started = steps, True
    run.save()
    run.close()


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that depend on no clock, and not on what was compiled before."""
    return {name: value for name, value in metrics.items() if not any(word in name for word in UNTIMED)}


def lines_of(path: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of a run's log, those of `metrics.jsonl` unless said otherwise."""
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def assert_same_arrays(a: Any, b: Any) -> None:
    """Two trees of arrays are the same, bit for bit."""
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


class Killed(BaseException):
    """Ends a run in the middle of a phase, as a signal that no program can catch would."""


class KilledAt:
    """A phase that is killed before its step `number`, counted from 0; else it is the phase that it was made of."""

    def __init__(self, phase: Any, number: int):
        self._phase, self._number = phase, number
        self.name, self.steps, self.trains = phase.name, phase.steps, phase.trains
        self.prepare: Callable[..., None] = phase.prepare
        self.start: Callable[..., None] = phase.start

    def step(self, state: Any, number: int) -> str:
        if number == self._number:
            raise Killed
        return self._phase.step(state, number)


def prompts_of(setup: Setup, count: int = 4) -> Prompts:
    """The first `count` prompts of the first source, as one batch."""
    return batch_prompts(setup.data.train_examples[0][:count], [0] * count, setup.data.prompt_size)


def found_by(setup: Setup, policy: Policy | None = None, plan: LayerPlan | None = None, seed: int = 0) -> Scored:
    """A batch of scored rollouts of the first prompts, by the policy that the setup starts from unless given."""
    policy = setup.policy if policy is None else policy
    searcher = Searcher(setup.config.rollout, setup.config.reward, setup.data.shared_prefix)
    plan = LayerPlan.skipping(policy.num_layers, [2]) if plan is None else plan
    return searcher.search(policy, prompts_of(setup), plan, jax.random.key(seed))


def learner_of(setup: Setup) -> Learner:
    """A learner at the beginning of reinforcement, with its reference where the objective has one."""
    learner = Learner(setup.policy, setup.config.rollout.weights)
    learner.begin(reinforcement_task(setup.config, setup.data.shared_prefix))
    if "reference_logprob_BGC" in learner.needs.logprobs:
        learner.keep_reference()
    return learner


def update_flops(learner: Learner, found: Scored, nested: LayerPlan | None = None) -> float:
    """Operations of the compiled update on a batch, by XLA's count.

    Args:
        learner: whose update it is.
        found: the batch.
        nested: a plan that is handed to the update whether or not its objective reads one.
    """
    batch = learner.batch(found)
    plans = batch.plans if nested is None else UpdatePlans(nested=nested)
    lowered = make_update(learner.task).lower(learner.state, learner.base, batch.arrays, plans)
    return lowered.compile().cost_analysis()["flops"]
