"""Sources found automatically: one list of questions divided into parts that differ.

A curriculum chooses between sources, and a large data set is often one source of very mixed
questions. They are divided by how often the starting policy is right, since that is what a curriculum
can use: dividing by the wording of the prompts gained nothing over the undivided pool
(`experiments/results/splits.md`). Only training examples are divided; held-out ones stay with the
source that the user named, so reports do not depend on the division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from nested_reft.literals import check_choice, check_whole

SplitKind = Literal["none", "pass_rate"]


@dataclass(frozen=True)
class SplitConfig:
    """How sources are divided before training.

    Attributes:
        kind: `none`, or `pass_rate`, which samples every training question from the starting policy
            (after a warm start) and puts questions of similar pass rates together.
        parts: most parts that a source becomes; fewer where questions do not differ enough.
        samples: completions per question for `pass_rate`.
        sources: names of the sources to divide; empty for all.
    """

    kind: SplitKind = "none"
    parts: int = 4
    samples: int = 8
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("data.split.kind", self.kind, SplitKind)
        check_whole("data.split.parts", self.parts, 2, 1000)
        # All completions of a question are sampled at once.
        check_whole("data.split.samples", self.samples, 1, 1024)


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
