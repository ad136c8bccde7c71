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

from nested_reft.evaluation import evaluate
from nested_reft.models.transformer import Transformer
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.trainer import WARM_START_KEY, Trainer
from nested_reft.training.warm_start import warm_start

EVERY = 10  # steps between evaluations
KEPT_METRICS = ("entropy", "completion_tokens", "generation_batches", "ess_token")


def finished(file: Path, config: Config) -> dict[str, Any] | None:
    """The kept result of a run, or None; one of another configuration is not used."""
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["config"] != config.to_json():
        print(f"'{file}' is of another configuration and is computed again", file=sys.stderr)
        return None
    return found


def warm_started(config: Config, out: Path) -> Setup:
    """Data and the model that all runs of a seed begin with, warmed up as `tiny_dump` is; its weights are kept."""
    seed, steps = config.train.seed, load_config("tiny_dump").warm_start
    setup = prepare(dataclasses.replace(config, warm_start=steps))
    file = out / f"warm-seed{seed}.safetensors"
    about = json.dumps({part: setup.config.to_json()[part] for part in ("model", "data", "warm_start")})
    stored = file.with_suffix(".json")
    if file.is_file() and stored.is_file() and stored.read_text() == about:
        parameters = {name: jax.numpy.asarray(value) for name, value in load_file(file).items()}
        return dataclasses.replace(setup, model=Transformer(setup.model.config, parameters))
    started = time.monotonic()
    model = warm_start(setup.model, setup, jax.random.fold_in(jax.random.key(seed), WARM_START_KEY))
    save_file({name: np.ascontiguousarray(value) for name, value in model.parameters().items()}, file)
    stored.write_text(about)
    print(f"warm start, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    return dataclasses.replace(setup, model=model)


def train(setup: Setup, out: Path) -> dict[str, Any]:
    """One run: held-out accuracy of every source each `EVERY` steps, and a few metrics of each step.

    Accuracies are of the sources that the configuration names; probabilities are of the parts that
    training draws from. The two differ where sources were pooled or divided.
    """
    config, started = setup.config, time.monotonic()
    run = RunDirectory.create(out / "runs", config.name, config.to_json())
    trainer = Trainer(dataclasses.replace(setup, model=jax.tree.map(jax.numpy.copy, setup.model)), run)
    start_seconds = time.monotonic() - started  # `data.split` samples every question here
    sources, parts = [source.name for source in config.data.sources], trainer.setup.source_names
    accuracy, probability = [heldout_accuracy(trainer)], []
    kept: dict[str, list[float]] = {name: [] for name in KEPT_METRICS}
    for step in range(config.train.steps):
        metrics = trainer.step(step)
        probability.append([metrics[f"curriculum/{name}/probability"] for name in parts])
        for name, values in kept.items():
            values.append(metrics[name])
        if (step + 1) % EVERY == 0:
            accuracy.append(heldout_accuracy(trainer))
            metrics |= {f"heldout/{name}": a for name, a in zip(sources, accuracy[-1][1], strict=True)}
        run.log_metrics(step + 1, metrics)
    trainer.close()
    return {
        "config": config.to_json(),
        "run_directory": str(run.path),
        "sources": sources,
        "parts": list(parts),
        "steps": list(range(0, config.train.steps + 1, EVERY)),
        "accuracy": [sampled for sampled, _ in accuracy],
        "greedy_accuracy": [greedy for _, greedy in accuracy],
        "probability": probability,
        "metrics": kept,
        "start_seconds": start_seconds,
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }


def heldout_accuracy(trainer: Trainer) -> tuple[list[float], list[float]]:
    """Sampled and greedy accuracy of each source; the curriculum does not see them."""
    setup, config = trainer.setup, trainer.config
    results = [
        evaluate(
            trainer.state.model,
            setup.tokenizer,
            examples,
            config.reward,
            config.evaluation,
            config.rollout.max_completion_tokens,
            config.rollout.sampling,
            trainer.key,
            samples=True,
        )
        for examples in setup.heldout_examples
    ]
    return [result.sampled_accuracy or 0.0 for result in results], [result.greedy_accuracy for result in results]
