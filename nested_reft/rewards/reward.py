"""The total reward of each completion, and the parts that it is made of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from nested_reft import processes
from nested_reft.backends import cores
from nested_reft.data.examples import Checker, Example
from nested_reft.literals import check_choice, check_whole
from nested_reft.paths import local_only
from nested_reft.rewards.exact_answer import exact_answer, parse_number
from nested_reft.rewards.length import overlong_punishment
from nested_reft.rewards.limits import LARGEST_REWARD, RewardError
from nested_reft.rewards.math_answer import compare_quickly, has_foreign_digits, is_unevaluated, marked_answer
from nested_reft.rewards.notation import number, words
from nested_reft.rewards.pool import Failure, Outcome, WorkerPool
from nested_reft.types import Prompts

logger = logging.getLogger(__name__)

FAILURES: tuple[str, ...] = get_args(Failure)
CUT_OFF = -1.0  # what a reward model's number is for a completion without a stop token
NO_MODEL = "reward.checker is 'model', but reward.model is empty; name a trained reward model there"
TRIAL_CALLS = 3  # of the user's function, on gold answers before training
MAX_TASK_CHARS = 10_000  # of an answer that a task's own verifier reads
# When the file of each function was last changed, as `check_answers` found it: a new run in the same session reads an
# edited file anew, and a run that goes on keeps what it began with.
_CHANGED: dict[str, int] = {}


@dataclass(frozen=True)
class RewardConfig:
    """How answers are checked, and how the parts add up to the reward.

    Attributes:
        checker: what decides whether an answer is right, where a source does not say otherwise:
            `exact`, the completion is or announces one number; `math`, it marks one final answer that
            equals the gold one; `task`, the verifier of the source's reasoning-gym task gives full
            marks; `function`, `function` returns 1 or more; `model`, the reward of `model` is more than 0, which is
            the average of preferred answers.
        accept_unevaluated: `math` takes arithmetic that is yet to be done for right, such as `12 * 37` for 444.
            Turn it off where the question states the arithmetic, since a policy may then copy the question.
        format_weight: reward for a completion in the checker's form, right or wrong; 0 or more.
        function: a function of your own, as `package.module:function` or `path/file.py:function`. It is
            called with the completion and a dictionary of `answer`, `prompt`, `metadata` and `finished`,
            and returns a number of any kind that `float` takes. It is tried on a few gold answers before
            training. A run's configuration thus names code: look before you load a stranger's run.
        function_weight: of that number in the reward.
        safety: another such function, which judges whether a completion may be kept for replay. What gets 0 or less is
            scored and logged, but not kept.
        model: trained reward models, whose mean takes the place of the accuracy: runs of `nested-reft reward-model`,
            or what `nested-reft export` made of them. 0 is the mean of held-out preferred answers, and 1 a standard
            deviation of all held-out answers. What was cut off gets -1, as in DR-PO. With several models, the
            standard deviation between them is logged.
        model_weight: of that mean in the reward.
        overlong_cache_tokens: L_cache of DAPO's soft overlong punishment, which begins that many
            tokens before `rollout.max_completion_tokens`; 0 for none.
        overlong_weight: of the punishment in the reward; 0 or more.
        overlong_filter: leave cut-off completions out of the loss (DAPO's overlong filtering). Their rewards
            still count for their groups.
        workers: processes that check what must not run in this one; None for as many as the host has cores.
        time_limit_seconds: for one completion in a worker. What is cut off is counted as unscored.
        memory_gib: address space that a worker may use; 0 for no limit.
    """

    checker: Checker = "exact"
    accept_unevaluated: bool = True
    format_weight: float = 0.0
    function: str | None = None
    safety: str | None = None
    function_weight: float = 1.0
    model: tuple[str, ...] = ()
    model_weight: float = 1.0
    overlong_cache_tokens: int = 0
    overlong_weight: float = 1.0
    overlong_filter: bool = False
    workers: int | None = None
    time_limit_seconds: float = 5.0
    memory_gib: float = 4.0

    def __post_init__(self):
        check_choice("reward.checker", self.checker, Checker)
        for name in ("format_weight", "overlong_weight", "memory_gib"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"reward.{name} is {value}; allowed is a finite number, 0 or more")
        for name in ("function_weight", "model_weight"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"reward.{name} is {getattr(self, name)}; allowed is a finite number")
        if len(set(self.model)) < len(self.model):
            raise ValueError(f"reward.model is {self.model}; allowed is each reward model once")
        for name in ("format_weight", "overlong_weight", "function_weight", "model_weight"):
            if abs(getattr(self, name)) > LARGEST_REWARD:
                raise ValueError(f"reward.{name} is {getattr(self, name)}; allowed is at most {LARGEST_REWARD:g}")
        if not (math.isfinite(self.time_limit_seconds) and self.time_limit_seconds > 0):
            raise ValueError(f"reward.time_limit_seconds is {self.time_limit_seconds}; allowed is more than 0")
        if self.workers is not None:
            check_whole("reward.workers", self.workers, 1, 1024)
        # An address space holds 2^64 bytes, and Python alone takes a good part of 0.1 GiB.
        if self.memory_gib and not 0.1 <= self.memory_gib <= 2**20:
            raise ValueError(f"reward.memory_gib is {self.memory_gib}; allowed is 0 (no limit), or 0.1 to {2**20}")
        if self.overlong_cache_tokens < 0:
            raise ValueError(f"reward.overlong_cache_tokens is {self.overlong_cache_tokens}; allowed is 0 or more")
        for name in ("function", "safety"):
            value = getattr(self, name)
            if value is not None and not all(value.rpartition(":")):
                raise ValueError(
                    f"reward.{name} is '{value}'; allowed is 'package.module:function' or 'path/file.py:function'"
                )
        if self.checker == "function" and self.function is None:
            raise ValueError("reward.checker is 'function', but reward.function is None; name the function there")


def score(
    texts_BG: Sequence[Sequence[str]],
    prompts: Prompts,
    finished_BG: Bool[np.ndarray, "B G"],
    config: RewardConfig,
    length_BG: Int[np.ndarray, "B G"] | None = None,
    max_completion_tokens: int | None = None,
    learned_MBG: Float[np.ndarray, "M B G"] | None = None,
) -> tuple[
    Float[np.ndarray, "B G"],
    Float[np.ndarray, "B G"],
    Bool[np.ndarray, "B G"],
    dict[str, Float[np.ndarray, "B G"]],
]:
    """Scores the completions of a batch.

        reward = accuracy + format_weight * format + function_weight * function + overlong_weight * overlong

    where a prompt's checker is `function`, without the accuracy, which follows from the function. With reward models
    it is model_weight * model in place of the accuracy.

    Args:
        texts_BG: decoded completions, untrusted.
        prompts: B prompts with their gold answers.
        finished_BG: False where the completion was cut off; those are not right, whatever they say.
        config: the checker and the weights.
        length_BG, max_completion_tokens: tokens of each completion and the limit that they were
            sampled with; needed for the overlong punishment.
        learned_MBG: normalised rewards of M reward models; needed where the configuration names some.

    Returns:
        `(reward_BG, accuracy_BG, scored_BG, parts)` as in `types.Scored`, in float32. `parts` holds
        each component before its weight, and an indicator for each way to stay unscored
        (`FAILURES`); its names depend on `config` alone, so that batches can be put together.
        Unscored completions have reward and components zero.

    Raises:
        ValueError: the shapes disagree, or a gold answer cannot be read.
        RewardError: a reward is too large to compute with.
    """
    num_prompts, group_size = finished_BG.shape
    if len(prompts) != num_prompts or [len(texts) for texts in texts_BG] != [group_size] * num_prompts:
        raise ValueError(
            f"score got {len(prompts)} prompts, {[len(texts) for texts in texts_BG]} texts per prompt and finished_BG"
            f" of shape {finished_BG.shape}; all must agree"
        )
    if (0 if learned_MBG is None else len(learned_MBG)) != len(config.model):
        raise ValueError(f"reward.model names {len(config.model)} models; score needs learned_MBG of as many")
    checkers = [checker or config.checker for checker in prompts.checkers or [None] * num_prompts]
    if "model" in checkers and not config.model:
        raise ValueError(NO_MODEL)
    parts, outcomes = _checked(texts_BG, prompts, finished_BG, checkers, config)
    if config.overlong_cache_tokens:
        if length_BG is None or max_completion_tokens is None:
            raise ValueError("reward.overlong_cache_tokens is set; score needs length_BG and max_completion_tokens")
        parts["overlong"] = overlong_punishment(length_BG, max_completion_tokens, config.overlong_cache_tokens)

    # The reshape keeps two axes for a batch without prompts.
    by_function_B1 = np.array([[checker == "function"] for checker in checkers]).reshape(num_prompts, 1)
    if config.function:
        # A completion that was cut off is not right, whatever the function says.
        right_BG = (parts["function"] >= 1) & finished_BG
        parts["accuracy"] = np.where(by_function_B1, right_BG, parts["accuracy"]).astype(np.float32)
    if learned_MBG is not None:
        parts |= _learned_parts(learned_MBG, finished_BG)
        by_model_B1 = np.array([[checker == "model"] for checker in checkers]).reshape(num_prompts, 1)
        parts["accuracy"] = np.where(by_model_B1, parts["model"] > 0, parts["accuracy"]).astype(np.float32)
    failures = _failures(outcomes, finished_BG.shape)
    # One failed part leaves the whole completion unscored: a reward without it would not be comparable.
    scored_BG = ~np.any(list(failures.values()), axis=0)
    parts = {name: np.where(scored_BG, part_BG, np.float32(0)) for name, part_BG in parts.items()}
    weights = {
        # Where the function decides on accuracy, it would otherwise count twice.
        "accuracy": 0 if config.model else np.where(by_function_B1, 0, 1),
        "format": config.format_weight,
        "function": config.function_weight,
        "overlong": config.overlong_weight,
        "model": config.model_weight,
        "model_std": 0,
        "safety": 0,
    }
    reward_BG = _weighted_sum(parts, weights)
    # Indicators of failure join after the sum, because they have no weight.
    parts |= {name: failed_BG.astype(np.float32) for name, failed_BG in failures.items()}
    # A copy, so that a change of one array does not change the other.
    return reward_BG.astype(np.float32), parts["accuracy"].copy(), scored_BG, parts


def _learned_parts(
    learned_MBG: Float[np.ndarray, "M B G"], finished_BG: Bool[np.ndarray, "B G"]
) -> dict[str, Float[np.ndarray, "B G"]]:
    """What reward models say on average and, of several, how far they disagree."""
    # A reward model has only seen whole answers, so it knows nothing of one that was cut off.
    parts = {"model": np.where(finished_BG, learned_MBG.mean(axis=0), CUT_OFF).astype(np.float32)}
    if len(learned_MBG) > 1:
        parts["model_std"] = np.where(finished_BG, learned_MBG.std(axis=0), 0.0).astype(np.float32)
    return parts


def _weighted_sum(parts: dict[str, Float[np.ndarray, "B G"]], weights: dict[str, Any]) -> Float[np.ndarray, "B G"]:
    """The reward: every part times its weight, added up.

    Raises:
        RewardError: one is too large; names the part that makes it so.
    """
    # In float64, so that what is too large for float32 is seen here and not as an infinite loss.
    products = {name: np.asarray(part_BG, np.float64) * weights[name] for name, part_BG in parts.items()}
    for name, product_BG in products.items():
        if product_BG.size and not abs(product_BG).max() <= LARGEST_REWARD:
            worst = float(parts[name].flat[abs(product_BG).argmax()])
            raise RewardError(
                f"reward.{name}_weight is {weights[name]}, which times the {name} of {worst:g} is more than"
                f" {LARGEST_REWARD:g}; lower the weight, or have the function return smaller numbers"
            )
    return np.sum(list(products.values()), axis=0)


def _checked(
    texts_BG: Sequence[Sequence[str]],
    prompts: Prompts,
    finished_BG: Bool[np.ndarray, "B G"],
    checkers: Sequence[str],
    config: RewardConfig,
) -> tuple[dict[str, Float[np.ndarray, "B G"]], dict[Any, Outcome]]:
    """Accuracy, format and function of every completion, and what the workers said of those that they checked."""
    # The names depend on the configuration alone, so that batches of different prompts can be joined.
    functions = {name: value for name in ("function", "safety") if (value := getattr(config, name))}
    names = ["accuracy", "format", *functions]
    parts = {name: np.zeros(finished_BG.shape, np.float32) for name in names}
    # Requests are gathered first and run together, so that all workers are busy.
    requests: dict[tuple[str, int, int], dict[str, Any]] = {}
    safety = dict[tuple[str, int, int], dict[str, Any]]()  # of another function, so for other workers
    for b, g in itertools.product(*map(range, finished_BG.shape)):
        text, finished = texts_BG[b][g], bool(finished_BG[b, g])
        check = _check(checkers[b], text, prompts.answers[b], prompts.metadata[b], finished, config)
        parts["format"][b, g] = check.format
        if check.request is None:
            parts["accuracy"][b, g] = check.accuracy
        else:
            requests["accuracy", b, g] = check.request
        for name in functions:
            asked = _function_request(text, prompts.answers[b], prompts.texts[b], prompts.metadata[b], finished)
            (requests if name == "function" else safety)[name, b, g] = asked
    outcomes = _run(requests, config)
    if config.safety:
        outcomes |= _run(safety, dataclasses.replace(config, function=config.safety))
    for (name, b, g), outcome in outcomes.items():
        # A request that failed has the value None; `scored_BG` tells it from a real 0.
        parts[name][b, g] = outcome.value or 0.0
    return parts, outcomes


def component_metrics(
    parts: dict[str, Float[np.ndarray, "B G"]], scored_BG: Bool[np.ndarray, "B G"]
) -> dict[str, float]:
    """What to log of a batch's parts: means of the components over the scored completions, and counts of failures.

    Args:
        parts: the components and failures that `score` returned.
        scored_BG: False where a completion has no reward.

    Returns:
        `reward/COMPONENT` means, absent where nothing was scored, and `unscored/FAILURE` counts.
    """
    metrics = {}
    for name, part_BG in parts.items():
        if name in FAILURES:
            metrics[f"unscored/{name}"] = float(part_BG.sum())
        # A mean over no completion is left out: it would be NaN.
        elif scored_BG.any():
            metrics[f"reward/{name}"] = float(part_BG[scored_BG].mean())
    return metrics


def check_answers(examples: Iterable[Example], config: RewardConfig) -> None:
    """Refuses, before training, examples whose gold answer the reward cannot read, and functions that do not load.

    Left in, they would make every completion wrong, or none scored. The gold answer itself must be
    scored as right. Some reasoning-gym tasks have none, since many answers are right; their verifiers
    are taken at their word.

    Args:
        examples: the examples of all sources, for training and held out.
        config: the checker and the function.

    Raises:
        ValueError: names the first such example's source, question and answer; or the function.
        ImportError: an optional package is not installed.
    """
    examples = list(examples)
    for name in filter(None, (config.function, config.safety)):
        _CHANGED[name] = _when_changed(name)
    # All kinds are made ready before the first example, so that a missing package is the first message.
    kinds = {example.checker or config.checker for example in examples} | ({"function"} if config.function else set())
    if "function" in kinds:
        if config.function is None:
            raise ValueError(
                "a source has the checker 'function', but reward.function is None; name the function there"
            )
        _check_loads("function", config)
    if config.safety:
        _check_loads("safety", dataclasses.replace(config, function=config.safety))
    if "model" in kinds and not config.model:
        raise ValueError(NO_MODEL)
    for kind, package in (("math", "math-verify"), ("task", "reasoning-gym")):
        problem = _pool(config).check(kind) if kind in kinds else None
        if problem is not None:
            raise ImportError(
                f"the checker '{kind}' needs the package {package} ({problem}); run: pip install {package}"
            )
    requests = {("accuracy", i, 0): r for i, e in enumerate(examples) if (r := _gold_request(e, config)) is not None}
    # By now all metadata are known to be JSON, which a call of the function needs.
    if config.function:
        _check_function(examples, config)
    for (_, index, _), outcome in _run(requests, config).items():
        # The gold answer is checked against itself: a checker that refuses it would refuse every completion.
        if outcome.value != 1.0:
            raise ValueError(_unreadable(examples[index], config, outcome.message or "it is not scored as right"))


def _check_loads(field: str, config: RewardConfig) -> None:
    problem = _pool(config).check("function")
    if problem is not None:
        raise ValueError(f"reward.{field} is '{config.function}', which does not load: {problem}")


def _check_function(examples: Sequence[Example], config: RewardConfig) -> None:
    """Refuses a function that scores none of the first gold answers."""
    requests = [
        _function_request(e.answer, e.answer, e.question, e.metadata, finished=True) for e in examples[:TRIAL_CALLS]
    ]
    outcomes = _pool(config).run(requests)
    # A function may fail on some completions; one that fails on all would leave nothing to learn from.
    if outcomes and all(outcome.failure for outcome in outcomes):
        raise ValueError(
            f"reward.function is '{config.function}', which gives no score for the gold answer of source"
            f" '{examples[0].source}', {examples[0].answer[:80]!r}: {outcomes[0].message}"
        )


def _gold_request(example: Example, config: RewardConfig) -> dict[str, Any] | None:
    """What to ask a worker about a gold answer; None where it is known to be readable."""
    checker, answer = example.checker or config.checker, example.answer
    if checker == "task" and "source_dataset" not in example.metadata:
        raise ValueError(f"source '{example.source}' has the checker 'task', which is for reasoning-gym tasks only")
    if checker in ("task", "function") or config.function or config.safety:
        try:
            # Metadata cross a pipe as JSON, so what cannot is found before training.
            json.dumps(example.metadata, default=str)
        except (TypeError, ValueError) as error:
            raise ValueError(f"source '{example.source}' has metadata that JSON cannot keep ({error})") from None
    # A task with many right answers names none, and a function knows its own.
    if checker in ("function", "model") or (checker == "task" and answer == "None"):
        return None
    if checker == "exact" and parse_number(answer) is None:
        raise ValueError(_unreadable(example, config, "the exact-answer reward needs numeric answers"))
    # A completion that repeats the gold answer takes the way of all completions, and must be right at its end.
    repeated = rf"\boxed{{{answer}}}" if checker == "math" else answer
    check = _check(checker, repeated, answer, example.metadata, finished=True, config=config)
    if check.request is None and check.accuracy != 1.0:
        raise ValueError(_unreadable(example, config, "a completion that repeats it is not right"))
    # Equal texts are right without algebra, but other forms of this answer would need it.
    if checker == "math" and number(answer) is None and words(answer) is None:
        return {"kind": "math", "text": answer, "answer": answer}
    return check.request


def _unreadable(example: Example, config: RewardConfig, why: str) -> str:
    return (
        f"source '{example.source}' has the gold answer {example.answer[:80]!r}, which the checker"
        f" '{example.checker or config.checker}' cannot read: {why} (question: {example.question[:200]!r})"
    )


@dataclass(frozen=True)
class _Check:
    """What is known of a completion at once, and the request that tells the rest, if any."""

    accuracy: float = 0.0
    format: float = 0.0
    request: dict[str, Any] | None = None


def _check(
    checker: str, text: str, answer: str, metadata: dict[str, Any], finished: bool, config: RewardConfig
) -> _Check:
    if checker == "exact":
        cell = exact_answer(text, answer, finished)
        return _Check(cell["accuracy"], cell["format"])
    # What was cut off is not right, and no worker need look at it.
    if checker in ("function", "model") or not finished:
        return _Check()
    marked = marked_answer(text)
    form = float(marked is not None)
    if checker == "task":
        # Verifiers know their own answers, so an unmarked completion is handed to them as it is.
        given = text.strip() if marked is None else marked
        # A gold answer in another script makes its digits legitimate.
        if len(given) > MAX_TASK_CHARS or (has_foreign_digits(given) and not has_foreign_digits(answer)):
            return _Check(0.0, form)
        return _Check(format=form, request={"kind": "task", "text": given, "answer": answer, "metadata": metadata})
    if marked is None:
        return _Check()
    if not config.accept_unevaluated and is_unevaluated(marked, answer):
        return _Check(0.0, form)
    right = compare_quickly(marked, answer)
    if right is None:
        return _Check(format=form, request={"kind": "math", "text": marked, "answer": answer})
    return _Check(float(right), form)


def _function_request(text: str, answer: str, prompt: str, metadata: dict[str, Any], finished: bool) -> dict[str, Any]:
    example = {"answer": answer, "prompt": prompt, "metadata": metadata, "finished": finished}
    return {"kind": "function", "text": text, "example": example}


def _run(requests: dict[tuple[str, int, int], dict[str, Any]], config: RewardConfig) -> dict[Any, Outcome]:
    """The outcome of each request, and one warning for those that have no score."""
    if not requests:
        return {}
    outcomes = dict(zip(requests, _outcomes(list(requests.values()), config), strict=True))
    failed = [outcome for outcome in outcomes.values() if outcome.failure is not None]
    if failed and processes.is_writer():
        counts = Counter(outcome.failure for outcome in failed)
        logger.warning(
            "reward: %d of %d checks have no score and do not count (%s); the first: %s",
            len(failed),
            len(outcomes),
            ", ".join(f"{name} {count}" for name, count in counts.items()),
            failed[0].message,
        )
    return outcomes


def _outcomes(requests: list[dict[str, Any]], config: RewardConfig) -> list[Outcome]:
    """The outcomes of requests, in their order. Several processes do a share each, and all get the same.

    Limits of time make an outcome depend on who works on it and when, so no two processes may do the same request.
    """
    if not processes.shares_work():
        return _pool(config).run(requests)
    index, count = processes.index(), processes.count()
    # A pool that fails on one process ends all of them.
    mine = processes.agreed(lambda: _pool(config).run(requests[index::count]))
    text = json.dumps([[outcome.value, outcome.failure, outcome.message] for outcome in mine])
    shares = [[Outcome(*outcome) for outcome in json.loads(share)] for share in processes.gather_text(text)]
    return [shares[number % count][number // count] for number in range(len(requests))]


def _failures(outcomes: dict[Any, Outcome], shape: tuple[int, ...]) -> dict[str, Bool[np.ndarray, "B G"]]:
    """For each way to fail, where it happened; a completion that failed twice counts under the first."""
    failures = {name: np.zeros(shape, bool) for name in FAILURES}
    seen = np.zeros(shape, bool)
    for (_, b, g), outcome in outcomes.items():
        if outcome.failure is not None and not seen[b, g]:
            failures[outcome.failure][b, g] = seen[b, g] = True
    return failures


def _pool(config: RewardConfig) -> WorkerPool:
    changed = _CHANGED.get(config.function or "", 0)
    return _shared_pool(
        config.workers or cores(), config.time_limit_seconds, config.memory_gib, config.function, changed
    )


def _when_changed(function: str) -> int:
    """The time of the last change of a function's file; 0 of a module, which has a name and no path."""
    name = function.rpartition(":")[0]
    if not name.endswith(".py"):
        return 0
    file = local_only(name, "reward.function")
    return file.stat().st_mtime_ns if file.is_file() else 0


@functools.lru_cache(maxsize=4)
def _shared_pool(
    workers: int, time_limit_seconds: float, memory_gib: float, function: str | None, changed: int
) -> WorkerPool:
    """One pool for training and evaluation alike: starting workers takes a second or more.

    `changed` is no setting of the pool. It makes a new one where the function's file is another.
    """
    return WorkerPool(workers, time_limit_seconds, memory_gib, function)
