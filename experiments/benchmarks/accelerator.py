"""What does an accelerator do that is at hand for minutes? Its ceilings, and how near to them this project comes.

    python -m experiments.benchmarks.accelerator [--minutes 8] [--small] [--parts decode rollouts] [--json FILE]

Random weights in the shape of Qwen2.5-1.5B, or those of SmolLM2-135M with `--model smollm2-135m`, on one device. The
parts come in the order of their value: ceilings, decode steps, whole rollouts, exact rollouts, updates, and the same
work by transformers and torch where they are installed. Each prints its table as it ends.

No case begins after `--minutes`, and what is left is named; the case that runs then still ends, so leave a minute or
two more. `--json` is written after each case, so that nothing is lost when the process is killed. What does not fit
into memory, or fails, is a line of its table. A second call with `--parts` measures what the first one left; give it
another file for `--json`, and `JAX_COMPILATION_CACHE_DIR` spares it the programs that were compiled there. `--small` is
a tiny shape for a CPU; it shows that everything works, and no speed that matters.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.arguments import add_json, add_list, command, experiment_parser
from experiments.benchmarks.accelerator_parts import PARTS, SMALL, SMALL_SHAPE, Bench, Job, Part, Row, Sizes
from experiments.benchmarks.common import MODEL
from experiments.benchmarks.peers import Skipped
from nested_reft.cli.arguments import keep_json, number
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.exit_codes import DONE, FAILED
from nested_reft.models.registry import QWEN2_5_SHAPE, model_shape
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.

    Returns:
        `FAILED` where no case has figures.
    """
    options = experiment_parser("benchmarks.accelerator", __doc__)
    above_zero = number("more than 0", lambda value: value > 0)
    options.add_argument("--minutes", type=above_zero, default=8.0, help="after which no case begins")
    options.add_argument("--small", action="store_true", help="a tiny shape and little work, for a CPU")
    options.add_argument("--model", choices=[MODEL], help="real weights; left out, random ones")
    add_list(options, "--parts", PARTS, choices=list(PARTS), help="what to measure, in this order")
    add_json(options)
    known = options.parse_args(arguments)
    deadline, about = time.monotonic() + 60 * known.minutes, versions()
    if about["platform"] == "cpu" and not known.small:
        raise BadInput("there is no accelerator here, and a CPU would take hours; use --small")
    with checking_input():
        config = model_shape(known.model) if known.model else SMALL_SHAPE if known.small else QWEN2_5_SHAPE
    print(f"{about['device']}, JAX {about['jax']}, commit {about['commit'] or 'unknown'}", flush=True)
    bench = Bench(SMALL if known.small else Sizes(), config, known.model, lambda: deadline - time.monotonic())
    options_used = vars(known) | {"json": str(known.json)}
    results: dict[str, list[Row]] = {}
    for name in known.parts:

        def keep(rows: list[Row], name: str = name) -> None:
            results[name] = rows
            keep_json(known.json, {"versions": about, "arguments": options_used, "parts": results})

        rows = part_rows(PARTS[name], bench, keep)
        print(f"\n{PARTS[name].title}\n{part_table(PARTS[name], rows)}\n", flush=True)
    is_measured = any("skipped" not in row for rows in results.values() for row in rows)
    return DONE if is_measured else FAILED


def part_rows(part: Part, bench: Bench, keep: Callable[[list[Row]], None]) -> list[Row]:
    """The rows of a part; a job that was skipped or failed has one that says why.

    Args:
        part: what to measure.
        bench: what it is measured with.
        keep: is told all rows so far after each job.
    """
    rows: list[Row] = []
    try:
        jobs = part.jobs(bench)
    except Exception as error:  # such as weights that do not fit; other parts may need less
        keep([{"case": part.title, "skipped": reason_of(error)}])
        return [{"case": part.title, "skipped": reason_of(error)}]
    for job in jobs:
        rows += job_rows(job, bench)
        keep(part.compared(rows))
    return part.compared(rows)


def job_rows(job: Job, bench: Bench) -> list[Row]:
    """The rows of a job, or the one that says why there are none."""
    if bench.seconds_left() <= 0:
        return [{"case": job.case, "skipped": "no time was left"}]
    print(f"{job.case} ({bench.seconds_left():.0f} s left)", flush=True)
    try:
        return [{"case": job.case} | row for row in job.measure()]
    # Whatever goes wrong with one case, the device is at hand for the others now and perhaps not again.
    except Exception as error:
        reason = reason_of(error)
    gc.collect()  # the arrays of what failed
    return [{"case": job.case, "skipped": reason}]


def reason_of(error: Exception) -> str:
    """Why a case has no figures, in one line."""
    if isinstance(error, Skipped):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return "does not fit into memory"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"failed: {type(error).__name__}: {first[:150]}"


def part_table(part: Part, rows: Sequence[Row]) -> str:
    """A line for each row, and below the table one for each that has no figures."""
    cells: list[list[Any]] = [
        [row["case"], *(column(row) for column in part.columns.values())] for row in rows if "skipped" not in row
    ]
    lines = [f"{row['case']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join([*([table(["case", *part.columns], cells)] if cells else []), *lines])


if __name__ == "__main__":
    sys.exit(main())
