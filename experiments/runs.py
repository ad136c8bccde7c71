"""What the runs of experiments begin with and are measured by; `nested_reft.sweeps` keeps them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from nested_reft.evaluation import Evaluation
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sweeps.kept import Result, Wanted, kept_runs
from nested_reft.sweeps.starts import shared_start
from nested_reft.training import record
from nested_reft.training.config import Config, load_config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.record import StepRecord
from nested_reft.training.setup import RunData, Setup
from nested_reft.training.trainer import Trainer
from nested_reft.training.warm_start import WarmStartConfig

EVERY = 10  # steps between evaluations
KEPT_METRICS = ("entropy", "completion_tokens", "generation_batches", "ess_token")


def compile_once(out: Path) -> None:
    """Lets all runs, also those of later processes, share the programs that they compile.

    Args:
        out: the experiment's folder.
    """
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def wanted_run(config: Config, out: Path, name: str, **labels: Any) -> Wanted:
    """A run whose file has its name, its seed and its steps, so that results of other steps stay.

    Args:
        config: of the run.
        out: the folder of the results.
        name: what tells it from other runs of its seed.
        labels: what its result is called, beside its seed.
    """
    file = out / f"{name}-seed{config.train.seed}-steps{config.train.steps}.json"
    return Wanted(config, file, labels | {"seed": config.train.seed})


def runs_from_starts(
    wanted: Sequence[Wanted],
    measure: Callable[[Setup], Result],
    told: Callable[[Result], str],
    warm_start: WarmStartConfig | None = None,
    only_kept: bool = False,
) -> list[Result]:
    """The results of runs that begin with the shared start of their seed, each with its labels.

    Args:
        wanted: the runs; the shared starts are kept beside their results.
        measure: trains from a setup and returns the result.
        told: what is printed of a new result, behind the name of its configuration.
        warm_start: what the runs of a seed share; None takes that of `tiny_dump`.
        only_kept: compute nothing, and leave out what is not kept.
    """
    shared = warm_start or load_config("tiny_dump").warm_start

    def compute(each: Wanted) -> Result:
        setup = shared_start(each.config, each.file.parent, shared)
        return measure(dataclasses.replace(setup, config=each.config))

    return [result for result in kept_runs(wanted, compute, told, only_kept=only_kept) if result is not None]


def measured_run(setup: Setup, out: Path) -> dict[str, Any]:
    """One run: held-out accuracy of every source each `EVERY` steps, and a few metrics of each step.

    Accuracies are of the sources that the configuration names; probabilities are of the parts that
    training draws from. The two differ where sources were pooled or divided.

    Args:
        setup: the start and the data; its policy stays as it is, so that other runs can start from it.
        out: the run's directory is made in its folder `runs`.

    Returns:
        JSON-able values: `config`, which `finished` compares, `run_directory` and `versions`; names of the
        `sources` and the `parts`, and how many `questions[part][source]` these hold; `steps` and, at each of
        them, `accuracy` (sampled) and `greedy_accuracy` of every source; for every training step the
        `probability` of each part, and `metrics` by the names of `KEPT_METRICS`; `start_seconds` until the
        first evaluation, and `seconds` of all.
    """
    config, started = setup.config, time.monotonic()
    probability: list[list[float]] = []
    kept: dict[str, list[float]] = {name: [] for name in KEPT_METRICS}

    def after_step(found: StepRecord) -> None:
        # The trainer evaluates greedily and on the sources of a step alone, so all of them are measured here.
        if found.number % EVERY == 0:
            evaluations.append(heldout(trainer))
        metrics = record.metrics(found, config, trainer.state.data.source_names)
        probability.append([metrics[f"curriculum/{name}/probability"] for name in trainer.state.data.source_names])
        # A step without a token to learn from has no entropy and no ESS.
        for name in kept.keys() & metrics.keys():
            kept[name].append(metrics[name])

    trainer = Trainer(setup, RunDirectory.create(out / "runs", config.name, config.to_json()), after_step)
    with trainer.open():
        # `data.split` samples every question here, so this time is reported by itself.
        trainer.run_earlier_phases()
        start_seconds = time.monotonic() - started
        evaluations = [heldout(trainer)]
        trainer.run()
    data = trainer.state.data
    sources = [source.name for source in config.data.sources]
    return {
        "config": config.to_json(),
        "run_directory": str(trainer.run_directory.path),
        "sources": sources,
        "parts": list(data.source_names),
        "questions": questions_of_parts(data, sources),
        "steps": list(range(0, config.train.steps + 1, EVERY)),
        "accuracy": [[found[name].sampled_accuracy or 0.0 for name in sources] for found in evaluations],
        "greedy_accuracy": [[found[name].greedy_accuracy for name in sources] for found in evaluations],
        "probability": probability,
        "metrics": kept,
        "start_seconds": start_seconds,
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }


def questions_of_parts(data: RunData, sources: Sequence[str]) -> list[list[int]]:
    """How many training questions of each named source every part holds, `[part][source]`.

    Args:
        data: what was trained on, divided or pooled.
        sources: names of the configuration's sources.
    """
    named = [[example.example.source for example in examples] for examples in data.train_examples]
    return [[names.count(source) for source in sources] for names in named]


def heldout(trainer: Trainer) -> dict[str, Evaluation]:
    """Sampled and greedy results of each source of the configuration; the curriculum does not see them."""
    state, config = trainer.state, trainer.config
    # Every evaluation of a seed draws with the same keys, so that curves differ by the policies alone.
    return heldout_results(state.learner.policy(), state.data, config, trainer.keys.evaluation)
