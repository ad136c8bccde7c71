"""Held-out accuracy: greedy, and pass@k of samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from nested_reft.data.examples import Example
from nested_reft.data.pipeline import batch_prompts, prompt_size, shared_prefix
from nested_reft.data.prompts import EncodedExample
from nested_reft.layer_plan import LayerPlan
from nested_reft.literals import check_whole
from nested_reft.reward_model import score_rollouts
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import GREEDY, SamplingConfig
from nested_reft.sharding import batch_devices, to_host
from nested_reft.untrusted import MAX_WHOLE, printable


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out prompts.

    Attributes:
        every_steps: training steps between greedy evaluations of the source in training; all
            sources are evaluated before and after the run.
        samples_per_prompt: completions per prompt for pass@k, before and after; 0 leaves it out.
        pass_k: k of pass@k.
        batch_size: prompts per compiled batch; any number, whatever the mesh is.
        rows: completions of a batch that are decoded at the same time (`rollout.refill`): one that ends makes room for
            the next. It pays with large batches, and changes no sample but for ties of rounding. 0 decodes all at once.
    """

    every_steps: int = 10
    samples_per_prompt: int = 8
    pass_k: int = 4
    batch_size: int = 32
    rows: int = 0

    def __post_init__(self):
        if self.every_steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"evaluation.every_steps is {self.every_steps} and evaluation.batch_size {self.batch_size};"
                " allowed is 1 or more"
            )
        check_whole("evaluation.rows", self.rows, 0, MAX_WHOLE, "all at once")
        if self.samples_per_prompt and not 1 <= self.pass_k <= self.samples_per_prompt:
            raise ValueError(
                f"evaluation.pass_k is {self.pass_k}; allowed is 1 to evaluation.samples_per_prompt,"
                f" which is {self.samples_per_prompt}"
            )


@dataclass(frozen=True)
class Evaluation:
    """Results on one source's held-out prompts.

    Attributes:
        prompts: how many.
        greedy_accuracy: share right under greedy decoding.
        sampled_accuracy: share of samples right, at the rollout temperature; None if not sampled.
        pass_at_k: unbiased estimate of the chance that one of k samples is right.
        pass_k: that k.
        unscored: completions whose answer could not be checked (`rewards.reward.FAILURES`); they count
            as not right here, so the accuracies are lower bounds where this is not 0.
    """

    prompts: int
    greedy_accuracy: float
    sampled_accuracy: float | None = None
    pass_at_k: float | None = None
    pass_k: int | None = None
    unscored: int = 0

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as plain values."""
        return asdict(self)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n samples, drawn without replacement,
    hold a right one; an unbiased estimate of pass@k (Chen et al., 2021, equation 1).

    Args:
        num_samples: n.
        num_correct: c, from 0 to n.
        k: from 1 to n.
    """
    # Integers keep the binomials exact; `comb` is 0 where fewer than k samples are wrong.
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate_examples(
    policy: Policy,
    examples: Sequence[EncodedExample],
    reward: RewardConfig,
    config: EvaluationConfig,
    key: jax.Array,
    samples: bool,
    plan: LayerPlan | None = None,
    completions: list[dict[str, Any]] | None = None,
) -> Evaluation:
    """Measures greedy accuracy and, with `samples`, pass@k.

    Args:
        policy: what answers; its own sampling and limit are those of the samples.
        examples: held-out prompts of one source.
        reward: how answers are checked.
        config: batch size, samples and k.
        key: PRNG key of the samples.
        samples: whether to sample for pass@k.
        plan: layers that act; None is the full model.
        completions: every completion is added to it, as a line of JSON-able values.

    Returns:
        The shares over all examples; those of samples are None where nothing was sampled.
    """

    def correct(group_size: int, how: SamplingConfig | None) -> tuple[Int[np.ndarray, " E"], int]:
        return num_correct(
            policy, examples, reward, config.batch_size, how, key, group_size, plan, completions, config.rows
        )

    # Greedy completions of one prompt are all alike, so one of them is enough.
    greedy_E, unscored = correct(1, GREEDY)
    if not samples or not config.samples_per_prompt:
        return Evaluation(len(examples), float(greedy_E.mean()), unscored=unscored)
    # None takes the sampling of the policy, which is that of its rollouts.
    sampled_E, unscored_samples = correct(config.samples_per_prompt, None)
    return Evaluation(
        len(examples),
        float(greedy_E.mean()),
        float(sampled_E.mean() / config.samples_per_prompt),
        float(np.mean([pass_at_k(config.samples_per_prompt, int(c), config.pass_k) for c in sampled_E])),
        config.pass_k,
        unscored + unscored_samples,
    )


def num_correct(
    policy: Policy,
    examples: Sequence[EncodedExample],
    reward: RewardConfig,
    batch_size: int,
    sampling: SamplingConfig | None,
    key: jax.Array,
    group_size: int,
    plan: LayerPlan | None = None,
    completions: list[dict[str, Any]] | None = None,
    decoded: int = 0,
) -> tuple[Int[np.ndarray, " E"], int]:
    """Right answers among `group_size` completions of each example, in one compiled shape for all batches.

    Args:
        policy, examples, reward, key, plan, completions: as in `evaluate_examples`.
        batch_size: prompts per batch; fewer where there are fewer examples. Rows that count for nothing are added
            where the mesh does not divide it.
        sampling: other than the policy's own.
        group_size: completions of each example.
        decoded: completions that are decoded at the same time, or 0; more where the mesh does not divide it.

    Returns:
        How many are right, for each example, and how many completions could not be checked at all.
    """
    counts: list[int] = []
    unscored = 0
    for batch in answered(policy, examples, reward, batch_size, sampling, key, group_size, plan, decoded=decoded):
        counts += [sum(right is True for right in answers.right) for answers in batch]
        unscored += sum(right is None for answers in batch for right in answers.right)
        if completions is not None:
            completions += [
                {
                    "question": answers.example.question,
                    "answer": answers.example.answer,
                    "text": text,
                    "right": right,
                    "greedy": sampling is GREEDY,
                }
                for answers in batch
                for text, right in zip(answers.texts, answers.right, strict=True)
            ]
    return np.array(counts), unscored


@dataclass(frozen=True)
class Answers:
    """The completions of one question.

    Attributes:
        example: the question.
        texts: the completions.
        right: whether each is right; None where that could not be checked.
        tokens: of each, its stop token included.
        finished: whether each ended by a stop token.
    """

    example: Example
    texts: list[str]
    right: list[bool | None]
    tokens: list[int]
    finished: list[bool]


def answered(
    policy: Policy,
    examples: Sequence[EncodedExample],
    reward: RewardConfig,
    batch_size: int,
    sampling: SamplingConfig | None,
    key: jax.Array,
    group_size: int,
    plan: LayerPlan | None = None,
    first: int = 0,
    decoded: int = 0,
) -> Iterator[list[Answers]]:
    """Answers questions batch by batch, in one compiled shape.

    Args:
        policy, examples, reward, batch_size, sampling, key, group_size, plan, decoded: as in `num_correct`.
        first: the example to begin with. What follows is answered as if all before it had been, too.

    Yields:
        The answers to the questions of each batch, in order.
    """
    # Held-out prompts have a size and a prefix of their own, which may differ from those of training.
    size = prompt_size([len(example.tokens) for example in examples])
    prefix = shared_prefix([example.tokens for example in examples])
    # A source with few examples is not padded to a whole batch.
    batch_size = min(batch_size, len(examples))
    # Rows are added until the mesh divides them: otherwise every device would do all of them. They come last, so that
    # no other row is drawn otherwise than on one device.
    devices = batch_devices(policy.mesh)
    rows = -(-batch_size // devices) * devices
    starts = range(first, len(examples), batch_size)
    title = f"held-out {printable(examples[0].example.source)}"
    # A log file has no use for a bar that is drawn again and again.
    for start in tqdm(starts, desc=title, unit="batch", leave=False, disable=None):
        chunk = list(examples[start : start + batch_size])
        # The last batch is filled up, so that its shape is that of the others.
        padded = chunk + [chunk[-1]] * (rows - len(chunk))
        prompts = batch_prompts(padded, [0] * rows, size)
        rollouts = to_host(
            policy.generate(
                prompts,
                plan,
                key,
                # An example draws by its place among all of them, so the size of batches changes no completion.
                number_B=np.minimum(start + np.arange(rows, dtype=np.int32), len(examples) - 1),
                group_size=group_size,
                sampling=sampling,
                shared_prefix=prefix,
                rows=decoded,
            )
        )
        # Only right or wrong is reported; the shaped reward is a matter of training.
        texts, _, accuracy_BG, scored_BG, _ = score_rollouts(
            policy, prompts, rollouts, reward, policy.max_completion_tokens
        )
        # The rows that filled up the batch are cut off again.
        yield [
            Answers(
                encoded.example,
                list(texts[b]),
                [bool(right) if scored else None for right, scored in zip(accuracy_BG[b], scored_BG[b], strict=True)],
                rollouts.length_BG[b].tolist(),
                rollouts.finished_BG[b].tolist(),
            )
            for b, encoded in enumerate(chunk)
        ]
