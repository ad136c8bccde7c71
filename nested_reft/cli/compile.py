"""`nested-reft compile`: what a decode step and an update cost on a TPU that is not here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.overrides import override
from nested_reft.models.config import ModelConfig
from nested_reft.models.registry import model_shape
from nested_reft.reports.tables import cost_table
from nested_reft.training.config import Config, load_config
from nested_reft.verification import compiled_costs
from nested_reft.verification.compiled_costs import Cost


def run(arguments: list[str]) -> None:
    """Compiles for the topology and prints the table of costs."""
    known, overrides = _parser().parse_known_args(arguments)
    with checking_input():
        check_json(known.json)
        config = override(load_config(known.config), overrides)
        shape = _shape(config, known.model)
        # What the model does not allow shows without the compiler, which may not be installed.
        config.nesting.validate_for(shape.num_layers)
        config.nesting.bridge.validate_for(shape.width)
        devices = compiled_costs.topology_devices(known.topology)
        # Compiling stands here as well, because what the topology refuses is bad input too.
        costs = compiled_costs.configured_costs(config, shape, devices, with_update=not known.no_update)
    results = [cost.to_json() for cost in costs]
    unit = compiled_costs.device_unit(devices)
    used = config.mesh.over(len(devices)).size
    say(f"{_programs(costs)}, for {used} of {len(devices)} {unit}s of {known.topology}\n")
    say(cost_table(results, unit))
    keep_json(known.json, results)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("compile", "Compiles one decode step, full and nested, and one update for a TPU topology.")
    parser.add_argument("config", help="the configuration whose shapes to use; overrides follow as --FIELD VALUE")
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it: v5e:4x4, v5p:2x2x1, v6e:2x2, ...")
    parser.add_argument("--model", help="another model: a known name, a directory or a GGUF file")
    parser.add_argument("--no-update", action="store_true", help="leave the update out: it takes longest to compile")
    add_json(parser, "the results")
    return parser


def _shape(config: Config, model: str | None) -> ModelConfig:
    """The shape to compile for: the configuration's own, or that of `--model`. No weights are needed for it."""
    name = model or config.model.name
    # Without `--model` the configuration may be one from scratch, whose shape it holds itself.
    if name != "scratch":
        return model_shape(name)
    if config.model.shape is None:
        raise ValueError(
            f"--model is 'scratch', but configuration '{config.name}' has no model.shape; name one that has, or a model"
        )
    return config.model.shape


def _programs(costs: Sequence[Cost]) -> str:
    """Each program once, with its dtype; the decode step stands among the costs twice, full and nested."""
    return ", ".join({cost.program: f"{cost.program} in {cost.dtype}" for cost in costs}.values())
