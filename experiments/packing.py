"""What packing saves in supervised fine-tuning: padding on HH and GSM8K, and the time of an update.

    python -m experiments.packing --data FOLDER [--json FILE]        (about five minutes on two idle cores)

FOLDER has the original files of both in `hh_harmless` and `gsm8k`. Three arrangements of the same examples, drawn at
random into batches of 64:

    longest   every prompt and every answer as long as the longest of all
    buckets   answers as long as a quarter of that that holds the batch's longest: what runs without packing do
    packed    several examples in a row

`padding` is the share of computed tokens that are of no example. Times are of SmolLM2-135M, one update on a batch.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nested_reft.cli.arguments import Parser, whole
from nested_reft.data.packing import packed_batch
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.prompts import EncodedExample
from nested_reft.data.sources import DatasetSource
from nested_reft.data.written import completion_tokens, demonstration, written_batch
from nested_reft.json_files import write_json
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.learner import Learner, completion_bucket
from nested_reft.training.offline import offline_task
from nested_reft.training.setup import Setup, prepare
from nested_reft.types import TrainBatch

BATCH = 64


def configs(data: Path) -> dict[str, Config]:
    """The configuration of each data set.

    Args:
        data: the folder of both.
    """
    base = load_config("smollm2_hh_sft")

    def on(name: str, dataset: str, folder: str) -> Config:
        source = DatasetSource(name, dataset, None, 300, seed=0, folder=str(data / folder))
        rollout = dataclasses.replace(base.rollout, max_completion_tokens=256)
        return dataclasses.replace(base, data=dataclasses.replace(base.data, sources=(source,)), rollout=rollout)

    return {"HH": on("hh", "hh_harmless_test", "hh_harmless"), "GSM8K": on("gsm8k", "gsm8k", "gsm8k")}


def arrangements(setup: Setup, examples: list[EncodedExample], longest: int) -> dict[str, TrainBatch]:
    """One batch in each of the three arrangements.

    Args:
        setup: of the run.
        examples: of the batch.
        longest: tokens of the longest answer of all.
    """
    data, tokenizer = setup.data, setup.policy.tokenizer
    encode, stop_id = tokenizer.encode, tokenizer.stop_ids[0]
    prompts = batch_prompts(examples, [0] * len(examples), data.prompt_size)
    texts = [demonstration(each.example)[0] for each in examples]
    bucket = completion_bucket(max(completion_tokens(text, encode) for text in texts), longest)
    rows = [[text] for text in texts]
    size, multiple = data.prompt_size - data.shared_prefix + longest, -(-len(examples) // 8)
    return {
        "longest": written_batch(prompts, rows, (1.0,), encode, stop_id, longest),
        "buckets": written_batch(prompts, rows, (1.0,), encode, stop_id, bucket),
        "packed": packed_batch(prompts, texts, encode, stop_id, data.shared_prefix, size, multiple),
    }


def computed_tokens(batch: TrainBatch, shared_prefix: int) -> int:
    """Tokens that a pass over a batch computes; those that all prompts share count where each row has them anew.

    Args:
        batch: in any arrangement.
        shared_prefix: leading tokens that all prompts have in common.
    """
    once = 0 if batch.segment_BGC is not None else shared_prefix
    return len(batch.prompt_BP) * (batch.prompt_BP.shape[1] - once + batch.tokens_BGC.shape[-1])


def seconds_of(setup: Setup, batch: TrainBatch, longest: int) -> tuple[float, float]:
    """Time of an update, once it is compiled, and its loss.

    Args:
        setup: its policy is trained.
        batch: in any arrangement.
        longest: tokens of the longest answer of all.
    """
    learner = Learner(setup.policy)
    learner.begin(offline_task(setup.config, setup.data.shared_prefix, longest))
    loss = learner.update(learner.written_batch(batch)).loss
    started = time.monotonic()
    learner.update(learner.written_batch(batch))
    return time.monotonic() - started, loss


def measure(name: str, setup: Setup, timed: int) -> list[dict[str, Any]]:
    """Padding of one pass over the data in each arrangement, and the time of an update on a first few examples.

    Args:
        name: of the data set.
        setup: its run.
        timed: how many examples.
    """
    examples, encode = list(setup.data.train_examples[0]), setup.policy.tokenizer.encode
    order = np.random.default_rng(0).permutation(len(examples))
    lengths = [completion_tokens(demonstration(each.example)[0], encode) for each in examples]
    longest, prefix = max(lengths), setup.data.shared_prefix
    kept, computed = 0, dict[str, int]()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[start : start + BATCH].tolist()
        kept += sum(len(examples[row].tokens) - prefix + lengths[row] for row in rows)
        for arrangement, batch in arrangements(setup, [examples[row] for row in rows], longest).items():
            computed[arrangement] = computed.get(arrangement, 0) + computed_tokens(batch, prefix)
    found = []
    for arrangement, batch in arrangements(setup, [examples[row] for row in order[:timed]], longest).items():
        seconds, loss = seconds_of(setup, batch, longest)
        share = 1 - kept / computed[arrangement]
        found.append({"data": name, "arrangement": arrangement, "padding": share, "seconds": seconds, "loss": loss})
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures both data sets and prints the table.

    Args:
        arguments: of the command line; None takes those of the program.
    """
    parser = Parser("python -m experiments.packing", description="What packing saves in supervised fine-tuning.")
    parser.add_argument("--data", type=Path, required=True, help="folder with hh_harmless and gsm8k")
    parser.add_argument("--examples", type=whole(8), default=BATCH, help="of the timed update")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    known = parser.parse_args(arguments)
    found = []
    for name, config in configs(known.data).items():
        found += measure(name, prepare(config), known.examples)
        jax.clear_caches()
    columns = ("data", "arrangement", "padding", "seconds", "loss")
    rows = [[f"{line[c]:.4g}" if isinstance(line[c], float) else line[c] for c in columns] for line in found]
    print(table(list(columns), rows))
    if known.json is not None:
        write_json(known.json, {"versions": versions(), "found": found})


if __name__ == "__main__":
    main()
