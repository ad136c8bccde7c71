"""Sources: where questions with checkable answers come from.

A source is one distribution of questions. The curriculum chooses between sources, evaluation
reports each one on its own, and `Prompts.source_B` holds a source's index. Today every source is
generated offline by reasoning-gym.

To add a source:

- another reasoning-gym task, or another difficulty of one: no code, only a `SourceConfig` with
  the task's name and parameters (`python -c "import reasoning_gym as r; print(*r.factory.DATASETS)"`
  lists the names; a task's parameters are the fields of its configuration dataclass).
- another kind of data: write a function from its own frozen configuration to
  `(train, heldout)`, two lists of `Example`, and have `load_source` dispatch on that
  configuration's type. Keep the promises of `load_source`: no question twice, none in both lists,
  the same lists for the same configuration.

The reward must be able to read the answers: `rewards.reward.check_answers` says so before training.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One question and what is needed to check an answer to it.

    Attributes:
        question: the text asked, without instruction or chat template.
        answer: the gold answer.
        source: name of the source that it came from.
        metadata: whatever the source's verifier needs beyond the answer.
        reference: a known-good completion, if the source has one.
    """

    question: str
    answer: str
    source: str
    metadata: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One reasoning-gym task at one difficulty.

    Attributes:
        name: label of the source in logs and reports, e.g. `one_digit`.
        task: a reasoning-gym dataset name, e.g. `chain_sum`.
        parameters: fields of that task's configuration, e.g. `{"min_terms": 2, "max_terms": 2}`.
        train_size: distinct training questions asked for.
        heldout_size: distinct held-out questions asked for.
        seed: decides every question; 0 or more.
    """

    name: str
    task: str
    parameters: dict[str, int]
    train_size: int
    heldout_size: int
    seed: int

    def __post_init__(self):
        if not self.name.strip():
            raise ValueError("sources.name is empty; give the source a label, such as 'one_digit'")
        for size in ("train_size", "heldout_size"):
            if getattr(self, size) < 1:
                raise ValueError(
                    f"sources.{size} is {getattr(self, size)} in source '{self.name}'; allowed is 1 or more"
                )
        if self.seed < 0:
            raise ValueError(f"sources.seed is {self.seed} in source '{self.name}'; allowed is 0 or more")


def exactly(**values: int) -> dict[str, int]:
    """Parameters that fix ranges of a task at one value: `terms=3` is `min_terms` and `max_terms` 3."""
    return {f"{bound}_{name}": value for name, value in values.items() for bound in ("min", "max")}


def difficulty_ladder(
    task: str, levels: Mapping[str, dict[str, int]], train_size: int, heldout_size: int, seed: int
) -> tuple[SourceConfig, ...]:
    """One source for each difficulty of a task, the easiest first, as curricula expect them.

    Args:
        task: a reasoning-gym dataset name.
        levels: label of each source and the task's parameters, e.g. `{"two_terms": exactly(terms=2)}`.
        train_size, heldout_size, seed: of every source, as in `SourceConfig`.
    """
    return tuple(
        SourceConfig(label, task, dict(parameters), train_size, heldout_size, seed)
        for label, parameters in levels.items()
    )


def load_source(config: SourceConfig) -> tuple[list[Example], list[Example]]:
    """Generates the training and the held-out examples of one source.

    The two lists share no question text and neither holds a question twice. Different seeds alone
    would not do: two-term one-digit sums have only 200 distinct questions. So the held-out list is
    drawn first, from its own seed, and then kept out of the training list. The promise is for one
    source; two sources of the same task may share questions where their difficulties overlap.

    When the task runs out of distinct questions, held-out keeps its size, training gets what
    remains, and a warning states how many. The number of draws is bounded (`_max_draws`).

    The lists depend on `config` alone, the held-out list not on `train_size`, and the training list
    on `heldout_size` only through the questions withheld from it. A few reasoning-gym tasks vary
    with PYTHONHASHSEED as well (`chain_sum` does not).

    Returns:
        `(train, heldout)`.

    Raises:
        ValueError: unknown task or parameter, refused parameter value, or no question left to
            train on.
        ImportError: reasoning-gym is not installed.
    """
    heldout_seed, train_seed = (_task_seed(config.seed, part) for part in range(2))
    heldout = _draw_distinct(config, heldout_seed, config.heldout_size, excluded=frozenset())
    heldout_questions = frozenset(example.question for example in heldout)
    train = _draw_distinct(config, train_seed, config.train_size, excluded=heldout_questions)
    if not train:
        raise ValueError(
            f"sources.heldout_size is {config.heldout_size} in source '{config.name}', and all {len(heldout)}"
            f" distinct questions that '{config.task}' gave with {config.parameters} went there; none is left"
            " to train on: lower heldout_size or widen the parameters"
        )
    for part, got, asked in (("heldout", heldout, config.heldout_size), ("train", train, config.train_size)):
        if len(got) < asked:
            logger.warning(
                "source '%s': %d distinct %s questions instead of the %d asked for; '%s' gives no more with %s",
                config.name,
                len(got),
                part,
                asked,
                config.task,
                config.parameters,
            )
    return train, heldout


def _task_seed(seed: int, part: int) -> int:
    """A 31-bit seed, far from that of the other part: reasoning-gym seeds question i with seed + i."""
    return int(np.random.SeedSequence([seed, part]).generate_state(1)[0] >> 1)


def _max_draws(num_questions: int) -> int:
    """Draws after which a task counts as exhausted.

    Of n equally likely questions, 20 n draws miss any given one with probability e^-20.
    """
    return 1000 + 20 * num_questions


def _draw_distinct(config: SourceConfig, seed: int, size: int, excluded: frozenset[str]) -> list[Example]:
    """Up to `size` examples with different questions, none of them in `excluded`, in order of drawing."""
    examples: dict[str, Example] = {}
    for entry in _task_entries(config, seed, _max_draws(size + len(excluded))):
        example = Example(entry["question"], str(entry["answer"]), config.name, dict(entry["metadata"]))
        if example.question not in excluded:
            examples.setdefault(example.question, example)
        if len(examples) == size:
            break
    return list(examples.values())


def _task_entries(config: SourceConfig, seed: int, num_draws: int) -> Iterator[dict[str, Any]]:
    """The entries of a reasoning-gym dataset, one by one, once its name and parameters are checked."""
    try:
        import reasoning_gym  # Slow to import, and not needed by those who bring their own examples.
    except ImportError as error:
        raise ImportError(
            f"source '{config.name}' needs the package reasoning-gym; run: pip install 'nested_reft[tasks]'"
        ) from error
    tasks = reasoning_gym.factory.DATASETS
    if config.task not in tasks:
        near = difflib.get_close_matches(config.task, tasks) or sorted(tasks)
        raise ValueError(
            f"sources.task is '{config.task}' in source '{config.name}', which reasoning-gym does not have;"
            f" did you mean one of: {', '.join(near)}"
        )
    allowed = {f.name for f in dataclasses.fields(tasks[config.task][1])} - {"seed", "size"}
    for name in config.parameters:
        if name not in allowed:
            raise ValueError(
                f"sources.parameters names '{name}' in source '{config.name}';"
                f" '{config.task}' allows: {', '.join(sorted(allowed))}"
            )
    try:
        dataset = reasoning_gym.create_dataset(config.task, seed=seed, size=num_draws, **config.parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"sources.parameters is {config.parameters} in source '{config.name}'; '{config.task}' refuses it: {error}"
        ) from error
    return (dataset[index] for index in range(num_draws))
