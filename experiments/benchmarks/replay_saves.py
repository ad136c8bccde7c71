"""What a checkpoint of the store for replay costs, at any number of short completions.

    python -m experiments.benchmarks.replay_saves
    python -m experiments.benchmarks.replay_saves --completions 1000000

A store is filled with completions of 16 random tokens, 100 for each prompt, and saved. Then come steps that add and
draw 128 completions each and save again. The table has the first save and the last: the time of a step's own work on
the store, the time that a save keeps the trainer from going on, and what it wrote.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import add_json, add_list, command, experiment_parser
from nested_reft.checkpoints import Checkpoints
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.replay_saving import load_store, save_store
from nested_reft.replay_store import ReplayConfig, Store, add, draw
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.types import Prompts, Rollouts, Scored

TOKENS, PER_PROMPT = 16, 100
PROMPTS, GROUP, STEPS = 16, 8, 3  # of the steps that are measured


def batch(first: int, prompts: int, group: int, random: np.random.Generator) -> Scored:
    """Completions of random digits.

    Args:
        first: number of the first prompt.
        prompts: B, numbered one after the other.
        group: G.
        random: draws the tokens.
    """
    shape = (prompts, group)
    tokens_BGC = random.integers(1, 11, (*shape, TOKENS)).astype(np.int32)
    number_B = np.arange(first, first + prompts, dtype=np.int32)
    names = tuple(map(str, number_B.tolist()))
    length_B, ones_BG = np.ones(prompts, np.int32), np.ones(shape, np.int32)
    fields: dict[str, Any] = dict(
        prompt_BP=number_B[:, None],
        prompt_length_B=length_B,
        tokens_BGC=tokens_BGC,
        length_BG=ones_BG * TOKENS,
        finished_BG=ones_BG > 0,
        forced_BG=ones_BG * 0,
        counted_BG=ones_BG > 0,
        behavior_logprob_BGC=random.normal(size=tokens_BGC.shape).astype(np.float32),
        nested_BG=ones_BG > 0,
        full_share_BG=np.zeros(shape, np.float32),
        part_BGL=np.ones((*shape, 2), np.int8),
        version_BG=ones_BG,
        temperature_BG=np.ones(shape, np.float32),
    )
    rollouts = Rollouts(**fields)
    asked = Prompts(number_B[:, None], length_B, 0 * number_B, names, names, ({},) * prompts)
    texts = tuple(tuple("".join(map(str, row)) for row in group) for group in (tokens_BGC - 1).tolist())
    reward_BG = random.random(shape).astype(np.float32)
    return Scored(asked, rollouts, texts, reward_BG, reward_BG, ones_BG > 0, {"accuracy": reward_BG})


def measured(completions: int, directory: Path) -> dict[str, Any]:
    """Seconds and bytes of the last save, with so many completions in the store.

    Args:
        completions: a multiple of 100.
        directory: where checkpoints go.
    """
    config, random = ReplayConfig(capacity=completions, recent_share=0.5), np.random.default_rng(0)
    store, prompts = Store(), completions // PER_PROMPT
    for first in range(0, prompts, 1000):
        store = add(store, config, batch(first, min(1000, prompts - first), PER_PROMPT, random))
    found: dict[str, Any] = {"completions": completions}
    with Checkpoints(directory, keep=2) as checkpoints:
        store, found["first_save_seconds"] = _saved(store, checkpoints, 0)
        found["first_save_bytes"] = _written(directory, 0)
        for number in range(1, STEPS + 1):
            started = time.perf_counter()
            store = add(store, config, batch(prompts + number * PROMPTS, PROMPTS, GROUP, random))
            _, store = draw(store, config, jax.random.key(number), PROMPTS, GROUP)
            found["step_seconds"] = time.perf_counter() - started
            store, found["save_seconds"] = _saved(store, checkpoints, number)
        found["save_bytes"] = _written(directory, STEPS)
        started = time.perf_counter()
        load_store(checkpoints.restore_host(STEPS, blocks=True)["buffer"])
    return found | {"restore_seconds": time.perf_counter() - started}


def _saved(store: Store, checkpoints: Checkpoints, number: int) -> tuple[Store, float]:
    """The store after a save, and how long it kept the trainer."""
    started = time.perf_counter()
    store, plain = save_store(store, f"replay-{number}")
    checkpoints.save(number, {"updates": jnp.zeros(())}, {"buffer": plain})
    seconds = time.perf_counter() - started
    checkpoints.wait()
    return store, seconds


def _written(directory: Path, number: int) -> int:
    """Bytes of a checkpoint and of the block that it wrote."""
    files = [*(directory / str(number)).rglob("*"), directory / "blocks" / f"replay-{number}.safetensors"]
    return sum(path.stat().st_size for path in files if path.is_file())


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("benchmarks.replay_saves", __doc__)
    add_list(parser, "--completions", (10_000, 100_000, 1_000_000), type=whole(PER_PROMPT), help="in the store")
    add_json(parser, "the figures")
    known = parser.parse_args(arguments)
    found = []
    for completions in known.completions:
        with tempfile.TemporaryDirectory() as directory:
            found.append(measured(completions, Path(directory)))
    print(table(list(found[0]), [[_short(value) for value in row.values()] for row in found]))
    keep_json(known.json, {"versions": versions(), "saves": found})


def _short(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    sys.exit(main())
