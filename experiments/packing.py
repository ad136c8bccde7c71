"""How much padding packing saves in supervised fine-tuning on HH and GSM8K.

    python -m experiments.packing --data FOLDER [--json FILE]

FOLDER has the original files in `hh_harmless` and `gsm8k`. One pass over the training examples in random batches of 64,
as SmolLM2 reads them, in three arrangements:

    longest   every prompt and every answer as long as the longest of all
    buckets   answers as long as the quarter of that which holds the batch's longest: what runs without packing do
    packed    several examples in a row; the number of rows is a multiple of 8

`padding` is the share of the computed tokens that are of no example. `products` are the matrix products of a pass,
relative to `buckets`: a packed row computes the vocabulary's part for its prompts' tokens as well.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import add_json, command, experiment_parser
from nested_reft.cli.arguments import keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.data.packing import fitted
from nested_reft.data.sources import DatasetSource
from nested_reft.data.written import completion_tokens, demonstration
from nested_reft.models.parameters import parameter_shapes
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.learner import completion_bucket
from nested_reft.training.setup import Setup, prepare

BATCH, MULTIPLE = 64, 8


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


def computed(prompts: list[int], answers: list[int], prompt_size: int, longest: int) -> dict[str, tuple[int, int]]:
    """Tokens that a pass over one batch computes in each arrangement, and how many of them the vocabulary is put to.

    Args:
        prompts: tokens of each prompt of its own, without what all share.
        answers: tokens of each answer, with its stop token.
        prompt_size, longest: the largest of each in all batches.
    """
    bucket = completion_bucket(max(answers), longest)
    lengths = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    rows = math.ceil(len(fitted(lengths, prompt_size + longest)) / MULTIPLE) * MULTIPLE
    count, packed = len(prompts), rows * (prompt_size + longest)
    return {
        "longest": (count * (prompt_size + longest), count * longest),
        "buckets": (count * (prompt_size + bucket), count * bucket),
        "packed": (packed, packed),
    }


def measure(setup: Setup) -> dict[str, dict[str, float]]:
    """Padding and matrix products of one pass over the data, by arrangement.

    Args:
        setup: gives the examples, the tokenizer and the sizes of the model.
    """
    data, examples, encode = setup.data, setup.data.train_examples[0], setup.policy.tokenizer.encode
    prompt_E = np.array([len(each.tokens) - data.shared_prefix for each in examples])
    answer_E = np.array([completion_tokens(demonstration(each.example)[0], encode) for each in examples])
    order_E, kept, sums = np.random.default_rng(0).permutation(len(examples)), 0, dict[str, np.ndarray]()
    for start in range(0, len(order_E) - BATCH + 1, BATCH):
        rows = order_E[start : start + BATCH]
        kept += int(prompt_E[rows].sum() + answer_E[rows].sum())
        size = data.prompt_size - data.shared_prefix
        for name, counts in computed(prompt_E[rows].tolist(), answer_E[rows].tolist(), size, answer_E.max()).items():
            sums[name] = sums.get(name, 0) + np.array(counts)
    shapes = parameter_shapes(setup.policy.model.config)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers") and len(shape) == 3)
    vocabulary = setup.policy.model.config.vocab_size * setup.policy.model.config.width
    products = {name: float(tokens * layers + scored * vocabulary) for name, (tokens, scored) in sums.items()}
    return {
        name: {"padding": 1 - kept / float(tokens), "products": products[name] / products["buckets"]}
        for name, (tokens, _) in sums.items()
    }


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both data sets and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("packing", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with hh_harmless and gsm8k")
    add_json(parser, "the numbers")
    known = parser.parse_args(arguments)
    with checking_input():
        setups = {name: prepare(config) for name, config in configs(known.data).items()}
    found: dict[str, Any] = {name: measure(setup) for name, setup in setups.items()}
    rows = [
        [data, name, f"{values['padding']:.2f}", f"{values['products']:.2f}"]
        for data, arrangements in found.items()
        for name, values in arrangements.items()
    ]
    print(table(["data", "arrangement", "padding", "products"], rows))
    keep_json(known.json, {"versions": versions(), "found": found})


if __name__ == "__main__":
    sys.exit(main())
