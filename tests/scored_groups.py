"""Scored groups made up by hand, which tests of the rules of training share."""

import numpy as np

from nested_reft.replay_store import Store
from nested_reft.types import Prompts, Rollouts, Scored

TOKENS = 5


def scored(accuracy_BG, first=0, reward_BG=None, scored_BG=None, counted_BG=None, source_B=None) -> Scored:
    """A generation batch whose prompts are numbered from `first`, with all completions distinguishable."""
    accuracy_BG = np.array(accuracy_BG, np.float32)
    shape = accuracy_BG.shape
    number_B = np.arange(first, first + shape[0], dtype=np.int32)
    rollouts = Rollouts(
        prompt_BP=number_B[:, None] + np.zeros((1, 3), np.int32),
        prompt_length_B=np.full(shape[0], 3, np.int32),
        tokens_BGC=np.broadcast_to(number_B[:, None, None], (*shape, TOKENS)),
        length_BG=np.full(shape, 4, np.int32),
        finished_BG=np.ones(shape, bool),
        forced_BG=np.zeros(shape, np.int32),
        counted_BG=np.ones(shape, bool) if counted_BG is None else np.array(counted_BG),
        behavior_logprob_BGC=np.broadcast_to(np.float32(-0.1) * number_B[:, None, None], (*shape, TOKENS)),
        nested_BG=np.ones(shape, bool),
        full_share_BG=np.zeros(shape, np.float32),
        part_BGL=np.ones((*shape, 2), np.int8),
        version_BG=np.broadcast_to(number_B[:, None], shape),
        temperature_BG=np.ones(shape, np.float32),
    )
    names = tuple(str(number) for number in number_B)
    return Scored(
        prompts=Prompts(
            np.asarray(rollouts.prompt_BP),
            np.full(shape[0], 3),
            number_B % 2 if source_B is None else np.array(source_B, np.int32),
            names,
            names,
            ({},) * shape[0],
        ),
        rollouts=rollouts,
        texts=tuple((name,) * shape[1] for name in names),
        reward_BG=accuracy_BG if reward_BG is None else np.array(reward_BG, np.float32),
        accuracy_BG=accuracy_BG,
        scored_BG=np.ones(shape, bool) if scored_BG is None else np.array(scored_BG),
        parts={"accuracy": accuracy_BG},
    )


def texts_of(store: Store) -> list[str]:
    """All completions of a store, in an order of their own."""
    return sorted(text for entry in store.entries if entry is not None for text in entry.group.texts[0])
