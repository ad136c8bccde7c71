"""Runs that experiments compare: started from one warm start per seed, kept as JSON, never computed twice."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from nested_reft.evaluation import evaluate_examples
from nested_reft.models.transformer import Transformer
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training import phases, record
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import RunData, Setup, prepare
from nested_reft.training.trainer import Trainer

EVERY = 10  # steps between evaluations
KEPT_METRICS = ("entropy", "completion_tokens", "generation_batches", "ess_token")


def finished(file: Path, config: Config) -> dict[str, Any] | None:
    """The kept result of a run; one of another configuration is not used.

    Args:
        file: where the result would be.
        config: of the run that is asked for.

    Returns:
        What `train` returned, or None where the run has to be computed.
    """
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["config"] != config.to_json():
        print(f"'{file}' is of another configuration and is computed again", file=sys.stderr)
        return None
    return found


def warm_started(config: Config, out: Path) -> Setup:
    """Data and the policy that all runs of a seed begin with; its weights are kept for the next call.

    The warm start is that of `tiny_dump` for every experiment, so that their runs can be compared.

    Args:
        config: of one of the runs; model, data and seed decide the result.
        out: where the weights are kept.
    """
    seed, steps = config.train.seed, load_config("tiny_dump").warm_start
    setup = prepare(dataclasses.replace(config, warm_start=steps))
    file = out / f"warm-seed{seed}.safetensors"
    # Everything that the weights depend on, but for the seed, which is in the name.
    about = json.dumps({part: setup.config.to_json()[part] for part in ("model", "data", "warm_start")})
    stored = file.with_suffix(".json")
    if file.is_file() and stored.is_file() and stored.read_text() == about:
        parameters = {name: jax.numpy.asarray(value) for name, value in load_file(file).items()}
        model = Transformer(setup.policy.model.config, parameters)
        return dataclasses.replace(setup, policy=dataclasses.replace(setup.policy, model=model))
    started = time.monotonic()
    policy = phases.warm_started(setup)
    save_file({name: np.ascontiguousarray(value) for name, value in policy.model.parameters().items()}, file)
    # The description comes last, so weights that were only half written are never used.
    stored.write_text(about)
    print(f"warm start, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return dataclasses.replace(setup, policy=policy)


def train(setup: Setup, out: Path) -> dict[str, Any]:
    """One run: held-out accuracy of every source each `EVERY` steps, and a few metrics of each step.

    Accuracies are of the sources that the configuration names; probabilities are of the parts that
    training draws from. The two differ where sources were pooled or divided.

    Args:
        setup: what the run starts from; it stays as it is.
        out: the run directory is made in its folder `runs`.

    Returns:
        JSON-able values: `config`, `run_directory`, `versions`; names of `sources` and `parts`;
        `questions[part][source]`, how many training questions a part has of each source; `steps`, and at
        each of them `accuracy` (sampled) and `greedy_accuracy` of every source; for every training step
        `probability` of each part and the `metrics` of `KEPT_METRICS` (a step that had nothing to learn
        from has no entropy and no ESS); `start_seconds` until the first evaluation and `seconds` of all.
    """
    config, started = setup.config, time.monotonic()
    run = RunDirectory.create(out / "runs", config.name, config.to_json())
    # `Trainer.run` would evaluate greedily and on the sources of a step alone, so steps are taken here.
    with Trainer(setup, run).open() as trainer:
        trainer.run_earlier_phases()
        start_seconds = time.monotonic() - started  # `data.split` samples every question here
        sources, parts = [source.name for source in config.data.sources], trainer.data.source_names
        accuracy, probability = [heldout_accuracy(trainer)], []
        kept: dict[str, list[float]] = {name: [] for name in KEPT_METRICS}
        for number in range(config.train.steps):
            found = trainer.step(number)
            metrics = record.metrics(found, config, parts)
            probability.append([metrics[f"curriculum/{name}/probability"] for name in parts])
            for name in kept.keys() & metrics.keys():
                kept[name].append(metrics[name])
            if found.number % EVERY == 0:
                accuracy.append(heldout_accuracy(trainer))
                metrics |= {f"heldout/{name}": a for name, a in zip(sources, accuracy[-1][1], strict=True)}
            run.log_samples(found.number, record.samples(found, trainer.num_layers))
            run.log_metrics(found.number, metrics)
        questions = questions_of_parts(trainer.data, sources)
    return {
        "config": config.to_json(),
        "run_directory": str(run.path),
        "sources": sources,
        "parts": list(parts),
        "questions": questions,
        "steps": list(range(0, config.train.steps + 1, EVERY)),
        "accuracy": [sampled for sampled, _ in accuracy],
        "greedy_accuracy": [greedy for _, greedy in accuracy],
        "probability": probability,
        "metrics": kept,
        "start_seconds": start_seconds,
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }


def questions_of_parts(data: RunData, sources: list[str]) -> list[list[int]]:
    """How many questions of each named source every part holds, `[part][source]`.

    Args:
        data: what a run trains on, divided.
        sources: names of the configuration's sources.
    """
    named = [[example.example.source for example in examples] for examples in data.train_examples]
    return [[names.count(source) for source in sources] for names in named]


def heldout_accuracy(trainer: Trainer) -> tuple[list[float], list[float]]:
    """Sampled and greedy accuracy of each source; the curriculum does not see them."""
    config, policy = trainer.config, trainer.state.learner.policy()
    # All evaluations of a run draw with one key, so a curve moves because the policy does.
    key = jax.random.key(config.train.seed)
    results = [
        evaluate_examples(policy, examples, config.reward, config.evaluation, key, samples=True)
        for examples in trainer.data.heldout_examples
    ]
    return [result.sampled_accuracy or 0.0 for result in results], [result.greedy_accuracy for result in results]
