"""What more devices cost where the work stays the same: rollout and update on 1, 2, 4 and 8 virtual CPU devices.

    python -m experiments.scaling [--json FILE] [--figure FILE]

The batch of a configuration is divided over more and more devices of one machine. They share its cores, so nothing gets
faster: what is seen is the price of division. Each layout runs in a process of its own. There the rollout of the full
model, and the update, are compiled, counted in the compiled text (`verification.pod_costs`), and timed on arrays of
constants. Times are those of the processor, all threads together, so other work on the machine hardly counts.

    expected   the least time of the machine: the larger one of all devices' products over the rate of products, and
               their traffic and exchanges over that of memory (`plan_price.CEILINGS`)
    exchanges  collectives that a device takes part in, and the bytes that it sends
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.arguments import add_json, add_list, command, experiment_parser, new_file
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.command import THREADS_PER_DEVICE
from nested_reft.layer_plan import PlanShape
from nested_reft.plan_price import Ceilings, ceilings_of
from nested_reft.program_cache import cache_directory
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.config import load_config
from nested_reft.verification.pod_costs import ProgramCost, rollout_cost, update_cost

PROGRAMS = ("rollout", "update")
AXES = ("data", "fsdp")
Found = dict[str, dict[str, float]]


def expected_seconds(cost: dict[str, Any], rates: Ceilings) -> float:
    """The least time in which one machine can do what all devices do.

    Args:
        cost: of one device, as `ProgramCost` has it.
        rates: of the machine.
    """
    flops, moved = cost["flops"], cost["hbm_bytes"] + cost["ici_bytes"]
    return cost["devices"] * max(flops / rates.flops_per_second, moved / rates.bytes_per_second)


def figures(cost: dict[str, Any], seconds: Sequence[float], rates: Ceilings) -> dict[str, float]:
    """The row of a program.

    Args:
        cost: as in `expected_seconds`.
        seconds: of the timed calls.
        rates: of the machine.
    """
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "expected": expected_seconds(cost, rates),
        "exchanges": sum(each["times"] for each in cost["collectives"]),
        "sent_bytes": cost["ici_bytes"],
    }


def constants(arguments: Any) -> Any:
    """Arrays of the shapes that a program was compiled for. All values of a kind are alike, for time does not ask."""

    def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 0.01 if np.issubdtype(leaf.dtype, np.floating) else 1
        return jax.device_put(np.full(leaf.shape, value, leaf.dtype), leaf.sharding)

    return jax.tree.map(filled, arguments)


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Processor seconds of each call, after one that is not counted.

    Args:
        call: returns arrays.
        repeats: how many count.
    """
    seconds = []
    for _ in range(1 + repeats):
        started = time.process_time()
        jax.block_until_ready(call())
        seconds.append(time.process_time() - started)
    return seconds[1:]


def measure(name: str, mesh: MeshConfig, repeats: int) -> Found:
    """Compiles, counts and times both programs on the devices of this process.

    Args:
        name: of the configuration.
        mesh: all devices.
        repeats: timed calls of each.
    """
    training, devices = dataclasses.replace(load_config(name), mesh=mesh), make_mesh(mesh)
    assert training.model.shape is not None
    seconds: dict[str, list[float]] = {}

    def run_rollout(compiled: Any, shapes: tuple[Any, ...]) -> None:
        weights, prompts, length_B, plan, stop_ids, key = constants(shapes)
        # Prompts have all their tokens, no completion ends early, and the plan keeps each layer once.
        length_B, stop_ids = length_B * prompts.shape[1], stop_ids * -1
        seconds["rollout"] = timed(lambda: compiled(weights, prompts, length_B, plan, stop_ids, key), repeats)

    def run_update(compiled: Any, shapes: tuple[Any, ...]) -> None:
        state, *others = constants(shapes)
        kept = [state]

        def call() -> Any:
            kept[0], result = compiled(kept[0], *others)  # it takes the buffers of the state
            return kept[0], result

        seconds["update"] = timed(call, repeats)

    shape, full = training.model.shape, PlanShape(training.model.shape.num_layers)
    costs: dict[str, ProgramCost] = {
        "rollout": rollout_cost(shape, training, devices, full, run_rollout),
        "update": update_cost(shape, training, devices, run_update),
    }
    rates = ceilings_of(jax.devices()[0].device_kind)
    return {program: figures(cost.to_json(), seconds[program], rates) for program, cost in costs.items()}


def in_a_process(name: str, mesh: MeshConfig, repeats: int) -> Found:
    """The same in a process that has as many devices as the mesh."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(mesh.size),
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory()),
        "NPROC": str(THREADS_PER_DEVICE * mesh.size),
        "XLA_FLAGS": "",
    }
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "found.json"
        child = json.dumps({"name": name, "mesh": dataclasses.asdict(mesh), "repeats": repeats, "path": str(written)})
        subprocess.run([sys.executable, "-m", "experiments.scaling", "--child", child], env=environment, check=True)
        return json.loads(written.read_text())


def rows_of(found: dict[str, Found], program: str) -> list[list[str]]:
    """The table of a program, with times beside those of one device.

    Args:
        found: by layout, that of one device first.
        program: one of `PROGRAMS`.
    """
    one = next(iter(found.values()))[program]
    return [
        [
            layout,
            f"{1000 * each[program]['seconds']:.1f}",
            f"{each[program]['seconds'] / one['seconds']:.2f}",
            f"{1000 * each[program]['expected']:.2f}",
            f"{each[program]['expected'] / one['expected']:.2f}",
            f"{each[program]['exchanges']:.0f}",
            f"{each[program]['sent_bytes'] / 1000:.1f}",
        ]
        for layout, each in found.items()
    ]


def draw(found: dict[str, Found], path: Path) -> None:
    """A panel for each program: measured and expected time, beside one device.

    Args:
        found: as in `rows_of`.
        path: of the PNG.
    """
    figure = figure_maker()(figsize=(8, 3), layout="constrained")
    for axis, program in zip(figure.subplots(1, len(PROGRAMS)), PROGRAMS, strict=True):
        one = next(iter(found.values()))[program]
        for key, label in (("seconds", "measured"), ("expected", "expected")):
            axis.plot(list(found), [each[program][key] / one[key] for each in found.values()], "o-", label=label)
        axis.set(title=program, ylabel="time, one device = 1", ylim=(0, None))
        axis.tick_params(axis="x", rotation=30)
        axis.legend()
    figure.savefig(path, dpi=120)


def layout_of(text: str) -> dict[str, Any]:
    """The type of the option by which `in_a_process` names a layout: name, mesh, repeats, and where to write."""
    with contextlib.suppress(json.JSONDecodeError):
        layout = json.loads(text)
        if isinstance(layout, dict) and layout.keys() == {"name", "mesh", "repeats", "path"}:
            return layout
    raise argparse.ArgumentTypeError(f"is {text}; allowed is what the command hands to its own processes")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every layout, and prints a table for each program.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("scaling", __doc__)
    parser.add_argument("--config", default="tiny", help="with a model from scratch; gives batch and model")
    add_list(parser, "--devices", (1, 2, 4, 8), type=whole(1), help="numbers of them, 1 first")
    add_list(parser, "--axes", AXES[:1], choices=AXES, help="of the mesh that divide the batch; fsdp the weights too")
    parser.add_argument("--repeats", type=whole(1), default=20, help="timed calls")
    parser.add_argument("--figure", type=new_file, metavar="FILE", help="also draw the tables here, as PNG")
    add_json(parser, "the numbers")
    parser.add_argument("--child", type=layout_of, help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    if known.child:
        found = measure(known.child["name"], MeshConfig(**known.child["mesh"]), known.child["repeats"])
        Path(known.child["path"]).write_text(json.dumps(found))
        return
    if known.devices[0] != 1:
        raise BadInput("--devices does not begin with 1, which the others are compared with")
    meshes = {"1": MeshConfig()}
    meshes |= {f"{count}, {axis}": MeshConfig(**{axis: count}) for axis in known.axes for count in known.devices[1:]}
    with checking_input():
        config = load_config(known.config)
        if config.model.shape is None:
            raise BadInput(f"--config is '{known.config}', whose model is not from scratch")
        for mesh in meshes.values():
            dataclasses.replace(config, mesh=mesh)  # which asks whether the batch can be divided
    everything = {layout: in_a_process(known.config, mesh, known.repeats) for layout, mesh in meshes.items()}
    for program in PROGRAMS:
        header = [f"{program}: devices", "ms", "of one", "expected ms", "of one", "exchanges", "sent kB"]
        print(table(header, rows_of(everything, program)))
    if known.figure:
        draw(everything, known.figure)
    keep_json(known.json, {"versions": versions(), "config": known.config, "found": everything})


if __name__ == "__main__":
    sys.exit(main())
