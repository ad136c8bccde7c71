"""Questions that reasoning-gym generates, offline: one task at one difficulty."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
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
        level: a level of that task's own scale of difficulty, 0 the easiest; None for no such level.
    """

    field: str
    source: str
    task: str
    parameters: Mapping[str, Any]
    level: int | None = None


def draw_task(task: Task, train_size: int, heldout_size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Draws `(train, heldout)`, which share no question and hold none twice.

    Different seeds alone would not do: two-term one-digit sums have only 200 distinct questions.
    So the held-out list is drawn first, from its own seed, and then kept out of the training list.
    When the task runs out of distinct questions, held-out keeps its size, training gets what
    remains, and a warning states how many. The number of draws is bounded (`_max_draws`).

    The held-out list does not depend on `train_size`, and the training list on `heldout_size` only
    through the questions withheld from it. A few reasoning-gym tasks vary with PYTHONHASHSEED as
    well (`chain_sum` does not).

    Args:
        task: what is asked of reasoning-gym.
        train_size: distinct training questions wanted, 1 or more.
        heldout_size: distinct held-out questions wanted, 1 or more.
        seed: decides every question; 0 or more.

    Returns:
        `(train, heldout)`, in the order of drawing.

    Raises:
        ValueError: unknown task or parameter, refused parameter value, or no question left to
            train on.
        ImportError: reasoning-gym is not installed.
    """
    task = _at_level(task)
    heldout_seed, train_seed = (_task_seed(seed, part) for part in range(2))
    # Held-out questions come first: they keep their number where a task has few distinct ones.
    heldout = _draw_distinct(task, heldout_seed, heldout_size, excluded=frozenset())
    heldout_questions = frozenset(example.question for example in heldout)
    train = _draw_distinct(task, train_seed, train_size, excluded=heldout_questions)
    if not train:
        raise ValueError(
            f"{task.field}.heldout_size is {heldout_size}, and all {len(heldout)} distinct questions that"
            f" '{task.task}' gave with {dict(task.parameters)} went there; none is left to train on:"
            " lower heldout_size or widen the parameters"
        )
    # Fewer questions than asked for are no error, because a small task may simply have no more.
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


def _at_level(task: Task) -> Task:
    """The task with its level written out as parameters; those that are given by hand stay as they are.

    Every attribute that the task's scale names takes that level alone, or its highest if it has fewer:
    levels that held the easier ones too would not be distributions of their own.
    """
    if task.level is None:
        return task
    factory = _reasoning_gym(task).factory
    _check_name(task, factory.DATASETS)
    if task.task not in factory.CURRICULA:
        raise ValueError(f"{task.field}.level is {task.level}, but '{task.task}' has no levels; set parameters instead")
    curriculum = factory.CURRICULA[task.task]()
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if not 0 <= task.level <= highest:
        raise ValueError(f"{task.field}.level is {task.level}; '{task.task}' allows 0 to {highest}")
    parameters = {}
    for attribute in curriculum.attributes.values():
        # A scale with fewer levels stays at its highest.
        value = attribute.levels[min(task.level, len(attribute.levels) - 1)]
        # Ranges have two fields in the task's configuration, other attributes have one.
        if hasattr(attribute, "lower_field_name"):
            ends = value if isinstance(value, Iterable) else _range_ends(attribute, task.level)
            parameters |= {attribute.lower_field_name: min(ends), attribute.upper_field_name: max(ends)}
        else:
            parameters[attribute.field_name] = value
    # Parameters given by hand come last, so they win.
    return dataclasses.replace(task, parameters=parameters | dict(task.parameters), level=None)


def _range_ends(attribute: Any, level: int) -> tuple[Any, Any]:
    """The ends of a range at one level; some ranges must span two levels to hold anything."""
    top = len(attribute.levels) - 1
    if not attribute.ensure_interval:
        return attribute.levels[min(level, top)], attribute.levels[min(level, top)]
    # The interval ends one level up, and at the top it begins one level down.
    high = min(level + 1, top)
    return attribute.levels[max(high - 1, 0)], attribute.levels[high]


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
        # Some tasks give numbers, or None where many answers are right.
        # Some tasks, such as gsm_symbolic, come with the way to the answer.
        reference = metadata.get("answer_cot")
        example = Example(entry["question"], str(entry["answer"]), task.source, metadata, reference)
        if example.question not in excluded:
            # The first of two examples with one question stays.
            examples.setdefault(example.question, example)
        if len(examples) == size:
            break
    return list(examples.values())


def _task_entries(task: Task, seed: int, num_draws: int) -> Iterator[dict[str, Any]]:
    """The entries of a reasoning-gym dataset, one by one, once its name and parameters are checked."""
    reasoning_gym = _reasoning_gym(task)
    tasks = reasoning_gym.factory.DATASETS
    _check_name(task, tasks)
    # Seed and size are not the user's to set here.
    allowed = {f.name for f in dataclasses.fields(tasks[task.task][1])} - {"seed", "size"}
    for name in task.parameters:
        if name not in allowed:
            raise ValueError(
                f"{task.field}.parameters names '{name}'; '{task.task}' allows: {', '.join(sorted(allowed))}"
            )
    try:
        dataset = reasoning_gym.create_dataset(task.task, seed=seed, size=num_draws, **task.parameters)
    # reasoning-gym checks its parameters by assertions.
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{task.field}.parameters is {dict(task.parameters)}; '{task.task}' refuses it: {error}"
        ) from error
    # Entries are made one by one as they are asked for, so the bound on draws costs nothing.
    return (dataset[index] for index in range(num_draws))


def _reasoning_gym(task: Task) -> Any:
    try:
        import reasoning_gym  # Slow to import, and not needed by those who bring their own examples.
    except ImportError as error:
        raise ImportError(
            f"source '{task.source}' needs the package reasoning-gym; run: pip install reasoning-gym"
        ) from error
    return reasoning_gym


def _check_name(task: Task, tasks: Mapping[str, Any]) -> None:
    if task.task not in tasks:
        near = difflib.get_close_matches(task.task, tasks, cutoff=0.5) or [*sorted(tasks)[:5], "..."]
        raise ValueError(
            f"{task.field}.task is '{task.task}', which reasoning-gym does not have;"
            f" did you mean one of: {', '.join(near)}"
        )
