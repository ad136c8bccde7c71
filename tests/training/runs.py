"""Runs of a very small model that the tests of training share."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.value import CriticConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training import record
from nested_reft.training.config import Config, load_config
from nested_reft.training.record import StepRecord
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.trainer import OnStep, Trainer

WITH_KL = PolicyGradientConfig(
    "leave_one_out", "base", "token", "token_mean", reference_kl="k3_loss", reference_kl_coefficient=0.1
)
# PPO with a critic, which corrects for whoever sampled.
PPO = PolicyGradientConfig(
    "gae",
    "base",
    "token",
    "token_mean",
    clip_policies="three",
    clip_low=0.2,
    clip_high=0.2,
    entropy_coefficient=0.1,
    critic=CriticConfig(kl_coefficient=0.1, value_coefficient=0.5),
)
# Every update moves the model, whether or not an untrained one earns any reward.
MOVING = dataclasses.replace(WITH_KL, entropy_coefficient=1.0)
MEASURED = NestingConfig(skip_ratio=0.2, choice="measured", remeasure_every=2, divergence_temperature=0.0)
# Time differs from run to run, and so does what an earlier run has compiled already.
UNTIMED = ("seconds", "tokens_per_second", "compilations", "searchers_")


def nano(**changes: Any) -> Config:
    """The `tiny` configuration, smaller still and without its warm start; `a__b=c` changes field b of part a."""
    config = load_config("tiny")
    changes = {
        "warm_start__steps": 0,
        "train__steps": 4,
        "optimizer__warmup_steps": 0,  # that of `tiny` is longer than this run
        "optimizer__schedule": "constant",
        "train__checkpoint_every": 2,
        "data__prompts_per_batch": 4,
        "rollout__group_size": 4,
        "evaluation": EvaluationConfig(every_steps=2, samples_per_prompt=2, pass_k=2, batch_size=8),
    } | changes
    source = dataclasses.replace(config.data.sources[0], train_size=20, heldout_size=8)
    config = dataclasses.replace(config, name="nano", data=dataclasses.replace(config.data, sources=(source,)))
    # The parts are gathered first, because some values go together only when all are in place.
    parts: dict[str, Any] = {}
    for name, value in changes.items():
        part, _, attribute = name.partition("__")
        now = parts.get(part, getattr(config, part))
        parts[part] = dataclasses.replace(now, **{attribute: value}) if attribute else value
    return dataclasses.replace(config, **parts)


def two_sources(**changes: Any) -> Config:
    """`nano` with a second, easier source."""
    config = nano(**changes)
    levels = {"two_terms": exactly(terms=2, digits=1), "three_terms": exactly(terms=3, digits=1)}
    sources = difficulty_ladder("chain_sum", levels, train_size=20, heldout_size=8, seed=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def controlled(**changes: Any) -> Config:
    """`nano` with any reading within budget, so the controller adds a layer each step up to two."""
    control = NestingControlConfig("ess_token", budget=1e-6, max_skipped=2, patience=1)
    return nano(**({"nesting_control": control, "nesting": NestingConfig(border=1)} | changes))


def trainer(config: Config | Setup, path: Path, resume: bool = False, on_step: OnStep | None = None) -> Trainer:
    """An open trainer of a configuration, or of what was prepared of one, that writes to `path`."""
    setup = prepare(config) if isinstance(config, Config) else config
    return Trainer(setup, RunDirectory(path), on_step).open(resume)


def save_after(run: Trainer, steps: int) -> None:
    """Writes the checkpoint that the loop would write after `steps` steps of the run's last phase."""
    run.state.step, run.state.started = steps, True
    run.save()


def metrics_of(run: Trainer, found: StepRecord) -> dict[str, Any]:
    """The line of `metrics.jsonl` that a step becomes."""
    return record.metrics(found, run.config, run.state.data.source_names)


def samples_of(run: Trainer, found: StepRecord) -> list[dict[str, Any]]:
    """The lines of `samples.jsonl` that a step becomes."""
    return record.samples(found, run.config, run.state.data.source_names)


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same seed have in common: all but times and counts of compilations."""
    return {name: value for name, value in metrics.items() if not any(word in name for word in UNTIMED)}


def comparable_steps(run: Trainer, numbers: range) -> list[dict[str, Any]]:
    """The comparable metrics of steps that are taken here, by hand."""
    return [comparable(metrics_of(run, run.step(number))) for number in numbers]


def assert_equal_arrays(a: Any, b: Any) -> None:
    """Two pytrees are equal bit for bit; NaN stands for a value that there is not."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.array_equal(x, y, equal_nan=jnp.issubdtype(jnp.asarray(x).dtype, jnp.inexact))


def lines_of(path: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of a run's log, those of `metrics.jsonl` unless said otherwise."""
    return read_log(path / f"{name}.jsonl")
