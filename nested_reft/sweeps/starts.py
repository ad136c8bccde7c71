"""One warm start for all runs of a seed, made once and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import shard_parameters
from nested_reft.sweeps.claims import claimed
from nested_reft.training import phases
from nested_reft.training.config import Config
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.warm_start import WarmStartConfig


def shared_start(config: Config, out: Path, warm_start: WarmStartConfig) -> Setup:
    """Data and the policy that all runs of a seed begin with; the weights of a warm start are kept.

    Args:
        config: of any run of the seed; its own warm start is not read.
        out: where the weights are kept, beside what they were made from.
        warm_start: what the runs share. Without steps the model is taken as it is.
    """
    setup = prepare(dataclasses.replace(config, warm_start=warm_start))
    if not setup.config.warm_start.steps:
        return setup
    about = start_facts(setup.config)
    digest = hashlib.sha256(about.encode()).hexdigest()[:8]
    # Starts of other models, data or warm starts of one seed lie side by side.
    file = out / f"warm-seed{config.train.seed}-{digest}.safetensors"
    stored = file.with_suffix(".json")
    out.mkdir(parents=True, exist_ok=True)
    with claimed(file, wait=True):
        if file.is_file() and stored.is_file() and stored.read_text() == about:
            policy = dataclasses.replace(setup.policy, model=_stored_model(file, setup))
            return dataclasses.replace(setup, policy=policy)
        started = time.monotonic()
        policy = phases.warm_started(setup)
        save_file({name: np.ascontiguousarray(value) for name, value in policy.model.parameters().items()}, file)
        # The description comes after the weights: a kill in between leaves weights that are made again.
        stored.write_text(about)
    tqdm.write(f"warm start, seed {config.train.seed}: {time.monotonic() - started:.0f} s")
    return dataclasses.replace(setup, policy=policy)


def start_facts(config: Config) -> str:
    """All that the weights of a warm start depend on beside the seed, as JSON.

    Args:
        config: with the warm start.
    """
    plain = config.to_json()
    facts = {part: plain[part] for part in ("model", "data", "warm_start")}
    # Demonstrations are cut to the length of completions, and updates multiply in this type.
    facts["max_completion_tokens"] = config.rollout.max_completion_tokens
    return json.dumps(facts | {"compute_dtype": config.train.compute_dtype})


def _stored_model(file: Path, setup: Setup) -> Transformer:
    """The weights of a file, placed as those of the setup are."""
    config = setup.policy.model.config
    parameters = {name: jax.numpy.asarray(value) for name, value in load_file(file).items()}
    model = Transformer(config, shard_parameters(parameters, parameter_axes(config), setup.policy.mesh))
    # Bridges belong to the run and not to its start: they are zero until the run fits them.
    model.bridges = setup.policy.model.bridges
    return model
