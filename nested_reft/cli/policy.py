"""The policy that a command is about: a run directory or a model, and the plan that its options ask for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import jax

from nested_reft.api import without_plans
from nested_reft.cli.overrides import override
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig
from nested_reft.reward_model import FACTS
from nested_reft.rollout.policy import Policy
from nested_reft.run_mirror import local_run
from nested_reft.training.config import Config, load_config
from nested_reft.training.mesh_choice import with_chosen_mesh
from nested_reft.training.setup import Setup, initial_policy, prepare, run_config


def is_run(policy: str) -> bool:
    """Whether a policy is a run directory; a Hugging Face model has a `config.json` as well.

    Args:
        policy: a run directory, or a model as in `model.name`.
    """
    path = local_run(policy)
    return (path / "config.json").is_file() and (path / "checkpoints").exists()


def check_answers_prompts(policy: str) -> None:
    """Refuses a reward model where a policy is wanted.

    Args:
        policy: a run directory, or a model as in `model.name`.

    Raises:
        ValueError: it is one.
    """
    path = local_run(policy)
    if run_config(path).loss.kind == "bradley_terry" if is_run(policy) else (path / FACTS).is_file():
        raise ValueError(f"'{policy}' is a reward model, which answers nothing; give a policy")


def setup_of(
    policy: str,
    config_name: str | None,
    overrides: Sequence[str] = (),
    prompts: int | None = None,
    plans: bool = False,
) -> Setup:
    """The setup of a run directory, or of a model on a configuration's prompts.

    Args:
        policy: a run directory, or a model as in `model.name`.
        config_name: the configuration whose prompts to use; None for a run, which has its own.
        overrides: words of the command line that replace fields.
        prompts: the most held-out prompts of each source; None leaves them as they are.
        plans: keep how the configuration nests; commands that run the full model alone need nothing of it.

    Raises:
        ValueError: the policy and the configuration do not go together, or one of them cannot be loaded.
    """
    given = config_of(policy, config_name)
    given = given if plans else without_plans(given)
    config = override(given, overrides)
    if is_run(policy):
        setup = prepare(config, _of_run(policy, given, config), resumes=True)
    else:
        setup = prepare(config)
    # The first ones are taken, because a smaller `heldout_size` would draw other questions.
    heldout = tuple(examples[:prompts] for examples in setup.data.heldout_examples)
    return dataclasses.replace(setup, data=dataclasses.replace(setup.data, heldout_examples=heldout))


def loaded(policy: str, given: Config, config: Config) -> Policy:
    """A policy alone, without data.

    Args:
        policy: a run directory, or a model as in `model.name`.
        given: the configuration that `config_of` found for it.
        config: the same with overrides: says how it is asked and samples, and where it lies.

    Raises:
        ValueError: it cannot be loaded, or is to be another model than the run's.
    """
    config = with_chosen_mesh(config)
    return _of_run(policy, given, config) if is_run(policy) else initial_policy(config)


def _of_run(policy: str, given: Config, config: Config) -> Policy:
    if config.model != given.model:
        raise ValueError(f"--model changes the model of the run '{policy}'; allowed is the model that was trained")
    how = {"sampling": config.rollout.sampling, "max_completion_tokens": config.rollout.max_completion_tokens}
    return dataclasses.replace(Policy.load(policy, config.mesh), prompt=config.data.prompt, **how)


def config_of(policy: str, config_name: str | None, of_model: Callable[[str], Config] | None = None) -> Config:
    """The configuration of a run, or the one that is named for a model.

    Args:
        policy: a run directory, or a model as in `model.name`.
        config_name: None for a run, which has its own.
        of_model: gives that of a model where none is named; None refuses it.

    Raises:
        ValueError: a run has a configuration already, or a model has none.
    """
    if is_run(policy):
        if config_name is not None:
            raise ValueError(f"--config is '{config_name}', but '{policy}' is a run, which has its own; leave it out")
        return run_config(local_run(policy))
    if config_name is None and of_model is not None:
        return of_model(policy)
    if config_name is None:
        raise ValueError(f"'{policy}' is not a run directory; name the configuration whose prompts to use: --config")
    config = load_config(config_name)
    if policy != config.model.name:
        # The configuration's shape is that of its own model from scratch; another model brings its own.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=policy, shape=None))
    return config


def plan_of_options(known: argparse.Namespace, policy: Policy, seed: int) -> LayerPlan | None:
    """The layers that `--nested` and `--skip-layers` leave; None is the full model.

    Args:
        known: the command's options.
        policy: of its run or model.
        seed: of the draw.

    Raises:
        ValueError: they do not go together, or not with the policy.
    """
    if known.nested and known.skip_layers:
        raise ValueError("--nested and --skip-layers are given; allowed is one of them")
    if known.nested:
        return plan_of_run(policy, known.policy, seed)
    return plan_without(policy.num_layers, known.skip_layers)


def plan_of_run(policy: Policy, name: str, seed: int) -> LayerPlan:
    """A plan as the run draws them by now, with the bridges that it has fitted.

    Args:
        policy: of the run.
        name: what the user called it.
        seed: of the draw.

    Raises:
        ValueError: it is no run, or one that leaves no layer out.
    """
    if policy.plans is None:
        raise ValueError(f"--nested is given, but '{name}' is a model, which has no plans; give --skip-layers")
    plan = policy.plans.draw(jax.random.key(seed))
    if plan.shape.kept == policy.num_layers:
        why = "leaves no layer out" if policy.plans.nests else "has not fitted its bridges yet"
        raise ValueError(f"--nested is given, but the run '{name}' {why}; give --skip-layers, or neither")
    return plan


def plan_in_words(plan: LayerPlan, num_layers: int) -> str:
    """What a plan leaves out and what stands in for it, to follow a number of layers; empty for the full model.

    Args:
        plan: the plan.
        num_layers: L of the model.
    """
    layers = list(plan.left_out(num_layers))
    return (f", without layers {layers}" if layers else "") + (", bridges in their place" if plan.shape.bridged else "")


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
