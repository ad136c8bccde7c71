"""From prompts to batches of them: stream for ever, pad to few sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from nested_reft.data.prompts import EncodedExample
from nested_reft.types import Prompts


class PromptStream:
    """An endless, resumable stream of examples from each source.

    Each source is visited in its own order, reshuffled at every epoch: every example once before
    any comes again. The stream's position is plain JSON, and continuing from it gives the same
    examples, bit for bit.

    Args:
        examples_by_source: the encoded examples of each source, in the order of source indices.
        seed: decides every order; 0 or more.
        process_index, process_count: this host and how many there are. The hosts share one order
            and take turns in it, so that together they see every example once before any comes again.
    """

    def __init__(
        self,
        examples_by_source: Sequence[Sequence[EncodedExample]],
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"PromptStream got process_index {process_index} of {process_count}; allowed is 0 to one less"
            )
        if not examples_by_source:
            raise ValueError("PromptStream got no sources; give at least one")
        for index, examples in enumerate(examples_by_source):
            if not examples:
                raise ValueError(f"PromptStream got no examples for source {index}; every source needs at least one")
        self._seed, self._shard = seed, [process_index, process_count]
        self._sizes = [len(examples) for examples in examples_by_source]
        self._fingerprint = _fingerprint(examples_by_source)
        self._iterators = [
            _endless_iterator(examples, seed, index, process_index, process_count)
            for index, examples in enumerate(examples_by_source)
        ]

    def next(self, source_index: int) -> EncodedExample:
        """The next example of one source; the other sources stay where they are.

        Args:
            source_index: from 0, in the order of `examples_by_source`.
        """
        return next(self._iterators[source_index])

    def get_state(self) -> dict[str, Any]:
        """The position in every source, JSON-able."""
        # Seed, sizes, fingerprint and shard go along, because a position means nothing without them.
        positions = [iterator.get_state() for iterator in self._iterators]
        return {
            "seed": self._seed,
            "sizes": list(self._sizes),
            "fingerprint": self._fingerprint,
            "shard": list(self._shard),
            "positions": positions,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` gave.

        Args:
            state: as `get_state` gave it, or as JSON gives that back.

        Raises:
            ValueError: the state is of another seed, of another host, or of other examples (a generator
                of another version makes others), so that its positions would mean something else.
        """
        state = {"shard": [0, 1]} | state  # runs from before there were several hosts
        mine = {"seed": self._seed, "sizes": self._sizes, "fingerprint": self._fingerprint, "shard": self._shard}
        for name, now in mine.items():
            if state[name] != now:
                raise ValueError(
                    f"the saved data position has {name} {state[name]}, this run has {now};"
                    " resume with the configuration that the checkpoint was saved with"
                )
        for iterator, position in zip(self._iterators, state["positions"], strict=True):
            iterator.set_state(dict(position))


def _fingerprint(examples_by_source: Sequence[Sequence[EncodedExample]]) -> str:
    """A hash of every prompt, answer and reference, in order."""
    # The tokens follow from the text, and hashing one of the two is enough.
    rows = [[(e.text, e.example.answer, e.example.reference) for e in examples] for examples in examples_by_source]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _endless_iterator(
    examples: Sequence[EncodedExample], seed: int, source_index: int, process_index: int, process_count: int
) -> grain.DatasetIterator:
    """Shuffled, then repeated: grain reshuffles each epoch with a seed of its own.

    Seed and source index are hashed, since their sum would give source 1 of one run the order of
    source 0 in the run with the next seed. No threads: the examples are in memory.
    """
    source_seed = int(np.random.SeedSequence([seed, source_index]).generate_state(1)[0])
    # The hosts' shares are cut after shuffle and repeat, so they all share one order.
    dataset = grain.MapDataset.source(examples).seed(source_seed).shuffle().repeat()[process_index::process_count]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def prompt_size(lengths: Sequence[int], bucket: int = 8) -> int:
    """The padded prompt size: the longest length, rounded up to a multiple of `bucket`.

    A compiled program depends on the padded size, so few sizes mean few compilations.

    Args:
        lengths: tokens of each prompt; at least one.
        bucket: in tokens, 1 or more.

    Returns:
        P, in tokens.

    Raises:
        ValueError: no lengths.
    """
    if len(lengths) == 0:
        raise ValueError("prompt_size got no lengths")
    # Two negations round up: floor division of a negative number rounds away from zero.
    return -(-max(lengths) // bucket) * bucket


def shared_prefix(prompts: Sequence[Sequence[int]], least: int = 16) -> int:
    """How many leading tokens all prompts have in common: those of a system message, of demonstrations.

    Every prompt keeps at least one token of its own. Fewer than `least` count as none: what running them
    once would save is less than what a second stream costs.

    Args:
        prompts: token ids of each; at least one prompt, and none empty.
        least: in tokens; shorter prefixes count as none.

    Returns:
        Tokens that can run once for all prompts; 0 for none.
    """
    ordered = [tuple(prompt) for prompt in prompts]
    first, last = min(ordered), max(ordered)  # in lexicographic order: what these two share, all share
    # The shorter prompt ends the comparison, hence `strict=False`.
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    # Where one prompt is the beginning of all others, its last token stays out, so that it keeps one of its own.
    length = next(differ, len(first) - 1)
    return length if length >= least else 0


def batch_prompts(encoded: Sequence[EncodedExample], source_index: Sequence[int], prompt_size: int) -> Prompts:
    """Stacks encoded examples into one batch, right-padded with zeros.

    Args:
        encoded: B examples.
        source_index: B source indices.
        prompt_size: P, at least the longest prompt.

    Returns:
        Prompts, with None for each missing reference or checker.

    Raises:
        ValueError: no examples, a different number of source indices, or a prompt longer than P.
    """
    if not encoded or len(encoded) != len(source_index):
        raise ValueError(
            f"batch_prompts got {len(encoded)} examples and {len(source_index)} source indices;"
            " allowed is one index per example, and at least one example"
        )
    length_B = np.array([len(e.tokens) for e in encoded], dtype=np.int32)
    if length_B.max() > prompt_size:
        raise ValueError(f"prompt_size is {prompt_size}, but the longest prompt has {length_B.max()} tokens")
    # Zero is some token of the vocabulary; what is padding follows from the lengths alone.
    tokens_BP = np.zeros((len(encoded), prompt_size), dtype=np.int32)
    for row_P, e in zip(tokens_BP, encoded, strict=True):
        row_P[: len(e.tokens)] = e.tokens
    return Prompts(
        tokens_BP=tokens_BP,
        length_B=length_B,
        source_B=np.array(source_index, dtype=np.int32),
        texts=tuple(e.text for e in encoded),
        answers=tuple(e.example.answer for e in encoded),
        metadata=tuple(e.example.metadata for e in encoded),
        checkers=tuple(e.example.checker for e in encoded),
        references=tuple(e.example.reference for e in encoded),
    )
