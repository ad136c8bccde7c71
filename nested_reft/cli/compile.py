"""`nested-reft compile`: what rollouts and updates cost on a TPU that is not here, and which slice they fit on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.cli.overrides import override
from nested_reft.json_files import read_json_object
from nested_reft.models.config import ModelConfig
from nested_reft.models.registry import model_shape
from nested_reft.reports.tables import collective_table, cost_table, program_table, resource_table
from nested_reft.training.config import Config, load_config
from nested_reft.training.mesh_choice import idle_reason
from nested_reft.verification import compiled_costs, pod_costs, slice_choice
from nested_reft.verification.compiled_costs import Cost


def run(arguments: list[str]) -> None:
    """Compiles for the topology and prints what it costs, or finds the smallest slices of several models."""
    known, overrides = _parser().parse_known_args(arguments)
    with checking_input():
        check_json(known.json)
        _check_table(known)
        config = override(load_config(known.config), overrides)
        if not known.no_rollout:
            # Said at once, though the compiler may not be installed.
            pod_costs.check_plain_rollouts(config)
    if known.table:
        _table(known, config)
    else:
        _costs(known, config)


def _check_table(known: argparse.Namespace) -> None:
    """Refuses options that nothing would read."""
    if not known.table:
        for name in ("models", "generations"):
            if getattr(known, name) is not None:
                raise ValueError(
                    f"--{name} is given without --table; it belongs to --table, so add that or leave it out"
                )
    elif known.no_rollout != known.no_update:
        given = "--no-rollout" if known.no_rollout else "--no-update"
        raise ValueError(f"{given} is given alone with --table; allowed are --no-rollout and --no-update, or neither")


def _costs(known: argparse.Namespace, config: Config) -> None:
    with checking_input():
        shape = _shape(config, known.model)
        # What the model does not allow shows without the compiler, which may not be installed.
        config.nesting.validate_for(shape.num_layers)
        config.nesting.bridge.validate_for(shape.width)
        devices = compiled_costs.topology_devices(known.topology, config.mesh.slices)
        if config.mesh.data == "auto":
            config = slice_choice.with_mesh(config, shape, devices)
            if idle := idle_reason(config, len(devices)):
                say(f"{config.mesh.describe()}: {idle}")
        mesh = compiled_costs.checked_mesh(config, shape, devices)
        # Compiling stands here as well, because what the topology refuses is bad input too.
        costs = compiled_costs.decode_costs(config, shape, mesh) if not known.no_decode else []
        programs = pod_costs.rollout_costs(shape, config, mesh) if not known.no_rollout else []
        if not known.no_update:
            programs.append(pod_costs.update_cost(shape, config, mesh))
    unit = compiled_costs.device_unit(devices)
    slices = f"{config.mesh.slices} slices of " if config.mesh.slices > 1 else ""
    say(f"{_names(costs, config, programs)}, for {mesh.size} of {len(devices)} {unit}s of {slices}{known.topology}\n")
    steps, whole = [cost.to_json() for cost in costs], [program.to_json() for program in programs]
    tables = [cost_table(steps, unit)] if steps else []
    if whole:
        tables += [program_table(whole, unit), collective_table(whole, unit)]
    say("\n\n".join(tables))
    keep_json(known.json, [*steps, *whole])


def _table(known: argparse.Namespace, config: Config) -> None:
    """The smallest slice of each generation for each model, all parameters trained and adapters alone."""
    with checking_input():
        shapes = {name: model_shape(name) for name in known.models or slice_choice.MODELS}
        generations = known.generations or tuple(slice_choice.SLICES)
        for generation in generations:
            slice_choice.slices_of(generation)
        # Rows that an earlier call has found are kept, for each takes minutes.
        done = read_json_object(known.json).get("rows", []) if known.json is not None else []
        # With nothing to compile, the bound is left.
        compiles = not known.no_rollout
        for row in slice_choice.minimum_resources(config, shapes, generations, done, compiles):
            done = [*done, row]
            keep_json(known.json, {"rows": done})
    say(resource_table(done))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "compile",
        "Compiles one decode step and a whole rollout, full and nested, and one update for a TPU topology. Rollouts are"
        " those without rollout.rows.",
    )
    parser.add_argument("config", help="the configuration whose shapes to use; overrides follow as --FIELD VALUE")
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it: v5e:4x4, v5p:2x2x1, v6e:2x2, ...")
    parser.add_argument("--model", help="another model: a known name, a directory or a GGUF file")
    for name in ("decode", "rollout", "update"):
        parser.add_argument(f"--no-{name}", action="store_true", help=f"leave the {name} out, to save time")
    parser.add_argument(
        "--table",
        action="store_true",
        help="find the smallest slice for each model instead; --json keeps the rows, and --no-rollout --no-update finds"
        " it by a lower bound",
    )
    names = {"models": slice_choice.MODELS, "generations": tuple(slice_choice.SLICES)}
    for name, default in names.items():
        parser.add_argument(f"--{name}", nargs="+", help=f"of --table; {', '.join(default)} if not given")
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


def _names(costs: Sequence[Cost], config: Config, programs: Sequence[pod_costs.ProgramCost]) -> str:
    """Each program once, with its dtype; most stand among the costs twice, full and nested."""
    weights = config.model.dtype if config.rollout.weights == "target" else config.rollout.weights
    dtypes = {cost.program: cost.dtype for cost in costs}
    dtypes |= {each.program: weights if each.program == "rollout" else config.model.dtype for each in programs}
    return ", ".join(f"{program} in {dtype}" for program, dtype in dtypes.items())
