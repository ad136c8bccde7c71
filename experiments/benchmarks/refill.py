"""Does refilling rows pay? Long-tailed completions by rows that take what waits, and by batches that only shrink.

    python -m experiments.benchmarks.refill [--rows 16 32] [--alone 8] [--json FILE]

SmolLM2-135M in float32, prompts of 64 tokens, completions of up to 512. Lengths are the quantiles of a log-normal
distribution with mean 64 and longest 512, shuffled. For each row that is decoded at a time there are five prompts, so
that four wait. Batches of that many rows come one after the other and drop the rows that end, as rollouts do without
`rollout.rows`. A third variant decodes all prompts as one batch: it takes the most memory. What is sampled must be the
same, token for token, but for rare ties: rows that stand elsewhere add up in another order, and where a random number
falls between two tokens by less than that rounding, the completion goes on otherwise from there. The table counts the
completions that do. `--alone` compares so many prompts with batches of one as well. Where more differ than ties
explain, the command fails, after it has printed the table and kept the results.

A row ends at its length because its draw there is replaced: a random number of 0 draws token 0, which stops it. The
programs are those that ship otherwise.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments.arguments import add_list, command
from experiments.benchmarks.common import MODEL, disturbance, parser, plain, prepare_process, shown, write_results
from experiments.benchmarks.ours import policy_of, prompts_of
from experiments.benchmarks.worker import Case, measure_all
from nested_reft.cli.arguments import whole
from nested_reft.cli.bad_input import BadInput
from nested_reft.cli.output import complain
from nested_reft.exit_codes import DONE, FAILED
from nested_reft.layer_plan import LayerPlan
from nested_reft.models.transformer import Transformer
from nested_reft.reports.tables import table
from nested_reft.rollout import drawing
from nested_reft.rollout.generate import generate
from nested_reft.rollout.refill import generate_refilled
from nested_reft.rollout.sampling import SamplingConfig, row_keys, row_uniforms
from nested_reft.sharding import to_host
from nested_reft.types import Rollouts

ROWS = (16, 32)
PROMPTS_PER_ROW = 5
PROMPT_TOKENS, NEW_TOKENS, MEAN_TOKENS = 64, 512, 64
MOST_TIES = 0.1  # of the completions; a fault of the caches changes nearly all
STOP = 0  # the first token of the vocabulary, which the smallest random number draws


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        `FAILED` where more completions differ than ties explain.
    """
    known = parser("refill", __doc__)
    add_list(known, "--rows", ROWS, type=whole(1), help="that are decoded at the same time")
    known.add_argument("--alone", type=whole(0), default=0, help="prompts that are also sampled in a batch of one")
    known = known.parse_args(arguments)
    if known.alone > PROMPTS_PER_ROW * min(known.rows):
        most = PROMPTS_PER_ROW * min(known.rows)
        raise BadInput(f"--alone is {known.alone}; allowed is 0 to {most}, the prompts of {min(known.rows)} rows")
    prepare_process(known.threads)
    model, found = policy_of(MODEL).model, []
    for rows in known.rows:
        print(f"{PROMPTS_PER_ROW * rows} prompts by {rows} rows", flush=True)
        found += refill_rows(model, rows, known.repeats, known.alone)
    print(f"\n{refill_table(found)}\n{disturbance(found)}")
    for line in alone_lines(found):
        print(line)
    write_results(known, {"threads": known.threads, "rows": plain(found)})
    # Last, so that a fault does not cost the figures.
    for line in (faults := too_different(found)):
        complain(f"error: {line}")
    return FAILED if faults else DONE


def refill_rows(model: Transformer, rows: int, repeats: int, alone: int) -> list[dict[str, Any]]:
    """All prompts in batches of so many rows, by as many rows that are refilled, and all at once, timed in turn.

    Args:
        model: what samples.
        rows: that are decoded at the same time.
        repeats: timed calls of each; the best counts.
        alone: how many prompts are also sampled one by one, untimed.
    """
    case = Case(PROMPTS_PER_ROW * rows, 1, PROMPT_TOKENS, NEW_TOKENS)
    length_N = long_tailed(case.prompts)
    calls = {
        "batches that shrink": sampler(model, case, length_N, rows),
        "refilled rows": sampler(model, case, length_N, rows, refilled=True),
        "all rows at once": sampler(model, case, length_N, case.prompts),
    }
    tokens: dict[str, Int[np.ndarray, "N C"]] = {}

    def keeping(name: str) -> None:
        tokens[name] = calls[name]()  # each call samples the same

    times = measure_all([partial(keeping, name) for name in calls], repeats)
    first = tokens["batches that shrink"]
    if alone:
        tokens["rows alone"] = sampler(model, case, length_N, 1)(alone)
    differing = {
        name: int((first[: len(other)] != other).any(axis=1).sum())
        for name, other in tokens.items()
        if other is not first
    }
    sampled = lengths_of(first)
    named = {"system": "ours", "case": case, "rows": rows, "alone": alone}
    named |= {"differing_alone": differing.get("rows alone")}
    named |= {"tokens": int(sampled.sum()), "mean_length": float(sampled.mean()), "longest": int(sampled.max())}
    named_rows = [named | {"variant": name, "differing": differing.get(name)} for name in calls]
    return [row | timing for row, timing in zip(named_rows, times, strict=True)]


def too_different(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each comparison in which more completions differ than ties explain; one may always."""
    compared = [(row["variant"], row["differing"], row["case"].prompts) for row in rows]
    compared += [("rows alone", row["differing_alone"], row["alone"]) for row in _with_alone(rows)]
    return [
        f"{count} of {completions} completions of {name} are others"
        for name, count, completions in compared
        if count is not None and count > max(1, MOST_TIES * completions)
    ]


def alone_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What `--alone` found, in a line for each number of rows."""
    return [
        f"{row['rows']} rows: {row['differing_alone']} of {row['alone']} completions differ from those of rows alone"
        for row in _with_alone(rows)
    ]


def _with_alone(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of rows that were also sampled alone."""
    return list({row["rows"]: row for row in rows if row["alone"]}.values())


def lengths_of(tokens_NC: Int[np.ndarray, "N C"]) -> Int[np.ndarray, " N"]:
    """Tokens of each completion, the one that stopped it included."""
    return (tokens_NC != STOP).cumprod(axis=1).sum(axis=1) + 1


def long_tailed(count: int, mean: int = MEAN_TOKENS, longest: int = NEW_TOKENS) -> Int[np.ndarray, " N"]:
    """Lengths whose logarithms are normal, with that mean and that longest one, in random order."""
    score_N = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    low, high = 0.0, 2.0
    for _ in range(40):  # halvings; a wider spread with the same longest has a smaller mean
        spread = (low + high) / 2
        found_N = np.maximum(np.round(longest * np.exp(spread * (score_N - score_N[-1]))), 1)
        low, high = (spread, high) if found_N.mean() > mean else (low, spread)
    return np.random.default_rng(0).permutation(found_N.astype(np.int32))


def sampler(
    model: Transformer, case: Case, length_N: Int[np.ndarray, " N"], rows: int, refilled: bool = False
) -> Callable[..., Int[np.ndarray, "N C"]]:
    """What samples all prompts, or the first so many, under a plan or the full model, and returns their tokens.

    Args:
        model: what samples.
        case: the prompts.
        length_N: tokens after which each row ends.
        rows: prompts of a batch, or rows that are refilled.
        refilled: one call for all prompts instead of one for each batch.
    """
    prompts, key = prompts_of(case, model.config.vocab_size), jax.random.key(0)
    key_N1, full = row_keys(key, jnp.arange(case.prompts), 1), LayerPlan.full(model.config.num_layers)
    program = _program(key_N1, jnp.asarray(length_N), case.new_tokens, rows if refilled else None)

    def call(count: int = case.prompts, plan: LayerPlan = full) -> Int[np.ndarray, "N C"]:
        batch = count if refilled else rows
        found = [
            program(
                model,
                jnp.asarray(prompts.tokens_BP[start : start + batch]),
                jnp.asarray(prompts.length_B[start : start + batch]),
                plan,
                jnp.array([STOP]),
                key,
                number_B=jnp.arange(start, start + batch),
            )
            for start in range(0, count, batch)
        ]
        return np.concatenate([part.tokens_BGC[:, 0] for part in to_host(found)])

    return call


def _program(key_N1: Array, length_N: Array, new_tokens: int, rows: int | None) -> Callable[..., Rollouts]:
    """A program of its own, whose rows end at their lengths.

    Args:
        key_N1: by which the prompts draw, and by which a draw knows its prompt.
        length_N: tokens of each.
        new_tokens: C.
        rows: that are refilled; None for batches.
    """
    words_N = jax.random.key_data(key_N1)[:, 0, 0]

    def draws(key: Array, position: Array) -> Float[Array, "2 *rows"]:
        number = jnp.argmax(jax.random.key_data(key)[..., :1] == words_N, axis=-1)
        return jnp.where(position + 1 >= length_N[number], 0.0, jnp.maximum(row_uniforms(key, position), 1e-6))

    options = {"group_size": 1, "max_completion_tokens": new_tokens, "sampling": SamplingConfig()}
    chosen = generate if rows is None else generate_refilled
    options |= {} if rows is None else {"rows": rows}

    def traced(*arrays: Any, **named: Any) -> Rollouts:
        drawing.row_uniforms = draws  # read while it is traced
        try:
            return inspect.unwrap(chosen)(*arrays, **named, **options)
        finally:
            drawing.row_uniforms = row_uniforms

    return jax.jit(traced)


def refill_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each measurement; what others take is relative to the batches of as many rows."""
    header = [
        "rows",
        "prompts",
        "variant",
        "mean",
        "longest",
        "s",
        "tokens/s",
        "faster",
        "differ",
        "first s",
        "peak GB",
    ]
    cells = []
    for row in rows:
        base = next(x for x in rows if x["rows"] == row["rows"])
        cells.append(
            [
                row["rows"],
                row["case"].prompts,
                row["variant"],
                f"{row['mean_length']:.1f}",
                row["longest"],
                f"{row['seconds']:.1f}",
                f"{row['tokens'] / row['seconds']:.1f}",
                f"{base['seconds'] / row['seconds']:.2f}x",
                shown(row["differing"], "d"),
                f"{row['first_seconds']:.1f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            ]
        )
    return table(header, cells)


if __name__ == "__main__":
    sys.exit(main())
