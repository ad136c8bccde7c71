"""Does a long run leave anything behind? Memory, threads, open files and the queue, while thousands of steps go by.

    python -m experiments.endurance
    python -m experiments.endurance --backend ray --steps 6000

`tiny` without its warm start, with the smallest batches (two prompts, two completions), a lag of 2 and two searchers.
Each step writes its log line, as in a run. The table has a row at the beginning, where programs are compiled, and at
each quarter. It needs Linux, whose `/proc` says what a process holds; memory is that of the learner's process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import add_json, add_steps, command, experiment_parser
from nested_reft.cli.arguments import keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.reports.tables import table
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training import record
from nested_reft.training.config import Config, load_config
from nested_reft.training.search_config import check_backend
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer


def endurance_config(backend: str, steps: int) -> Config:
    """The run.

    Args:
        backend: who searches.
        steps: of the run.
    """
    return load_config(
        "tiny",
        train={"steps": steps},
        data={"prompts_per_batch": 2},
        rollout={"group_size": 2},
        warm_start={"steps": 0},
        search={"backend": backend, "lag": 2, "searchers": 1 if backend == "inline" else 2},
    )


def held(run: Trainer, step: int) -> dict[str, int]:
    """What the process holds now.

    Args:
        run: in progress.
        step: counted from 1.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "memory (MB)": pages * os.sysconf("SC_PAGE_SIZE") // 10**6,
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "batches under way": len(run.pool),
    }


def measured(config: Config) -> list[dict[str, int]]:
    """What a run holds after a thirtieth of its steps, and after each quarter.

    Args:
        config: of the run.
    """
    steps, rows = config.train.steps, list[dict[str, int]]()
    looks = {max(steps // 30, 1), *(max(steps * quarter // 4, 1) for quarter in (1, 2, 3, 4))}
    with tempfile.TemporaryDirectory() as folder, Trainer(prepare(config), RunDirectory(Path(folder))).open() as run:
        for number in range(steps):
            found = run.step(number)
            run.run_directory.log_metrics(found.number, record.metrics(found, config, run.state.data.source_names))
            if found.number in looks:
                rows.append(held(run, found.number))
    return rows


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Takes the steps and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("endurance", __doc__)
    parser.add_argument("--backend", choices=("inline", "thread", "ray"), default="thread", help="who searches")
    add_steps(parser, 6000, what="of the run")
    add_json(parser, "the figures")
    known = parser.parse_args(arguments)
    with checking_input():
        config = endurance_config(known.backend, known.steps)
        check_backend(config.search)
    rows = measured(config)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    keep_json(known.json, {"versions": versions(), "backend": known.backend, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
