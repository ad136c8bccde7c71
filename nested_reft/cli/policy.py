"""The policy that a command is about: a run directory or a model, and the plan that `--skip-layers` asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nested_reft.api import without_plans
from nested_reft.layer_skip import LayerPlan, NestingConfig
from nested_reft.rollout.policy import Policy
from nested_reft.training.config import load_config
from nested_reft.training.setup import Setup, prepare, run_config


def setup_of(policy: str, config_name: str | None) -> Setup:
    """The setup of a run directory, or of a model on a configuration's prompts.

    Args:
        policy: a run directory, or a model as in `model.name`.
        config_name: the configuration whose prompts to use; None for a run, which has its own.

    Raises:
        ValueError: the policy and the configuration do not go together, or one of them cannot be loaded.
    """
    # A directory with both is a run; a Hugging Face model has a `config.json` as well.
    if (Path(policy) / "config.json").is_file() and (Path(policy) / "checkpoints").is_dir():
        if config_name is not None:
            raise ValueError(f"--config is '{config_name}', but '{policy}' is a run, which has its own; leave it out")
        return prepare(without_plans(run_config(Path(policy))), Policy.load(policy))
    if config_name is None:
        raise ValueError(f"'{policy}' is not a run directory; name the configuration whose prompts to use: --config")
    config = load_config(config_name)
    if policy != config.model.name:
        # The configuration's shape is that of its own model from scratch; another model brings its own.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=policy, shape=None))
    return prepare(without_plans(config))


def plan_without(num_layers: int, layers: list[int]) -> LayerPlan | None:
    """The plan that skips the `layers` of `--skip-layers`, checked; None where there are none.

    Args:
        num_layers: L of the model.
        layers: indices of the layers to skip; empty for none.

    Raises:
        ValueError: the model does not have one of the layers, or none would be left.
    """
    if not layers:
        return None
    try:
        NestingConfig(choice="fixed", layers=tuple(layers)).validate_for(num_layers)
    except ValueError as error:
        # The rule is the field's, but the user typed the option.
        raise ValueError(str(error).replace("nesting.layers", "--skip-layers")) from None
    return LayerPlan.skipping(num_layers, layers)
