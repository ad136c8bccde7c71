"""How different texts are from each other: self-BLEU, and the distance of embeddings.

A policy that has found one text with a high reward may repeat it. Reward says nothing of that, so both are reported
together, as red-teaming does (Hong et al., 2024, arXiv 2402.19464).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float


def self_bleu(texts: Sequence[Sequence[Hashable]], max_order: int = 4) -> float:
    """How much texts repeat each other: the mean BLEU of each text against all others; 1 for equal texts.

    Args:
        texts, max_order: as `bleu_of_each` takes them.

    Returns:
        0 to 1; lower is more diverse.

    Raises:
        ValueError: fewer than two texts, or no order.
    """
    return float(bleu_of_each(texts, max_order).mean())


def bleu_of_each(texts: Sequence[Sequence[Hashable]], max_order: int = 4) -> Float[np.ndarray, " N"]:
    """The BLEU of each text against all others.

        BLEU = min(1, exp(1 - r / c)) * (prod_n p_n)^(1 / max_order)

    p_n is the share of a text's n-grams that another text has too; each counts at most as often as the one text that
    has it most often. c is the text's length, and r that of the other text closest in length, the shorter of two. A
    text that shares no n-gram of some order with the others has BLEU 0: nothing is smoothed.

    Source: Zhu et al. (2018, arXiv 1802.01886); BLEU: Papineni et al. (2002).

    Args:
        texts: two or more, as sequences of tokens or as strings of characters.
        max_order: the longest n-grams, 1 or more.

    Returns:
        0 to 1 for each text; lower is more of its own.

    Raises:
        ValueError: fewer than two texts, or no order.
    """
    if len(texts) < 2 or max_order < 1:
        raise ValueError(f"self-BLEU got {len(texts)} texts and max_order {max_order}; give two, and 1 or more")
    lengths = sorted(map(len, texts))
    log_precision_N = np.zeros(len(texts))
    for order in range(1, max_order + 1):
        log_precision_N += np.array(_log_precisions(texts, order)) / max_order
    penalty_N = [_log_brevity_penalty(len(text), lengths) for text in texts]
    return np.exp(log_precision_N + penalty_N)


def _log_precisions(texts: Sequence[Sequence[Hashable]], order: int) -> list[float]:
    """Of each text, log of the share of its n-grams that another text has."""
    counts = [Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1)) for text in texts]
    # The two largest counts of each n-gram: a text that has the largest is compared with the other one.
    largest: dict[tuple, tuple[int, int]] = {}
    for counter in counts:
        for ngram, count in counter.items():
            first, second = largest.get(ngram, (0, 0))
            largest[ngram] = (count, first) if count > first else (first, max(second, count))
    found = []
    for counter in counts:
        # A text's own count is the largest or not; where two texts have the largest, the second equals it.
        clipped = sum(min(count, largest[ngram][count == largest[ngram][0]]) for ngram, count in counter.items())
        found.append(math.log(clipped / counter.total()) if clipped else -math.inf)
    return found


def _log_brevity_penalty(length: int, lengths: list[int]) -> float:
    others = lengths.copy()
    others.remove(length)
    closest = min(others, key=lambda other: (abs(other - length), other))
    # A text without tokens has no n-gram, and so no BLEU.
    return min(0.0, 1 - closest / length) if length else 0.0


def embedding_distance(embedding_ND: Float[np.ndarray, "N D"]) -> float:
    """The mean cosine distance over all pairs: 1 - cos(e_i, e_j).

    Args:
        embedding_ND: of two or more texts, none of them zero.

    Returns:
        0 for one direction, 1 for directions at right angles, up to 2; higher is more diverse.

    Raises:
        ValueError: fewer than two texts, or an embedding that has no direction.
    """
    number = len(embedding_ND)
    norm_N = np.linalg.norm(np.asarray(embedding_ND, np.float64), axis=1)
    if number < 2 or not (norm_N > 0).all():
        raise ValueError(f"embedding_distance got {number} embeddings, the shortest {norm_N.min(initial=0)}; give two")
    # The square of the sum of unit vectors holds every pair twice, and each vector with itself.
    total_D = (embedding_ND / norm_N[:, None]).sum(axis=0)
    return float(1 - (total_D @ total_D - number) / (number * (number - 1)))
