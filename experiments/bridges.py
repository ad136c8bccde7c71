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

from experiments.arguments import add_json, add_list, command, experiment_parser
from nested_reft.bridge_fitting import distil_bridges, fit_bridges
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.data.config import DataConfig
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.sources import DatasetSource
from nested_reft.divergence import Texts, measure_layer_divergence, measure_plan_divergence, texts_of
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


@dataclasses.dataclass(frozen=True)
class Task:
    """What the full model answers.

    Attributes:
        config: gives model, prompts and sampling.
        fitted, chosen, measured: prompts to fit bridges on, to choose layers on, and held-out ones to measure on.
        rows: completions that are sampled, fitted on or measured at once.
        group_size: completions of each prompt to fit on; layers are chosen on one, plans measured on two.
        distil_steps, distil_rate: of the distillation of each plan.
    """

    config: Config
    fitted: int
    chosen: int
    measured: int
    rows: int
    group_size: int
    distil_steps: int
    distil_rate: float

    def batch_of(self, group_size: int) -> int:
        """Prompts that are answered at once.

        Args:
            group_size: completions of each.
        """
        return max(self.rows // group_size, 1)


def sums(name: str) -> Task:
    """A configuration's first source: of `smollm2_chain_sum`, sums of two one-digit numbers after a demonstration.

    Args:
        name: of the configuration.
    """
    config = load_config(name)
    data = dataclasses.replace(config.data, sources=config.data.sources[:1])
    config = dataclasses.replace(config, data=data)
    return Task(config, fitted=116, chosen=32, measured=48, rows=32, group_size=8, distil_steps=40, distil_rate=1e-4)


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
    return Task(config, fitted=96, chosen=32, measured=64, rows=16, group_size=4, distil_steps=60, distil_rate=3e-4)


def answers(setup: Setup, examples: Sequence[EncodedExample], size: int, group_size: int, salt: int) -> list[Texts]:
    """Completions of the full model, in batches of one shape.

    Args:
        setup: its policy answers.
        examples: the prompts; what is left over of the last batch is dropped.
        size: prompts of a batch.
        group_size: completions of each.
        salt: tells the calls of this function apart.
    """
    found = []
    for start in tqdm(range(0, len(examples) - size + 1, size), desc="sampling", leave=False):
        prompts = batch_prompts(examples[start : start + size], [0] * size, setup.data.prompt_size)
        key = jax.random.fold_in(jax.random.key(salt), start)
        found.append(texts_of(setup.policy.generate(prompts, None, key, group_size=group_size)))
    return found


def _answers(setup: Setup, task: Task, examples: Sequence[EncodedExample], group_size: int, salt: int) -> list[Texts]:
    return answers(setup, examples, task.batch_of(group_size), group_size, salt)


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
    if len(examples) < least:
        raise ValueError(f"{option} needs {least} prompts, a batch; the source has {len(examples)} left")
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
    check_prompts("--fitted", task.fitted, task.batch_of(task.group_size), train)
    check_prompts("--chosen", task.chosen, task.batch_of(1), train[task.fitted :])
    check_prompts("--measured", task.measured, 2 * task.batch_of(2), heldout)  # the error of a mean needs two batches
    most = setup.config.nesting.most_skipped(setup.policy.num_layers)
    wrong = [count for count in counts if count > most]
    if wrong:
        raise ValueError(f"--layers has {wrong[0]}; allowed is 1 to {most}, so the first and the last one stay")
    return setup


class Measurement:
    """What every plan of one command is fitted and measured on.

    Attributes:
        model: the full model, whose bridges each fit and each measurement replace.
        fitted_on, chosen_on, measured_on: answers to fit bridges on, to choose layers on, and to measure plans on.
        fewer: answers of further fits, by their name: a quarter of `fitted_on`, and those of another task.
        seconds: that the named parts took.
    """

    def __init__(self, setup: Setup, task: Task, other: Task | None) -> None:
        train, heldout = setup.data.train_examples[0], setup.data.heldout_examples[0]
        self.model, self._temperature = setup.policy.model, setup.config.rollout.sampling.temperature
        self._nothing = self.model.stacked_bridges()
        self.fitted_on = _answers(setup, task, train[: task.fitted], task.group_size, salt=1)
        self.fewer = {"quarter": self.fitted_on[: -(-len(self.fitted_on) // 4)]}
        if other is not None:
            there = prepare(other.config)
            examples = there.data.train_examples[0][: other.fitted]
            self.fewer["other task"] = _answers(there, other, examples, other.group_size, salt=1)
        self.chosen_on = _answers(setup, task, train[task.fitted : task.fitted + task.chosen], 1, salt=2)
        self.measured_on = _answers(setup, task, heldout[: task.measured], 2, salt=3)
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[[], Any]) -> Any:
        """What a function returns, its seconds kept under a name."""
        started = time.monotonic()
        result = jax.block_until_ready(function())
        self.seconds[name] = time.monotonic() - started
        return result

    def fit(self, texts: Sequence[Texts], plan: LayerPlan | None = None) -> Parameters:
        """Bridges of a plan, or of every layer alone; no earlier bridge is in the way of the texts."""
        self.model.load_bridges(self._nothing)
        return fit_bridges(self.model, texts, BRIDGES.ridge, plan)

    def single_layers(self, part: Part) -> np.ndarray:
        """Nats per token of each layer of which only a part is left, under the bridges as they are."""
        per_batch = [measure_layer_divergence(self.model, texts, self._temperature, part) for texts in self.chosen_on]
        return np.average(per_batch, axis=0, weights=[tokens_of([texts]) for texts in self.chosen_on])

    def divergences(self, plan: LayerPlan, bridges: Parameters) -> list[float]:
        """Nats per token of each batch."""
        self.model.load_bridges(bridges)
        return [self._divergence(plan, texts) for texts in self.measured_on]

    def mean(self, plan: LayerPlan, bridges: Parameters) -> float:
        """Nats per token of all batches."""
        return self._weighted(self.divergences(plan, bridges))

    def by_quarter(self, plan: LayerPlan, bridges: Parameters) -> list[float]:
        """Nats per token in each quarter of the completions' positions."""
        self.model.load_bridges(bridges)
        size = self.measured_on[0][2].shape[-1]
        ends = [size * quarter // 4 for quarter in range(5)]
        sums, counts = np.zeros(5), np.zeros(5)
        for prompt_BP, prompt_length_B, tokens_BGC, length_BG in self.measured_on:
            for index, end in enumerate(ends[1:], 1):
                texts = (prompt_BP, prompt_length_B, tokens_BGC, jnp.minimum(length_BG, end))
                sums[index] += self._divergence(plan, texts) * tokens_of([texts])
                counts[index] += tokens_of([texts])
        return [round(float(kl), 4) for kl in np.diff(sums) / np.maximum(np.diff(counts), 1)]

    def distilled(self, task: Task, plan: LayerPlan, bridges: Parameters) -> dict[str, float]:
        """Nats per token after distillation, and the standard error of such a mean over batches."""
        self.model.load_bridges(bridges)
        plans = [plan] * task.distil_steps
        distil = partial(distil_bridges, self.model, self.fitted_on, self._temperature, plans, task.distil_rate)
        values = self.divergences(plan, self.timed(f"distillation, {len(plan.left_out(self.num_layers))}", distil))
        error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
        return {"distilled": self._weighted(values), "standard error": error}

    @property
    def num_layers(self) -> int:
        """L of the model."""
        return self.model.config.num_layers

    def tokens(self) -> dict[str, int]:
        """Completion tokens of each set of answers."""
        sets = {"fitted": self.fitted_on, "chosen": self.chosen_on, "measured": self.measured_on, **self.fewer}
        return {name: tokens_of(texts) for name, texts in sets.items()}

    def _divergence(self, plan: LayerPlan, texts: Texts) -> float:
        return float(measure_plan_divergence(self.model, texts, self._temperature, [plan], "measuring")[0])

    def _weighted(self, values: Sequence[float]) -> float:
        return float(np.average(values, weights=[tokens_of([texts]) for texts in self.measured_on]))


def measure(
    setup: Setup, task: Task, counts: Sequence[int], other: Task | None, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The divergences of every kind of plan, by how many layers it leaves out.

    Args:
        setup: of `start_of`.
        task: what is answered.
        counts: layers to leave out.
        other: the task that further bridges of the same plans are fitted on, if any.
        keep: called with what is measured so far, after the single layers and after each number of layers.
    """
    on = Measurement(setup, task, other)
    alone = on.timed("fit of all layers alone", lambda: on.fit(on.fitted_on))
    on.model.load_bridges(alone)
    layer_L = {
        part: on.timed(f"measuring {name}", lambda part=part: on.single_layers(part)) for part, name in PARTS.items()
    }
    found: dict[str, Any] = {
        "tokens": on.tokens(),
        "layer": {PARTS[part]: [round(float(value), 4) for value in values] for part, values in layer_L.items()},
        "rows": [],
        "seconds": on.seconds,
        "versions": versions(),
    }
    keep(found)
    for count in counts:
        row = row_of(on, task, count, layer_L, alone)
        found["rows"].append(row)
        keep(found)
        print({name: value for name, value in row.items() if "layers" not in name or name == "layers"}, flush=True)
    return found


def row_of(
    on: Measurement, task: Task, count: int, layer_L: dict[Part, np.ndarray], alone: Parameters
) -> dict[str, Any]:
    """The plans that leave out so many layers, each kind with its own best ones.

    Args:
        on: the answers.
        task: how bridges are distilled.
        count: layers to leave out.
        layer_L: the divergence of single layers, by what is left of them.
        alone: bridges that were fitted without others.
    """
    row: dict[str, Any] = {"layers": count}
    for part, name in PARTS.items():
        plan = best_plan(layer_L[part], count, part)
        row[name] = on.mean(plan, alone)
        row[f"{name}, layers"] = plan.left_out(on.num_layers)
    plan = best_plan(layer_L[Part.BRIDGE], count, Part.BRIDGE)
    runs = best_plan(layer_L[Part.BRIDGE], count, Part.BRIDGE, per_run=True)
    in_sequence = on.timed(f"fit in sequence, {count}", lambda: on.fit(on.fitted_on, plan))
    row["in sequence"] = on.mean(plan, in_sequence)
    row["in sequence, by quarter"] = on.by_quarter(plan, in_sequence)
    for name, texts in on.fewer.items():
        row[name] = on.mean(plan, on.fit(texts, plan))
    row["per run"], row["runs"] = on.mean(runs, on.fit(on.fitted_on, runs)), runs.shape.bridged
    return row | on.distilled(task, plan, in_sequence)


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


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("bridges", __doc__)
    parser.add_argument("task", choices=["sums", "gsm8k"])
    parser.add_argument("--config", default="smollm2_chain_sum", help="whose model, and whose source in place of sums")
    parser.add_argument("--folder", type=Path, help="where GSM8K's files lie; None downloads them")
    add_list(parser, "--layers", COUNTS, type=whole(1), help="how many to leave out")
    for name, what in (("fitted", "to fit bridges"), ("chosen", "to choose layers"), ("measured", "to measure plans")):
        parser.add_argument(f"--{name}", type=whole(1), help=f"prompts {what} on; left out, the task's own number")
    parser.add_argument("--distil-steps", type=whole(1), help="of each plan; left out, the task's own number")
    parser.add_argument("--transfer", action="store_true", help="also measure bridges fitted on the other task")
    add_json(parser)
    known = parser.parse_args(arguments)
    with checking_input():
        tasks = sums(known.config), gsm8k(known.config, known.folder)
        task, other = tasks if known.task == "sums" else reversed(tasks)
        given = {name: getattr(known, name) for name in ("fitted", "chosen", "measured", "distil_steps")}
        task = dataclasses.replace(task, **{name: value for name, value in given.items() if value is not None})
        setup = start_of(task, known.layers)
    # Hours may be measured, so a command that is stopped leaves what it has.
    keep = partial(keep_json, known.json)
    print(report(measure(setup, task, known.layers, other if known.transfer else None, keep)))


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
