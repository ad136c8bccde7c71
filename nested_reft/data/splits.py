"""Sources found automatically: one list of questions divided into parts that differ.

A curriculum chooses between sources, and a large data set is often one source of very mixed
questions. Two ways to divide it, both pure and deterministic: by how often the starting policy is
right, and by what the prompts look like. Only training examples are divided; held-out ones stay
with the source that the user named, so reports do not depend on the division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

Split = Literal["none", "pass_rate", "cluster"]

# 256 = 2^8, because the hash below keeps 8 bits.
NUM_FEATURES = 256
# Lloyd's rounds usually stop by themselves far earlier; the number only bounds them.
KMEANS_RESTARTS, KMEANS_ROUNDS = 5, 100


@dataclass(frozen=True)
class SplitConfig:
    """How sources are divided before training.

    Attributes:
        kind: `none`; `pass_rate` samples every training question from the starting policy (after
            a warm start) and puts questions of similar pass rates together; `cluster` puts prompts
            of similar wording together, with no sampling.
        parts: most parts that a source becomes; fewer where questions do not differ enough.
        samples: completions per question for `pass_rate`.
        sources: names of the sources to divide; empty for all.
    """

    kind: Split = "none"
    parts: int = 4
    samples: int = 8
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in get_args(Split):
            raise ValueError(f"data.split.kind is '{self.kind}'; allowed are {', '.join(get_args(Split))}")
        if self.parts < 2:
            raise ValueError(f"data.split.parts is {self.parts}; allowed is 2 or more")
        if self.samples < 1:
            raise ValueError(f"data.split.samples is {self.samples}; allowed is 1 or more")


def split_by_pass_rate(pass_rate_E: Float[np.ndarray, " E"], parts: int) -> list[list[int]]:
    """Parts of about equal size and different pass rate, the easiest first.

    Questions of equal pass rate stay together, in the part where the middle of them falls; so
    there are never more parts than different pass rates.

    Args:
        pass_rate_E: share right of each question's samples.
        parts: most parts wanted.

    Returns:
        Indices of each part's questions, in order; no part is empty.
    """
    found: dict[int, list[int]] = {}
    passed = 0
    # `unique` sorts upwards, and the easiest questions come first.
    for rate in np.unique(pass_rate_E)[::-1]:
        same = np.flatnonzero(pass_rate_E == rate).tolist()
        # The middle of a block of n lies at (passed + n / 2) / E, which is below 1, so `part` is below `parts`.
        part = int(parts * (passed + len(same) / 2) / len(pass_rate_E))
        found.setdefault(part, []).extend(same)
        passed += len(same)
    return [sorted(found[part]) for part in sorted(found)]


def split_by_cluster(tokens: Sequence[Sequence[int]], parts: int, seed: int) -> list[list[int]]:
    """Parts of prompts that share tokens and pairs of tokens: k-means on `ngram_features`.

    Of several seeded starts (k-means++, Arthur and Vassilvitskii, 2007) the one with the least
    distance to its centres is kept.

    Args:
        tokens: the token ids of each prompt.
        parts: most clusters wanted.
        seed: decides the starts.

    Returns:
        Indices of each part's prompts, in order; parts with shorter prompts first, none empty.
    """
    feature_EF = ngram_features(tokens)
    runs = [_kmeans(feature_EF, parts, np.random.default_rng([seed, start])) for start in range(KMEANS_RESTARTS)]
    cluster_E = min(runs, key=lambda run: run[1])[0]
    # A cluster that lost all its rows is not among the unique ones.
    found = [np.flatnonzero(cluster_E == cluster).tolist() for cluster in np.unique(cluster_E)]
    # Curricula expect the easiest source first, and short prompts are taken to be easier. The first index breaks ties.
    return sorted(found, key=lambda part: (sum(len(tokens[index]) for index in part) / len(part), part[0]))


def ngram_features(tokens: Sequence[Sequence[int]]) -> Float[np.ndarray, "E F"]:
    """Square roots of the counts of each prompt's tokens and pairs of tokens, hashed, of length 1.

    Args:
        tokens: the token ids of each prompt.

    Returns:
        One row of length 1 per prompt; zeros for an empty prompt.
    """
    feature_EF = np.zeros((len(tokens), NUM_FEATURES))
    for row_F, ids in zip(feature_EF, tokens, strict=True):
        single = np.asarray(ids, dtype=np.uint64)
        # The large constant keeps the numbers of pairs apart from those of single tokens.
        pairs = single[:-1] * np.uint64(1_000_003) + single[1:] + np.uint64(1 << 40)
        grams = np.concatenate([single, pairs]) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing; wraps
        # `row_F[index] += 1` would count a bucket that occurs twice only once.
        np.add.at(row_F, (grams >> np.uint64(64 - 8)).astype(np.int64), 1.0)  # 8 bits: NUM_FEATURES
    # The square root keeps frequent tokens from drowning the others.
    feature_EF = np.sqrt(feature_EF)
    # An empty prompt has length 0 and stays at the origin.
    return feature_EF / np.maximum(np.linalg.norm(feature_EF, axis=1, keepdims=True), 1e-12)


def _kmeans(feature_EF: np.ndarray, parts: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Lloyd's rounds from a k-means++ start: the cluster of each row, and the summed squared distance."""
    centre_KF = feature_EF[[rng.integers(len(feature_EF))]]
    while len(centre_KF) < parts:
        nearest_E = _squared_distance(feature_EF, centre_KF).min(axis=1)
        if nearest_E.sum() < 1e-9:  # no more different rows than centres
            break
        # k-means++ draws the next centre with probability proportional to the squared distance.
        chosen = rng.choice(len(feature_EF), p=nearest_E / nearest_E.sum())
        centre_KF = np.concatenate([centre_KF, feature_EF[[chosen]]])
    cluster_E = np.full(len(feature_EF), -1)
    for _ in range(KMEANS_ROUNDS):
        closest_E = _squared_distance(feature_EF, centre_KF).argmin(axis=1)
        if (closest_E == cluster_E).all():
            break
        cluster_E = closest_E
        for cluster in np.unique(cluster_E):  # an emptied cluster keeps its centre
            centre_KF[cluster] = feature_EF[cluster_E == cluster].mean(axis=0)
    return cluster_E, float(_squared_distance(feature_EF, centre_KF)[np.arange(len(cluster_E)), cluster_E].sum())


def _squared_distance(row_EF: np.ndarray, centre_KF: np.ndarray) -> np.ndarray:
    """Squared distance of every row to every centre, never below 0."""
    products_EK = row_EF @ centre_KF.T
    # Written out, the square needs no array [E, K, F]; rounding may take it below 0.
    return np.maximum((row_EF**2).sum(axis=1)[:, None] - 2 * products_EK + (centre_KF**2).sum(axis=1), 0)
