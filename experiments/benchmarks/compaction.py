"""Does dropping finished rows pay? Whole rollout calls with the compactions of `generate`, and without any.

    python -m experiments.benchmarks.compaction [--json FILE]

SmolLM2-135M in float32, 8 prompts x 8 completions, 64 prompt tokens and up to C new ones. A fixed random share
of the vocabulary ends a row, so that rows end one by one as in training; the model's choice is not uniform, so
how early they do is measured. Each compaction compiles the decode step once more: first calls show it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import command
from experiments.benchmarks.common import disturbance, exported_model, parser, plain, prepare_process, write_results
from experiments.benchmarks.ours import VARIANTS, plan_of, prompts_of
from experiments.benchmarks.worker import Case, measure_all
from nested_reft.models.transformer import Transformer
from nested_reft.reports.tables import table
from nested_reft.rollout import schedule
from nested_reft.rollout.generate import generate
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.types import Rollouts

SHIPPED = schedule.COMPACTIONS
NEW_TOKENS = (64, 128)
STOP_SHARES = (1 / 16, 1 / 48)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    known = parser("compaction", __doc__).parse_args(arguments)
    prepare_process(known.threads)
    model = VARIANTS["float32"](exported_model()[1]).model
    rows = []
    for new_tokens in NEW_TOKENS:
        for stop_share in STOP_SHARES:
            print(f"C = {new_tokens}, stop share {stop_share:.3f}", flush=True)
            rows += compaction_rows(model, Case(8, 8, 64, new_tokens), stop_share, known.repeats)
    print(f"\n{compaction_table(rows)}\n{disturbance(rows)}")
    write_results(known, {"threads": known.threads, "rows": plain(rows)})


def compaction_rows(model: Transformer, case: Case, stop_share: float, repeats: int) -> list[dict[str, Any]]:
    """The case without compactions and with them, timed in turn.

    Args:
        model: what samples.
        case: the workload.
        stop_share: the share of the vocabulary that ends a row.
        repeats: timed calls of each; the best counts.
    """
    stops = stop_ids(model.config.vocab_size, stop_share)
    rollouts = [raw_call(model, case, stops, compactions) for compactions in (0, SHIPPED)]
    found = measure_all([lambda call=call: jax.block_until_ready(call()) for call in rollouts], repeats)
    # A draw depends on nothing that stands beside its row, so the lengths of one program stand for both.
    length_BG = np.asarray(rollouts[0]().length_BG)
    named = {"system": "ours", "case": case, "stop_share": stop_share}
    named |= {"mean_length": float(length_BG.mean()), "longest": int(length_BG.max())}
    variants = ("without compactions", "with compactions")
    return [named | {"variant": variant} | row for variant, row in zip(variants, found, strict=True)]


def stop_ids(vocab_size: int, share: float) -> list[int]:
    """A random share of the vocabulary, always the same."""
    return np.random.default_rng(0).choice(vocab_size, round(share * vocab_size), replace=False).tolist()


def raw_call(model: Transformer, case: Case, stops: Sequence[int], compactions: int) -> Callable[[], Rollouts]:
    """A rollout of the case by a `generate` of its own.

    A `Policy` always calls the `generate` that ships, with its tokenizer's stop tokens. This benchmark changes
    both, so it calls the compiled function itself.

    Args:
        model: what samples.
        case: the workload.
        stops: the tokens that end a row.
        compactions: how many the program has.
    """
    prompts, generate = prompts_of(case, model.config.vocab_size), generate_with(compactions)
    prompt_BP, length_B = jnp.asarray(prompts.tokens_BP), jnp.asarray(prompts.length_B)
    plan, stop_tokens = plan_of(case, model.config.num_layers), jnp.asarray(stops, jnp.int32)

    def call() -> Rollouts:
        return generate(
            model,
            prompt_BP,
            length_B,
            plan,
            stop_tokens,
            jax.random.key(0),
            group_size=case.group,
            max_completion_tokens=case.new_tokens,
            sampling=SamplingConfig(),
        )

    return call


def generate_with(compactions: int) -> Callable[..., Rollouts]:
    """`generate` as a program of its own, with that many compactions."""

    def traced(*arrays: Any, **options: Any) -> Rollouts:
        schedule.COMPACTIONS = compactions  # read while it is traced
        return inspect.unwrap(generate)(*arrays, **options)

    return jax.jit(traced, static_argnames=("group_size", "max_completion_tokens", "sampling"))


def compaction_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each pair of rows, without and with compactions."""
    header = ["C", "stop share", "mean length", "longest", "s without", "s with", "with is", "first s without", "with"]
    cells = [
        [
            pair[0]["case"].new_tokens,
            f"{pair[0]['stop_share']:.3f}",
            f"{pair[0]['mean_length']:.1f}",
            pair[0]["longest"],
            *(f"{row['seconds']:.2f}" for row in pair),
            f"{pair[0]['seconds'] / pair[1]['seconds']:.2f}x",
            *(f"{row['first_seconds']:.1f}" for row in pair),
        ]
        for pair in zip(rows[::2], rows[1::2], strict=True)
    ]
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
