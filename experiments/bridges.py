"""How cheap can a nested policy be? Plain skips, bridges, and distilled bridges on SmolLM2-135M.

KL(full || nested) per completion token, exact over the vocabulary, on held-out prompts that the full model answered.
Bridges are fitted on its answers to training prompts. Layers are chosen by the divergence of each alone, on training
prompts that nothing was fitted on.

    python -m experiments.bridges sums [--json FILE]
    python -m experiments.bridges gsm8k --folder FOLDER [--json FILE]      (the folder of GSM8K's files)

`--transfer` also measures bridges of the same plans that were fitted on the other task.
`--config` takes the model of another configuration, and its first source in the place of the sums.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from nested_reft.bridge_fitting import distil_bridges, fit_bridges
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.arguments import Parser, whole
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.data.config import DataConfig
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.sources import DatasetSource
from nested_reft.divergence import Texts, measure_layer_divergence, measure_plan_divergence, texts_of
from nested_reft.json_files import write_json
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.models.parameters import Parameters
from nested_reft.prompt_format import PromptFormat
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import Setup, prepare

COUNTS = (1, 3, 6, 10, 15)
BRIDGES = BridgeConfig("per_layer", ridge=0.02)
ROWS = 32  # completions that are sampled, fitted on or measured at once


@dataclasses.dataclass(frozen=True)
class Task:
    """What the full model answers.

    Attributes:
        config: gives model, prompts and sampling.
        fitted, chosen, measured: prompts to fit bridges on, to choose layers on, and held-out ones to measure on.
        group_size: completions of each prompt to fit on; layers are chosen on one, plans measured on two.
        distil_steps, distil_rate: of the distillation of each plan.
    """

    config: Config
    fitted: int
    chosen: int
    measured: int
    group_size: int
    distil_steps: int
    distil_rate: float


def sums(name: str) -> Task:
    """A configuration's first source: of `smollm2_chain_sum`, sums of two one-digit numbers after a demonstration.

    Args:
        name: of the configuration.
    """
    config = load_config(name)
    data = dataclasses.replace(config.data, sources=config.data.sources[:1])
    config = dataclasses.replace(config, data=data)
    return Task(config, fitted=116, chosen=32, measured=48, group_size=8, distil_steps=40, distil_rate=1e-4)


def gsm8k(name: str, folder: Path | None) -> Task:
    """GSM8K's questions as plain chat prompts, answered with 64 tokens.

    Args:
        name: of the configuration whose model answers.
        folder: where GSM8K's files lie; None downloads them.
    """
    base = load_config(name)
    source = DatasetSource(
        "gsm8k", "gsm8k", train_size=400, heldout_size=64, seed=1, folder=None if folder is None else str(folder)
    )
    data = DataConfig(sources=(source,), prompts_per_batch=8, max_prompt_tokens=256, prompt=PromptFormat("{question}"))
    rollout = dataclasses.replace(base.rollout, max_completion_tokens=64)
    config = dataclasses.replace(base, data=data, rollout=rollout)
    return Task(config, fitted=320, chosen=32, measured=64, group_size=1, distil_steps=60, distil_rate=3e-4)


def answers(setup: Setup, examples: Sequence[EncodedExample], group_size: int, salt: int) -> list[Texts]:
    """Completions of the full model, in batches of one shape.

    Args:
        setup: its policy answers.
        examples: the prompts; what is left over of the last batch is dropped.
        group_size: completions of each.
        salt: tells the calls of this function apart.
    """
    size, found = rows_of(group_size), []
    for start in tqdm(range(0, len(examples) - size + 1, size), desc="sampling", leave=False):
        prompts = batch_prompts(examples[start : start + size], [0] * size, setup.data.prompt_size)
        key = jax.random.fold_in(jax.random.key(salt), start)
        found.append(texts_of(setup.policy.generate(prompts, None, key, group_size=group_size)))
    return found


def rows_of(group_size: int) -> int:
    """Prompts that are answered at once.

    Args:
        group_size: completions of each.
    """
    return max(ROWS // group_size, 1)


def check_prompts(option: str, asked: int, least: int, examples: Sequence[EncodedExample]) -> None:
    """Refuses a number of prompts that fills no batch, or that the source does not have.

    Args:
        option: that asks for it.
        asked: the number.
        least: of one batch.
        examples: of the source.

    Raises:
        ValueError: names the option, the number and what is allowed.
    """
    if not least <= asked <= len(examples):
        raise ValueError(f"{option} is {asked}; allowed is {least} to {len(examples)}, a batch up to what there are")


def tokens_of(batches: Sequence[Texts]) -> int:
    """Completion tokens."""
    return sum(int(np.asarray(texts[3]).sum()) for texts in batches)


def start_of(task: Task, counts: Sequence[int]) -> Setup:
    """The full model of a task, with bridges that are zero.

    Args:
        task: what is answered.
        counts: layers to leave out.

    Raises:
        ValueError: the configuration cannot work, or there are too few prompts or layers.
    """
    setup = prepare(dataclasses.replace(task.config, nesting=NestingConfig(bridge=BRIDGES)))
    train, heldout = setup.data.train_examples[0], setup.data.heldout_examples[0]
    check_prompts("--fitted", task.fitted, rows_of(task.group_size), train)
    check_prompts("--chosen", task.chosen, rows_of(1), train[task.fitted :])
    check_prompts("--measured", task.measured, 2 * rows_of(2), heldout)  # the error of a mean needs two batches
    most = setup.config.nesting.most_skipped(setup.policy.num_layers)
    wrong = [count for count in counts if count > most]
    if wrong:
        raise ValueError(f"--layers has {wrong[0]}; allowed is 1 to {most}, so the first and the last one stay")
    return setup


def measure(setup: Setup, task: Task, counts: Sequence[int], other: Task | None = None) -> dict[str, Any]:
    """The divergences of every kind of plan, by how many layers it leaves out.

    Args:
        setup: of `start_of`.
        task: what is answered.
        counts: layers to leave out.
        other: the task that further bridges of the same plans are fitted on, if any.
    """
    model, temperature = setup.policy.model, setup.config.rollout.sampling.temperature
    train, heldout = setup.data.train_examples[0], setup.data.heldout_examples[0]
    fitted_on = answers(setup, train[: task.fitted], task.group_size, salt=1)
    fewer = {"quarter": fitted_on[: -(-len(fitted_on) // 4)]}
    if other is not None:
        there = prepare(other.config)
        examples = there.data.train_examples[0][: other.fitted]
        fewer["other task"] = answers(there, examples, other.group_size, salt=1)
    chosen_on = answers(setup, train[task.fitted : task.fitted + task.chosen], 1, salt=2)
    measured_on = answers(setup, heldout[: task.measured], 2, salt=3)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = jax.block_until_ready(function())
        seconds[name] = time.monotonic() - started
        return result

    def mean(batches: Sequence[Texts], values: Sequence[float]) -> float:
        weights = [tokens_of([texts]) for texts in batches]
        return float(np.average(values, weights=weights))

    def single(part: Part) -> np.ndarray:
        per_batch = [measure_layer_divergence(model, texts, temperature, part) for texts in chosen_on]
        return np.average(per_batch, axis=0, weights=[tokens_of([texts]) for texts in chosen_on])

    def divergence(plan: LayerPlan, bridges: Parameters) -> list[float]:
        model.load_bridges(bridges)
        return [
            float(measure_plan_divergence(model, texts, temperature, [plan], "measuring")[0]) for texts in measured_on
        ]

    def by_quarter(plan: LayerPlan) -> list[float]:
        """The mean over each quarter of the completions' positions, under the bridges as they are."""
        size = measured_on[0][2].shape[-1]
        ends = [size * quarter // 4 for quarter in range(5)]
        sums, counts = np.zeros(5), np.zeros(5)
        for prompt_BP, prompt_length_B, tokens_BGC, length_BG in measured_on:
            for index, end in enumerate(ends[1:], 1):
                texts = (prompt_BP, prompt_length_B, tokens_BGC, jnp.minimum(length_BG, end))
                found = measure_plan_divergence(model, texts, temperature, [plan], "measuring")
                sums[index] += float(found[0]) * tokens_of([texts])
                counts[index] += tokens_of([texts])
        return [round(float(kl), 4) for kl in np.diff(sums) / np.maximum(np.diff(counts), 1)]

    nothing = model.stacked_bridges()
    alone = timed("fit of all layers alone", lambda: fit_bridges(model, fitted_on, BRIDGES.ridge))
    model.load_bridges(alone)
    layer_L = {part: timed(f"measuring {part.name.lower()}", lambda part=part: single(part)) for part in PARTS}
    results = []
    for count in counts:
        row: dict[str, Any] = {"layers": count}
        for part, name in PARTS.items():
            plan = best_plan(layer_L[part], count, part)
            row[name] = mean(measured_on, divergence(plan, alone))
            row[f"{name}, layers"] = plan.left_out(model.config.num_layers)
        plan = best_plan(layer_L[Part.BRIDGE], count, Part.BRIDGE)
        runs = best_plan(layer_L[Part.BRIDGE], count, Part.BRIDGE, per_run=True)
        model.load_bridges(nothing)
        fit = partial(fit_bridges, model, fitted_on, BRIDGES.ridge, plan)
        in_sequence = timed(f"fit in sequence, {count}", fit)
        row["in sequence"] = mean(measured_on, divergence(plan, in_sequence))
        row["in sequence, by quarter"] = by_quarter(plan)
        # A fit goes through the texts with no bridge in their way, as the other fits did.
        for name, texts in fewer.items():
            model.load_bridges(nothing)
            row[name] = mean(measured_on, divergence(plan, fit_bridges(model, texts, BRIDGES.ridge, plan)))
        model.load_bridges(nothing)
        of_runs = fit_bridges(model, fitted_on, BRIDGES.ridge, runs)
        row["per run"], row["runs"] = mean(measured_on, divergence(runs, of_runs)), runs.shape.bridged
        model.load_bridges(in_sequence)
        plans = [plan] * task.distil_steps
        distil = partial(distil_bridges, model, fitted_on, temperature, plans, task.distil_rate)
        distilled = timed(f"distillation, {count}", distil)
        values = divergence(plan, distilled)
        row["distilled"] = mean(measured_on, values)
        row["standard error"] = float(np.std(values, ddof=1) / np.sqrt(len(values)))
        print({name: value for name, value in row.items() if "layers" not in name or name == "layers"}, flush=True)
        results.append(row)
    return {
        "tokens": {
            "fitted": tokens_of(fitted_on),
            "chosen": tokens_of(chosen_on),
            "measured": tokens_of(measured_on),
            **{name: tokens_of(texts) for name, texts in fewer.items()},
        },
        "layer": {PARTS[part]: [round(float(value), 4) for value in values] for part, values in layer_L.items()},
        "rows": results,
        "seconds": seconds,
        "versions": versions(),
    }


PARTS = {Part.SKIP: "skip", Part.BRIDGE: "bridge", Part.NO_ATTENTION: "no attention", Part.NO_MLP: "no mlp"}


def best_plan(divergence_L: np.ndarray, count: int, part: Part, per_run: bool = False) -> LayerPlan:
    """The plan that leaves out the layers of least divergence.

    Args:
        divergence_L: of each layer alone.
        count: layers to leave out.
        part: what is left of them.
        per_run: one bridge for each run of neighbours.
    """
    measured = NestingConfig(choice="measured", divergence_temperature=0.0, remeasure_every=1)
    plan = draw_plan(jax.random.key(0), measured, len(divergence_L), divergence_L, count)
    layers = plan.left_out(len(divergence_L))
    if per_run:
        fixed = NestingConfig(choice="fixed", layers=layers, bridge=BridgeConfig("per_run"))
        return draw_plan(jax.random.key(0), fixed, len(divergence_L))
    return LayerPlan.skipping(len(divergence_L), layers, part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    parser = Parser("experiments.bridges", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("task", choices=["sums", "gsm8k"])
    parser.add_argument("--config", default="smollm2_chain_sum", help="whose model, and whose source in place of sums")
    parser.add_argument("--folder", type=Path, help="where GSM8K's files lie; None downloads them")
    parser.add_argument("--layers", type=whole(1), nargs="+", default=COUNTS, help="how many to leave out")
    for name, what in (("fitted", "to fit bridges"), ("chosen", "to choose layers"), ("measured", "to measure plans")):
        parser.add_argument(f"--{name}", type=whole(1), help=f"prompts {what} on; left out, the task's own number")
    parser.add_argument("--distil-steps", type=whole(1), help="of each plan; left out, the task's own number")
    parser.add_argument("--transfer", action="store_true", help="also measure bridges fitted on the other task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    try:
        with checking_input():
            known = parser.parse_args(arguments)
            tasks = sums(known.config), gsm8k(known.config, known.folder)
            task, other = tasks if known.task == "sums" else reversed(tasks)
            given = {name: getattr(known, name) for name in ("fitted", "chosen", "measured", "distil_steps")}
            task = dataclasses.replace(task, **{name: value for name, value in given.items() if value is not None})
            setup = start_of(task, known.layers)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = measure(setup, task, known.layers, other if known.transfer else None)
    print(report(found))
    if known.json is not None:
        write_json(known.json, found)
    return 0


def report(found: dict[str, Any]) -> str:
    """The tables of `measure`'s results: plans by the number of layers, and single layers.

    Args:
        found: what it returned.
    """
    names = [*found["layer"], "in sequence", "quarter", "per run", "runs", "distilled", "standard error"]
    names += ["other task"] if "other task" in found["tokens"] else []
    rows = [[row["layers"], *(f"{row[n]:.3f}" if n != "runs" else row[n] for n in names)] for row in found["rows"]]
    single = found["layer"]
    layers = [[i, *(f"{v[i]:.3f}" for v in single.values())] for i in range(len(single["bridge"]))]
    seconds = {name: round(value, 1) for name, value in found["seconds"].items()}
    quarters = [
        f"{row['layers']} layers, by quarter of the positions: {row['in sequence, by quarter']}"
        for row in found["rows"]
    ]
    tables = table(["layers", *names], rows), table(["layer", *single], layers)
    return "\n".join([*tables, *quarters, f"{found['tokens']} {seconds}"])


if __name__ == "__main__":
    sys.exit(main())
