"""Questions that reasoning-gym generates, offline: one task at one difficulty."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nested_reft.data.examples import Example

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked of reasoning-gym.

    Attributes:
        field: where it stands in the configuration, for messages.
        source: name of the source.
        task: a reasoning-gym dataset name.
        parameters: fields of that task's configuration.
    """

    field: str
    source: str
    task: str
    parameters: Mapping[str, int]


def draw_task(task: Task, train_size: int, heldout_size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Draws `(train, heldout)`, which share no question and hold none twice.

    Different seeds alone would not do: two-term one-digit sums have only 200 distinct questions.
    So the held-out list is drawn first, from its own seed, and then kept out of the training list.
    When the task runs out of distinct questions, held-out keeps its size, training gets what
    remains, and a warning states how many. The number of draws is bounded (`_max_draws`).

    The held-out list does not depend on `train_size`, and the training list on `heldout_size` only
    through the questions withheld from it. A few reasoning-gym tasks vary with PYTHONHASHSEED as
    well (`chain_sum` does not).

    Raises:
        ValueError: unknown task or parameter, refused parameter value, or no question left to
            train on.
        ImportError: reasoning-gym is not installed.
    """
    heldout_seed, train_seed = (_task_seed(seed, part) for part in range(2))
    heldout = _draw_distinct(task, heldout_seed, heldout_size, excluded=frozenset())
    heldout_questions = frozenset(example.question for example in heldout)
    train = _draw_distinct(task, train_seed, train_size, excluded=heldout_questions)
    if not train:
        raise ValueError(
            f"{task.field}.heldout_size is {heldout_size}, and all {len(heldout)} distinct questions that"
            f" '{task.task}' gave with {dict(task.parameters)} went there; none is left to train on:"
            " lower heldout_size or widen the parameters"
        )
    for part, got, asked in (("heldout", heldout, heldout_size), ("train", train, train_size)):
        if len(got) < asked:
            logger.warning(
                "source '%s': %d distinct %s questions instead of the %d asked for; '%s' gives no more with %s",
                task.source,
                len(got),
                part,
                asked,
                task.task,
                dict(task.parameters),
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


def _draw_distinct(task: Task, seed: int, size: int, excluded: frozenset[str]) -> list[Example]:
    """Up to `size` examples with different questions, none of them in `excluded`, in order of drawing."""
    examples: dict[str, Example] = {}
    for entry in _task_entries(task, seed, _max_draws(size + len(excluded))):
        # What the reward needs to make the verifier of this very task.
        verifier = {"source_dataset": task.task, "source_parameters": dict(task.parameters)}
        metadata = {**entry["metadata"], **verifier}
        example = Example(entry["question"], str(entry["answer"]), task.source, metadata)
        if example.question not in excluded:
            examples.setdefault(example.question, example)
        if len(examples) == size:
            break
    return list(examples.values())


def _task_entries(task: Task, seed: int, num_draws: int) -> Iterator[dict[str, Any]]:
    """The entries of a reasoning-gym dataset, one by one, once its name and parameters are checked."""
    try:
        import reasoning_gym  # Slow to import, and not needed by those who bring their own examples.
    except ImportError as error:
        raise ImportError(
            f"source '{task.source}' needs the package reasoning-gym; run: pip install 'nested_reft[tasks]'"
        ) from error
    tasks = reasoning_gym.factory.DATASETS
    if task.task not in tasks:
        near = difflib.get_close_matches(task.task, tasks) or sorted(tasks)
        raise ValueError(
            f"{task.field}.task is '{task.task}', which reasoning-gym does not have;"
            f" did you mean one of: {', '.join(near)}"
        )
    allowed = {f.name for f in dataclasses.fields(tasks[task.task][1])} - {"seed", "size"}
    for name in task.parameters:
        if name not in allowed:
            raise ValueError(
                f"{task.field}.parameters names '{name}'; '{task.task}' allows: {', '.join(sorted(allowed))}"
            )
    try:
        dataset = reasoning_gym.create_dataset(task.task, seed=seed, size=num_draws, **task.parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{task.field}.parameters is {dict(task.parameters)}; '{task.task}' refuses it: {error}"
        ) from error
    return (dataset[index] for index in range(num_draws))
