"""Sources: where questions with checkable answers come from.

A source is one distribution of questions. The curriculum chooses between sources, evaluation
reports each one on its own, and `Prompts.source_B` holds a source's index. There are three kinds,
and each has its own configuration:

- `TaskSource`: a reasoning-gym task at one difficulty, generated offline
  (`python -c "import reasoning_gym as r; print(*r.factory.DATASETS)"` lists the tasks; a task's
  parameters are the fields of its configuration dataclass).
- `DatasetSource`: a published dataset, such as GSM8K (`datasets.py` lists them and adds others).
- `JsonlSource`: a user's own file.

A new kind is a new configuration, told apart by the names of its fields, and a case in
`load_source`. Keep that function's promises: no question twice but for the preference pairs of a prompt, none in
both lists, the same lists for the same configuration. The reward must be able to read the answers:
`rewards.reward.check_answers` says so before training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nested_reft.data.datasets import DATASETS, load_dataset
from nested_reft.data.examples import Checker, Example, distinct
from nested_reft.data.jsonl import read_jsonl
from nested_reft.data.tasks import Task, draw_task
from nested_reft.literals import check_choice, check_whole
from nested_reft.prompt_format import PromptFormat
from nested_reft.untrusted import MAX_WHOLE

MAX_QUESTIONS = 10**7  # of one source: all are held in memory


@dataclass(frozen=True)
class TaskSource:
    """One reasoning-gym task at one difficulty.

    Attributes:
        name: label of the source in logs and reports, e.g. `one_digit`.
        task: a reasoning-gym dataset name, e.g. `chain_sum`.
        parameters: fields of that task's configuration, e.g. `{"min_terms": 2, "max_terms": 2}`. A text stands for a
            list of single characters too, such as `{"operators": "+-"}` of `basic_arithmetic`.
        train_size: distinct training questions asked for.
        heldout_size: distinct held-out questions asked for.
        seed: decides every question; 0 or more.
        level: a level of the task's own scale of difficulty, 0 the easiest; sets what `parameters` leaves open.
        prompt: how its questions become prompts; None leaves it to `data.prompt`.
        checker: how its answers are checked; None leaves it to `reward.checker`.
    """

    name: str
    task: str
    parameters: Mapping[str, int | str]
    train_size: int
    heldout_size: int
    seed: int
    level: int | None = None
    prompt: PromptFormat | None = None
    checker: Checker | None = None

    def __post_init__(self):
        _check_common(self)


@dataclass(frozen=True)
class DatasetSource:
    """A published dataset, kept as ArrayRecord by TFDS in `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    The official test split is held out; a dataset without one is split by `seed`.

    Attributes:
        name: label of the source in logs and reports.
        dataset: `gsm8k`, `svamp`, `math` or `hh_harmless_test`.
        train_size: training questions, drawn by `seed`; None for all.
        heldout_size: held-out questions, drawn by `seed`.
        seed: 0 or more.
        folder: where the original files lie; None downloads them from their official place.
        prompt: how its questions become prompts; None leaves it to `data.prompt`.
        checker: how its answers are checked; None leaves it to `reward.checker`.
    """

    name: str
    dataset: str
    train_size: int | None
    heldout_size: int
    seed: int
    folder: str | None = None
    prompt: PromptFormat | None = None
    checker: Checker | None = None

    def __post_init__(self):
        _check_common(self)
        allowed = sorted(name for name, dataset in DATASETS.items() if "train" in dataset.splits)
        if self.dataset not in allowed:
            raise ValueError(
                f"{field_path(self)}.dataset is '{self.dataset}'; allowed are {', '.join(allowed)},"
                " and any file of your own as a JsonlSource"
            )


@dataclass(frozen=True)
class JsonlSource:
    """A user's own questions: one JSON object a line.

    Attributes:
        name: label of the source in logs and reports.
        file: the JSONL file to train on; like all paths, relative to the configuration's own file.
        train_size: training questions, drawn by `seed`; None for all.
        heldout_size: held-out questions, drawn by `seed`.
        seed: 0 or more.
        heldout_file: a second file for the held-out questions; None takes them out of `file`.
        question_field, answer_field: names of the fields; all other fields go to the metadata.
            Two dialogues in the answer's field and in `rejected` need no question (HH).
        reference_field: name of the field with a known-good completion, if there is one.
        prompt: how its questions become prompts; None leaves it to `data.prompt`.
        checker: how its answers are checked; None leaves it to `reward.checker`.
    """

    name: str
    file: str
    train_size: int | None
    heldout_size: int
    seed: int
    heldout_file: str | None = None
    question_field: str = "question"
    answer_field: str = "answer"
    reference_field: str | None = None
    prompt: PromptFormat | None = None
    checker: Checker | None = None

    def __post_init__(self):
        _check_common(self)
        names = [self.question_field, self.answer_field, self.reference_field]
        # A question that is read from the answer's field would give every answer away.
        if len(set(names)) < 3:
            raise ValueError(
                f"{field_path(self)} has question_field '{self.question_field}', answer_field '{self.answer_field}' and"
                f" reference_field '{self.reference_field}'; each needs a field of its own"
            )


SourceConfig = TaskSource | DatasetSource | JsonlSource


def field_path(config: SourceConfig) -> str:
    """Where a source stands in the configuration, for messages: by its name, which is unique.

    Args:
        config: the source's configuration.
    """
    return f"data.sources.{config.name}"


def exactly(**values: int) -> dict[str, int]:
    """Parameters that fix ranges of a task at one value: `terms=3` is `min_terms` and `max_terms` 3.

    Args:
        values: name of a range in the task's configuration, without `min_` or `max_` -> its value.
    """
    return {f"{bound}_{name}": value for name, value in values.items() for bound in ("min", "max")}


def difficulty_ladder(
    task: str, levels: Mapping[str, dict[str, int]], train_size: int, heldout_size: int, seed: int
) -> tuple[TaskSource, ...]:
    """One source for each difficulty of a task, the easiest first, as curricula expect them.

    Args:
        task: a reasoning-gym dataset name.
        levels: label of each source and the task's parameters, e.g. `{"two_terms": exactly(terms=2)}`.
        train_size, heldout_size, seed: of every source, as in `TaskSource`.

    Returns:
        One configuration for each of `levels`.
    """
    return tuple(
        TaskSource(label, task, dict(parameters), train_size, heldout_size, seed)
        for label, parameters in levels.items()
    )


def load_source(config: SourceConfig) -> tuple[list[Example], list[Example]]:
    """The training and the held-out examples of one source.

    The two lists share no question text and neither holds a question twice; what is removed for
    that is reported. The promise is for one source; two sources may share questions where their
    contents overlap. The lists depend on `config` alone, and on the files that it names.

    Args:
        config: a configuration of any of the three kinds.

    Returns:
        `(train, heldout)`.

    Raises:
        ValueError: something in the source cannot work, such as no question left to train on, a
            missing file or a row without an answer; names the field, and the row.
        ImportError: an optional package is not installed.
    """
    if isinstance(config, TaskSource):
        # Messages name the field that the user wrote, so its path goes along.
        task = Task(field_path(config), config.name, config.task, config.parameters, config.level)
        train, heldout = draw_task(task, config.train_size, config.heldout_size, config.seed)
    elif isinstance(config, DatasetSource):
        train, heldout = _load_dataset(config)
    else:
        train, heldout = _load_jsonl(config)
    # Without a checker of its own, a source leaves the choice to `reward.checker`.
    if config.checker is None:
        return train, heldout
    return (
        [dataclasses.replace(example, checker=config.checker) for example in train],
        [dataclasses.replace(example, checker=config.checker) for example in heldout],
    )


def _load_dataset(config: DatasetSource) -> tuple[list[Example], list[Example]]:
    # An empty reference means that the dataset has none.
    splits = {
        split: [Example(row.question, row.answer, config.name, row.metadata, row.reference or None) for row in rows]
        for split, rows in load_dataset(config.dataset, config.folder, field_path(config)).items()
    }
    return _split(config, splits["train"], splits.get("test"))


def _load_jsonl(config: JsonlSource) -> tuple[list[Example], list[Example]]:
    def read(path: str, field: str) -> list[Example]:
        fields = (config.question_field, config.answer_field, config.reference_field)
        return read_jsonl(path, f"{field_path(config)}.{field}", config.name, *fields)

    heldout = None if config.heldout_file is None else read(config.heldout_file, "heldout_file")
    return _split(config, read(config.file, "file"), heldout)


def _split(
    config: DatasetSource | JsonlSource, rows: list[Example], heldout_rows: list[Example] | None
) -> tuple[list[Example], list[Example]]:
    """Removes duplicates, shuffles by seed, and cuts both lists to the sizes asked for.

    Rows that are held out officially but not drawn stay out of training all the same.

    Raises:
        ValueError: there are fewer rows than asked for, or none is left to train on.
    """
    # Each list has a generator of its own, so that the held-out draw does not change the order of training.
    path, generators = field_path(config), [np.random.default_rng([config.seed, part]) for part in range(2)]
    if heldout_rows is None:
        rows = _shuffled(distinct(rows, "train"), generators[0])
        heldout = rows[: config.heldout_size]
        # A prompt may have several preference pairs, and all of them stay on one side.
        asked = {example.question for example in heldout}
        train = [example for example in rows[config.heldout_size :] if example.question not in asked]
    else:
        heldout = _shuffled(distinct(heldout_rows, "heldout"), generators[0])
        # All held-out rows are excluded here, also those that the cut below leaves out.
        train = _shuffled(distinct(rows, "train", excluded=heldout), generators[1])
    if len(heldout) < config.heldout_size:
        raise ValueError(f"{path}.heldout_size is {config.heldout_size}; there are {len(heldout)} distinct rows")
    if not train:
        raise ValueError(
            f"{path}.heldout_size is {config.heldout_size}, and no question is left to train on; lower it, or add rows"
        )
    if config.train_size is not None and len(train) < config.train_size:
        raise ValueError(
            f"{path}.train_size is {config.train_size}; {len(train)} distinct rows are left beside the held-out ones"
        )
    return train[: config.train_size], heldout[: config.heldout_size]


def _shuffled(examples: list[Example], generator: np.random.Generator) -> list[Example]:
    return [examples[index] for index in generator.permutation(len(examples))]


def _check_common(config: SourceConfig) -> None:
    if not config.name.strip():
        raise ValueError("data.sources.N.name is empty; give the source a label, such as 'one_digit'")
    path = field_path(config)
    for name in ("train_size", "heldout_size"):
        if (size := getattr(config, name)) is not None:
            check_whole(f"{path}.{name}", size, 1, MAX_QUESTIONS)
    check_whole(f"{path}.seed", config.seed, 0, MAX_WHOLE)
    if config.checker is not None:
        check_choice(f"{path}.checker", config.checker, Checker)
