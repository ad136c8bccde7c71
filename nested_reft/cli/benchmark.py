"""`nested-reft eval --benchmark`: a run or a model on benchmarks, with a record of every question."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from nested_reft.api import without_plans
from nested_reft.benchmarks import BenchmarkResult, Record, RecordFile, evaluate_benchmark, result_of
from nested_reft.cli.arguments import keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import complain, say
from nested_reft.cli.overrides import override
from nested_reft.cli.policy import config_of, loaded, plan_of_options
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.benchmarks import load_benchmark
from nested_reft.data.config import DataConfig
from nested_reft.data.prompts import EncodedExample, encode_examples
from nested_reft.data.sources import DatasetSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.json_files import check_writable
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.presets import grpo
from nested_reft.models.fingerprint import fingerprint
from nested_reft.models.source import ModelSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.reports.samples import visible
from nested_reft.reports.tables import table
from nested_reft.rewards.reward import RewardConfig, check_answers
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import GREEDY, SamplingConfig
from nested_reft.training.config import Config, TrainConfig
from nested_reft.training.keys import RunKeys
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.untrusted import BadFile, printable

INSTRUCTION = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
SHOWN_FAULTS = 3  # rows of a file that are named one by one


def run_benchmarks(known: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Answers all questions of the benchmarks, and prints the table.

    Args:
        known: the options of `eval`.
        overrides: words of the command line that replace fields.
    """
    with checking_input():
        if known.records is not None:
            check_writable(known.records)
        given = config_of(known.policy, known.config, model_defaults)
        config = override(without_plans(given), overrides)
        sampling = _sampling(config.rollout.sampling, known)
        faults: list[str] = []
        questions = {name: _questions(name, known, config, faults) for name in dict.fromkeys(known.benchmark)}
        policy = dataclasses.replace(loaded(known.policy, given, config), sampling=sampling)
        plan = plan_of_options(known, policy, config.train.seed)
        encoded = {name: _encoded(examples, policy, config) for name, examples in questions.items()}
        parts = None if plan is None else plan.host_parts(policy.num_layers).tolist()
        records = RecordFile(known.records, _about(policy, config, known.k, parts))
        for examples in encoded.values():
            _check_questions(records, examples, known)
    # Warnings wait until nothing can be refused any more, since a refusal is one line.
    for fault in faults:
        complain(f"warning: {fault}")
    records.begin()
    keys, results = RunKeys(jax.random.key(config.train.seed)), dict[str, BenchmarkResult]()
    for number, (name, examples) in enumerate(encoded.items()):
        source = examples[0].example.source
        earlier = records.known(source)
        if earlier:
            say(f"{printable(name)}: {min(len(earlier), len(examples))} of {len(examples)} questions have a record")
        found = evaluate_benchmark(
            policy,
            examples,
            config.reward,
            known.k,
            config.evaluation,
            keys.evaluation(number),
            plan,
            earlier,
            records.keep,
        )
        for text in _wrong(found, known.wrong):
            say(text)
        results[name] = result_of(found, config.reward.checker)
    say(benchmark_table(results, sampling.temperature))
    if known.records is not None:
        say(f"records: {known.records}")
    keep_json(known.json, {name: result.to_json() for name, result in results.items()})


def model_defaults(name: str) -> Config:
    """What a model is evaluated with where no configuration is named: reasoning in at most 1,024 tokens, one boxed
    answer, and the temperature and top-p that samples of reasoning models are usually drawn with.

    Args:
        name: of the model.
    """
    return Config(
        name="benchmark",
        model=ModelSource(name),
        # Questions and limits of prompts are those of the benchmark.
        data=DataConfig(
            sources=(DatasetSource("gsm8k", "gsm8k", None, 1, seed=0),),
            prompts_per_batch=1,
            max_prompt_tokens=1,
            prompt=PromptFormat(INSTRUCTION),
        ),
        rollout=RolloutConfig(
            group_size=2, max_completion_tokens=1024, sampling=SamplingConfig(temperature=0.6, top_p=0.95)
        ),
        nesting=NestingConfig(),
        reward=RewardConfig(checker="math"),
        loss=grpo("practical"),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        train=TrainConfig(steps=1),
        evaluation=EvaluationConfig(batch_size=32),
        curriculum=CurriculumConfig("uniform"),
    )


def benchmark_table(results: dict[str, BenchmarkResult], temperature: float) -> str:
    """Accuracy with its interval, pass@k, the majority's answer, and what the completions were like.

    Args:
        results: by benchmark.
        temperature: that was sampled with.
    """
    rows = []
    for name, result in results.items():
        low, high = result.interval
        how = "greedy" if temperature == 0 else f"mean of {result.samples} at temperature {temperature:g}"
        rows.append(
            [f"{name} ({result.questions} questions): {how}", f"{result.accuracy:.3f}  ({low:.3f} to {high:.3f})"]
        )
        if result.samples > 1:
            rows += [[f"{name}: pass@{k}", f"{share:.3f}"] for k, share in result.pass_at.items() if k > 1]
        if result.majority is not None:
            rows.append([f"{name}: maj@{result.samples}", f"{result.majority:.3f}"])
        rows.append([f"{name}: tokens of a completion", f"{result.mean_tokens:.0f}"])
        rows.append([f"{name}: completions cut off", f"{result.cut_off:.3f}"])
        if result.unscored:
            rows.append([f"{name}: completions that could not be checked", str(result.unscored)])
    return table(["benchmark", "value (95 %)"], rows)


def _sampling(sampling: SamplingConfig, known: argparse.Namespace) -> SamplingConfig:
    """How completions are drawn: greedily where one of each question is asked for and no temperature.

    Raises:
        ValueError: several completions of a question would all be alike.
    """
    if known.temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=known.temperature)
    elif known.k == 1:
        return GREEDY
    if sampling.temperature == 0:
        if known.k > 1:
            raise ValueError(
                f"--k is {known.k}, and --temperature 0, where all completions of a question are alike; allowed is more"
                " than 0"
            )
        return GREEDY
    return sampling


def _questions(name: str, known: argparse.Namespace, config: Config, faults: list[str]) -> list[Any]:
    """The questions of a benchmark, all or the first `--prompts`; sentences about rows that are left out are added."""
    examples, found = load_benchmark(name, known.folder)
    if found:
        faults += found[:SHOWN_FAULTS]
        faults.append(f"'{name}' has {len(found)} rows that are left out and {len(examples)} questions")
    examples = examples[: known.prompts]
    check_answers(examples, config.reward)
    return examples


def _encoded(examples: list[Any], policy: Policy, config: Config) -> list[EncodedExample]:
    most = policy.model.config.max_positions
    encoded = encode_examples(examples, policy.tokenizer, config.data.prompt, most)
    longest = max(len(example.tokens) for example in encoded)
    if longest + config.rollout.max_completion_tokens > most:
        raise ValueError(
            f"rollout.max_completion_tokens is {config.rollout.max_completion_tokens}, and the longest question of"
            f" '{examples[0].source}' has {longest} tokens; the model allows {most} positions, so allowed is at most"
            f" {most - longest}"
        )
    return encoded


def _about(policy: Policy, config: Config, samples: int, parts: list[int] | None) -> dict[str, Any]:
    """All that records depend on, beside the questions."""
    reward = dataclasses.asdict(config.reward)
    for name in ("workers", "time_limit_seconds", "memory_gib"):
        del reward[name]
    return {
        "weights": fingerprint(policy.model),
        "layers": parts,
        "samples": samples,
        "sampling": dataclasses.asdict(policy.sampling),
        "max_completion_tokens": policy.max_completion_tokens,
        "prompt": dataclasses.asdict(config.data.prompt),
        "reward": reward,
        "seed": config.train.seed,
    }


def _check_questions(records: RecordFile, examples: list[EncodedExample], known: argparse.Namespace) -> None:
    """Refuses records of other questions, such as those of a file that was changed since.

    Raises:
        BadFile: a record's question or answer is not the benchmark's.
    """
    source = examples[0].example.source
    for number, (record, encoded) in enumerate(zip(records.known(source), examples, strict=False)):
        if (record["question"], record["answer"]) != (encoded.example.question, encoded.example.answer):
            raise BadFile(
                f"'{known.records}' holds another question {number} of '{source}' than the benchmark; name another file"
            )
        if len(record["texts"]) != known.k:
            raise BadFile(
                f"'{known.records}' holds {len(record['texts'])} completions of question {number} of '{source}'"
            )


def _wrong(records: list[Record], most: int) -> list[str]:
    """The first wrong completions as plain text, of which no line can pass for a heading."""
    found = []
    for record in records:
        for text, right, tokens in zip(record["texts"], record["right"], record["tokens"], strict=True):
            if right is not True and len(found) < most:
                what = "could not be checked" if right is None else "wrong"
                heading = f"--- {printable(record['benchmark'])}, question {record['number']}: {what}; {tokens} tokens"
                parts = (("question", record["question"]), ("answer", record["answer"]), ("sample", text))
                lines = [f"{name} | {line}" for name, value in parts for line in visible(value).split("\n")]
                found.append("\n".join([heading, *lines, ""]))
    return found
