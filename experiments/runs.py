"""Runs that experiments compare: started from one warm start per seed, kept as JSON, never computed twice."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load_file, save_file

from nested_reft.evaluation import Evaluation
from nested_reft.json_files import write_json
from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.sharding import shard_parameters
from nested_reft.training import phases, record
from nested_reft.training.config import Config, load_config
from nested_reft.training.heldout import heldout_results
from nested_reft.training.record import StepRecord
from nested_reft.training.setup import RunData, Setup, prepare
from nested_reft.training.trainer import Trainer
from nested_reft.training.warm_start import WarmStartConfig

EVERY = 10  # steps between evaluations
DRAWS = 10_000  # of the bootstrap over seeds
KEPT_METRICS = ("entropy", "completion_tokens", "generation_batches", "ess_token")


def finished(file: Path, config: Config) -> dict[str, Any] | None:
    """The kept result of a run; one of another configuration is not used.

    Args:
        file: where the result would be.
        config: of the run that is asked for.

    Returns:
        What `measured_run` returned, or None where the run has to be computed.
    """
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["config"] != config.to_json():
        print(f"'{file}' is of another configuration and is computed again", file=sys.stderr)
        return None
    return found


def compile_once(out: Path) -> None:
    """Lets all runs, also those of later processes, share the programs that they compile.

    Args:
        out: the experiment's folder.
    """
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def seed_draws(seeds: int) -> Int[np.ndarray, "R S"]:
    """Which seeds each draw of the bootstrap takes; the same ones for every measure, so that runs stay paired.

    Args:
        seeds: how many there are.
    """
    return np.random.default_rng(0).integers(0, seeds, (DRAWS, seeds))


def interval(values_R: Float[np.ndarray, " R"]) -> list[float]:
    """The middle 95 % of the bootstrap's draws.

    Args:
        values_R: a measure under each draw.
    """
    return np.quantile(values_R, [0.025, 0.975]).tolist()


def shared_start(config: Config, out: Path, warm_start: WarmStartConfig | None = None) -> Setup:
    """Data and the policy that all runs of a seed begin with; the weights of a warm start are kept.

    Args:
        config: of any run of the seed; its own warm start is not read.
        out: where the weights are kept, beside what they were made from.
        warm_start: what the runs share; None takes that of `tiny_dump`. Without steps the model is taken as it is.
    """
    seed = config.train.seed
    setup = prepare(dataclasses.replace(config, warm_start=warm_start or load_config("tiny_dump").warm_start))
    if not setup.config.warm_start.steps:
        return setup
    file = out / f"warm-seed{seed}.safetensors"
    # Weights of another model, other data or another warm start must not be taken for these.
    about = json.dumps({part: setup.config.to_json()[part] for part in ("model", "data", "warm_start")})
    stored = file.with_suffix(".json")
    if file.is_file() and stored.is_file() and stored.read_text() == about:
        return dataclasses.replace(setup, policy=dataclasses.replace(setup.policy, model=_stored_model(file, setup)))
    started = time.monotonic()
    policy = phases.warm_started(setup)
    save_file({name: np.ascontiguousarray(value) for name, value in policy.model.parameters().items()}, file)
    # The description comes after the weights: a kill in between leaves weights that are made again.
    stored.write_text(about)
    print(f"warm start, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return dataclasses.replace(setup, policy=policy)


def kept_run(
    file: Path,
    config: Config,
    measure: Callable[[Setup], dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    warm_start: WarmStartConfig | None = None,
) -> dict[str, Any]:
    """The result of a run from the shared start of its seed: the kept one, or else a new one, which is kept.

    Args:
        file: where the result is or goes; the shared start is kept beside it.
        config: of the run.
        measure: trains from a setup and returns the result.
        told: what is printed of a new result, behind the name of its configuration.
        warm_start: as `shared_start` takes it.
    """
    run = finished(file, config)
    if run is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The start may be of another configuration of the seed: only its weights and data are shared.
        run = measure(dataclasses.replace(shared_start(config, file.parent, warm_start), config=config))
        write_json(file, run)
        print(f"{config.name}: {told(run)}", flush=True)
    return run


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


def _stored_model(file: Path, setup: Setup) -> Transformer:
    """The weights of a file, placed as those of the setup are."""
    config = setup.policy.model.config
    parameters = {name: jax.numpy.asarray(value) for name, value in load_file(file).items()}
    model = Transformer(config, shard_parameters(parameters, parameter_axes(config), setup.policy.mesh))
    # Bridges belong to the run and not to its start: they are zero until the run fits them.
    model.bridges = setup.policy.model.bridges
    return model
