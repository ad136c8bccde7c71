"""How much memory does an update of long completions take? Compiled programs, and one that runs.

    python -m experiments.benchmarks.long_updates [--lengths 1024 2048 4096] [--run 4096] [--json FILE]

SmolLM2-135M in float32, one prompt of 64 tokens and 16 completions of the given length, `train.remat full`. Each length
is compiled with attention as it ships and with attention that writes all scores out, and XLA says how much memory the
program takes. `--run` makes one update of that length with the real weights and measures time and peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import add_list, command
from experiments.benchmarks.common import MODEL, exported_model, parser, prepare_process, write_results
from experiments.benchmarks.floors import update_tokens
from experiments.benchmarks.our_updates import VARIANTS, grpo_task, initial, train_batch
from experiments.benchmarks.worker import Case, peak_memory, reset_peak_memory
from nested_reft import backends
from nested_reft.cli.arguments import whole
from nested_reft.models.lora import split_trainable
from nested_reft.models.parameters import parameter_shapes
from nested_reft.models.registry import model_shape
from nested_reft.models.transformer import Transformer
from nested_reft.reports.tables import table
from nested_reft.training.step import BaseModel, LearnerTask, UpdatePlans, initial_train_state, make_update
from nested_reft.training.update_memory import update_working_bytes

PROMPT_TOKENS = 64
LONGEST = 8192 - PROMPT_TOKENS  # SmolLM2 was trained for 8,192 positions
SHIPPED = backends.LONG_ATTENTION
ATTENTION = {"blocks": SHIPPED, "all scores": 2**62}
"""From how many pairs of a query and a key on attention goes by blocks."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    options = parser("long_updates", __doc__)
    add_list(options, "--lengths", (1024, 2048, 4096), type=whole(2, LONGEST), help="tokens of each completion")
    add_list(options, "--attention", ATTENTION, choices=list(ATTENTION), help="how it is computed")
    options.add_argument("--group", type=whole(1), default=16, help="completions of the prompt")
    options.add_argument("--run", type=whole(2, LONGEST), metavar="TOKENS", help="also make one update of this length")
    known = options.parse_args(arguments)
    prepare_process(known.threads)
    rows = [
        compiled(Case(1, known.group, PROMPT_TOKENS, length), attention)
        for length in known.lengths
        for attention in known.attention
    ]
    print(f"\n{memory_table(rows)}")
    write_results(known, {"rows": rows, "run": None})  # the update may be ended by the system for its memory
    ran = run_once(Case(1, known.group, PROMPT_TOKENS, known.run), known) if known.run else None
    write_results(known, {"rows": rows, "run": ran})


def long_task(case: Case) -> LearnerTask:
    """The update of `benchmarks.updates`, with nothing kept that can be computed again."""
    return dataclasses.replace(grpo_task(case), remat="full")


def compiled(case: Case, attention: str) -> dict[str, Any]:
    """What XLA and our own prediction say of one update's memory. No array is made.

    Args:
        case: the shape of the batch.
        attention: one of `ATTENTION`.
    """
    print(f"compiling {case.group} x {case.new_tokens} tokens, attention by {attention}", flush=True)
    task, config = long_task(case), model_shape(MODEL)
    parameters = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in parameter_shapes(config).items()}
    model = jax.eval_shape(lambda parameters: Transformer(config, parameters), parameters)
    graph, trainable, frozen = split_trainable(model)
    arguments = jax.eval_shape(
        lambda trainable: (initial_train_state(trainable, task.optimizer), train_batch(case, config.vocab_size)),
        trainable,
    )
    # A function of its own, since compiled ones are kept by task.
    update = inspect.unwrap(make_update)(task)
    backends.LONG_ATTENTION = ATTENTION[attention]  # read while the update is traced
    try:
        began = time.perf_counter()
        lowered = update.lower(arguments[0], BaseModel(frozen, graph), arguments[1], UpdatePlans())
        memory = lowered.compile().memory_analysis()
        seconds = time.perf_counter() - began
        working = update_working_bytes(model, task, case.prompts, case.group, case.prompt_tokens)
    finally:
        backends.LONG_ATTENTION = SHIPPED
    weights = 4.0 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return {
        "tokens": case.new_tokens,
        "rows": case.group,
        "attention": attention,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        # Weights, two moments and the gradient; then what an update makes.
        "predicted_bytes": 4 * weights + sum(working.values()),
        "compile_seconds": seconds,
    }


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each program."""
    header = ["attention", "rows", "tokens", "peak GB", "predicted GB", "predicted is"]
    cells = [
        [
            row["attention"],
            row["rows"],
            row["tokens"],
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['predicted_bytes'] / 1e9:.2f}",
            f"{row['predicted_bytes'] / row['peak_bytes']:.2f}x",
        ]
        for row in rows
    ]
    return table(header, cells)


def run_once(case: Case, known: argparse.Namespace) -> dict[str, Any]:
    """One update with the real weights: seconds and the process's peak memory without compiling, and the loss.

    Args:
        case: the shape of the batch.
        known: the options.
    """
    task = long_task(case)
    state, base = initial(VARIANTS["float32"](exported_model()[1]), task)
    batch = train_batch(case, model_shape(MODEL).vocab_size)
    program = make_update(task).lower(state, base, batch, UpdatePlans()).compile()
    print(f"one update of {case.group} x {case.new_tokens} tokens on {known.threads} threads", flush=True)
    reset_peak_memory()  # compiling does not count
    began = time.perf_counter()
    _, result = jax.block_until_ready(program(state, base, batch, UpdatePlans()))
    seconds = time.perf_counter() - began
    assert np.isfinite(float(result.loss)) and not bool(result.nonfinite)
    peak, tokens = peak_memory(), update_tokens(case, shared_prompt=True)
    print(f"{seconds:.0f} s, {tokens / seconds:.0f} tokens/s, peak {peak / 1e9:.2f} GB, loss {float(result.loss):.4f}")
    return {"tokens": case.new_tokens, "rows": case.group, "seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    sys.exit(main())
