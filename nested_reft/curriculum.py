"""Which source each prompt slot draws from, and how that changes as training goes on.

A pure rule on a small state. `update` takes in what a step brought and is the same for every kind:
each source remembers its latest responses. `probabilities` says how likely each source is next, and
is all that the kinds differ in; `choose` draws from it. `explain` says in words what moved.

DUMP (arXiv 2504.09710, algorithm 1) treats the sources as arms of a bandit whose payoff is what can
still be learnt from them, measured by the size of the advantages:

    L_d   = mean of the last w absolute advantages of source d        (learnability)
    UCB_d = L_d + sqrt(2 ln(N + 1) / (n_d + 1)),  N = sum_d n_d        (n_d: responses so far)
    P(d)  = softmax(UCB / tau)

A solved source and a hopeless one both have L_d near 0; only the second term comes back to them.
Two departures from the released code: validation never enters the state, and the absolute value is
taken of each response's advantage, before any mean.

What tau means depends on the advantage. Let p be a group's share of right answers and r the
difference between the rewards of a right and of a wrong one; then the group's mean |A| is

    `group_std` (GRPO)        2 sqrt(p (1 - p) (G - 1) / G)   0 to 0.97 at G = 16, whatever r is
    `group_mean` (Dr. GRPO)   2 p (1 - p) r                   0 to r / 2
    `leave_one_out`           2 p (1 - p) r G / (G - 1)       a little more

The paper's tau = 0.1 is for the first. For the other two scale it with the signal, to about
0.05 r; the exploration term knows no r, so rewards far larger or smaller than 1 let it vanish or
rule. `no_baseline` has A = R: a solved source would look the most worth learning, so it is no choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nested_reft.estimators.advantages import group_advantages
from nested_reft.literals import check_choice
from nested_reft.types import Scored

GroupAdvantage = Literal["leave_one_out", "group_mean", "group_std"]
Kind = Literal["uniform", "proportional", "static", "easy_to_hard", "dump"]


@dataclass(frozen=True)
class CurriculumConfig:
    """The rule that chooses sources.

    Attributes:
        kind: `uniform` gives every source the same probability; `proportional` one that goes with
            its number of training examples, as shuffling the pooled data would; `static` goes by
            `weights`; `easy_to_hard` takes the sources in their order, one at a time; `dump` is
            the bandit above, and with temperature 0 its greedy form.
        window: latest responses of each source that its means are taken over (the paper's w).
        temperature: of `dump` (the paper's tau): 0 takes the best source, more is more even.
        weights: of `static`, one per source in their order; they need not sum to 1.
        promote_at: mean accuracy at which `easy_to_hard` moves on to the next source, in (0, 1].
        advantage: how the advantages that the rule learns from are computed; the paper's is `group_std`.
            `no_baseline` is not allowed: a solved source would look the most worth learning.
    """

    kind: Kind
    window: int = 300
    temperature: float = 0.1
    weights: tuple[float, ...] = ()
    promote_at: float = 0.9
    advantage: GroupAdvantage = "group_std"

    def __post_init__(self):
        check_choice("curriculum.kind", self.kind, Kind)
        check_choice("curriculum.advantage", self.advantage, GroupAdvantage)
        if self.window < 1:
            raise ValueError(f"curriculum.window is {self.window}; allowed is 1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"curriculum.temperature is {self.temperature}; allowed is a finite number, 0 or more")
        for index, weight in enumerate(self.weights):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"curriculum.weights[{index}] is {weight}; allowed is a finite number, 0 or more")
        if (self.kind == "static") != bool(self.weights):
            raise ValueError(
                f"curriculum.kind is '{self.kind}' and curriculum.weights {self.weights};"
                " allowed are weights for 'static' and none for the other kinds"
            )
        if self.weights and not sum(self.weights) > 0:
            raise ValueError(f"curriculum.weights is {self.weights}; allowed is at least one above 0")
        if not 0 < self.promote_at <= 1:
            raise ValueError(f"curriculum.promote_at is {self.promote_at}; allowed is 0 < promote_at <= 1")

    def validate_for(self, source_names: Sequence[str]) -> None:
        """Refuses weights that are not one per source.

        Args:
            source_names: names of the sources, in their order.

        Raises:
            ValueError: there are weights, but not one for each source.
        """
        if self.weights and len(self.weights) != len(source_names):
            raise ValueError(
                f"curriculum.weights has {len(self.weights)} weights; allowed is one for each of the"
                f" {len(source_names)} sources {', '.join(source_names)}"
            )


@dataclass(frozen=True)
class SourceMemory:
    """What is remembered of one source.

    Attributes:
        size: training examples it has.
        count: scored responses so far (the paper's n_d): completions, not prompts.
        advantage_size: |A| of its latest responses, oldest first.
        accuracy: raw accuracy of the same responses.
    """

    size: int
    count: int = 0
    advantage_size: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()


@dataclass(frozen=True)
class CurriculumState:
    """All that the rule remembers.

    Attributes:
        sources: M memories, in the order of source indices.
        level: sources mastered so far in their order; where `easy_to_hard` stands.
    """

    sources: tuple[SourceMemory, ...]
    level: int = 0

    def __post_init__(self):
        if not 0 <= self.level < len(self.sources):
            raise ValueError(
                f"curriculum level {self.level} with {len(self.sources)} sources; allowed is 0 to one less"
            )
        for index, source in enumerate(self.sources):
            if source.size < 1:
                raise ValueError(f"curriculum source {index} has size {source.size}; allowed is 1 or more")

    @classmethod
    def start(cls, sizes: Sequence[int]) -> CurriculumState:
        """Before the first step, of sources with these numbers of training examples.

        Args:
            sizes: training examples of each source, 1 or more, in the order of source indices.
        """
        return cls(tuple(SourceMemory(size) for size in sizes))

    def to_json(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> CurriculumState:
        """The state that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.
        """
        memories = (
            # JSON gives lists, while states are compared by their tuples.
            SourceMemory(m["size"], m["count"], tuple(m["advantage_size"]), tuple(m["accuracy"]))
            for m in value["sources"]
        )
        return cls(tuple(memories), value["level"])


def update(state: CurriculumState, config: CurriculumConfig, scored: Scored) -> CurriculumState:
    """What is remembered after one batch of rollouts, trained on or not.

    The advantages are those of raw accuracy: under a shaped reward, a hopeless source with answers of
    unequal lengths would look the most learnable.

    Args:
        state: before the batch.
        config: the rule.
        scored: what was generated.
    """
    advantage_BG = group_advantages(jnp.asarray(scored.accuracy_BG), jnp.asarray(scored.scored_BG), config.advantage)
    return update_by_advantages(
        state,
        config,
        scored.prompts.source_B,
        np.asarray(advantage_BG),
        scored.accuracy_BG,
        scored.scored_BG,
    )


def update_by_advantages(
    state: CurriculumState,
    config: CurriculumConfig,
    source_B: Int[np.ndarray, " B"],
    advantage_BG: Float[np.ndarray, "B G"],
    accuracy_BG: Float[np.ndarray, "B G"],
    scored_BG: Bool[np.ndarray, "B G"],
) -> CurriculumState:
    """Takes in the responses that a step generated, those that were not trained on included.

    A source counts as mastered once the mean accuracy over its full window reaches `promote_at`.
    The level moves on by one at most per call, and never back: a late batch of an earlier source
    changes that source's memory only.

    Args:
        state: before the step.
        config: the rule.
        source_B: the source of each prompt.
        advantage_BG: signed advantage of each response, constant over its tokens.
        accuracy_BG: raw accuracy of each response, before any shaping.
        scored_BG: False where there is no reward; those responses do not count.

    Returns:
        The state after the step.

    Raises:
        ValueError: a scored response has an advantage that is not finite.
    """
    if not np.isfinite(advantage_BG[scored_BG]).all():
        raise ValueError("the curriculum got an advantage that is not finite for a scored response")
    sources = list(state.sources)
    # A source without a response in this step keeps its memory as it is.
    for index in np.unique(source_B):
        old, of_source_B = sources[index], source_B == index
        counted_BG = scored_BG[of_source_B]
        sources[index] = replace(
            old,
            count=old.count + int(counted_BG.sum()),
            advantage_size=_latest(old.advantage_size, np.abs(advantage_BG[of_source_B])[counted_BG], config.window),
            accuracy=_latest(old.accuracy, accuracy_BG[of_source_B][counted_BG], config.window),
        )
    recent = sources[state.level].accuracy
    # A window that is not full yet could promote a source by a lucky start.
    mastered = len(recent) == config.window and sum(recent) / len(recent) >= config.promote_at
    # The last source has none after it, so the level stays there.
    level = min(state.level + mastered, len(sources) - 1)
    return CurriculumState(tuple(sources), level)


def _latest(old: tuple[float, ...], new: Float[np.ndarray, " n"], window: int) -> tuple[float, ...]:
    return (*old, *(float(value) for value in new))[-window:]


def learnability(state: CurriculumState) -> Float[np.ndarray, " M"]:
    """L_d: mean of the latest absolute advantages of each source, 0 where there are none.

    Args:
        state: what is remembered of M sources.

    Returns:
        L_d, 0 or more, in the unit of the advantages.
    """
    return np.array([_mean(source.advantage_size) for source in state.sources])


def exploration_bonus(state: CurriculumState) -> Float[np.ndarray, " M"]:
    """sqrt(2 ln(N + 1) / (n_d + 1)): large for sources seen little, 0 for all before the first step.

    Args:
        state: what is remembered of M sources.

    Returns:
        The second term of UCB_d, 0 or more.
    """
    count_M = np.array([source.count for source in state.sources], dtype=np.float64)
    # The 1 in the denominator serves a source that was never seen.
    return np.sqrt(2 * np.log1p(count_M.sum()) / (count_M + 1))


def probabilities(state: CurriculumState, config: CurriculumConfig) -> Float[np.ndarray, " M"]:
    """The probability of each source, M of them, in float64.

    Args:
        state: what is remembered of M sources.
        config: the rule.

    Returns:
        Values of 0 or more that sum to 1.
    """
    if config.kind == "uniform":
        weight_M = np.ones(len(state.sources))
    elif config.kind == "proportional":
        weight_M = np.array([source.size for source in state.sources], dtype=np.float64)
    elif config.kind == "static":
        weight_M = np.array(config.weights, dtype=np.float64)
    elif config.kind == "easy_to_hard":
        weight_M = np.eye(len(state.sources))[state.level]
    else:
        below_best_M = learnability(state) + exploration_bonus(state)
        # A shift does not change a softmax, and with the largest exponent at 0 nothing overflows.
        below_best_M -= below_best_M.max()
        # The limit of the softmax at temperature 0: the best source, shared where several are best.
        weight_M = np.exp(below_best_M / config.temperature) if config.temperature else below_best_M == 0
    return weight_M / weight_M.sum()


def choose(state: CurriculumState, config: CurriculumConfig, key: jax.Array, num_prompts: int) -> Int[np.ndarray, " B"]:
    """Draws the source of each prompt slot, independently, from `probabilities`.

    Args:
        state, config: the rule and what it remembers.
        key: PRNG key of this step.
        num_prompts: B.

    Returns:
        B source indices.
    """
    # `choice` scales its draw by the sum of the probabilities, so rounding to float32 does no harm.
    probability_M = jnp.asarray(probabilities(state, config), jnp.float32)
    return np.asarray(jax.random.choice(key, len(state.sources), (num_prompts,), p=probability_M))


def step_metrics(
    before: CurriculumState,
    after: CurriculumState,
    config: CurriculumConfig,
    names: Sequence[str],
    source_B: Int[np.ndarray, " B"],
    reward_BG: Float[np.ndarray, "B G"],
    accuracy_BG: Float[np.ndarray, "B G"],
    scored_BG: Bool[np.ndarray, "B G"],
) -> dict[str, float | int | str]:
    """One step as flat metrics: what decided its draws, what came of them, and why that changes the next.

    Args:
        before: the state that the step's draws came from.
        after: the state that the step led to.
        config: the rule.
        names: the sources' labels, in the order of source indices.
        source_B: the source of each prompt.
        reward_BG: total reward of each response.
        accuracy_BG: raw accuracy of each response.
        scored_BG: False where there is no reward; those responses do not count.

    Returns:
        `curriculum/SOURCE/...` with probability, learnability, bonus and count as the step found
        them, the reward and accuracy of its responses (absent where it scored none), and
        `curriculum_audit`, the words of `explain`.
    """
    found: dict[str, float | int | str] = {}
    # Draws were decided by the state before the step; the state after it decides the next ones.
    decided = zip(probabilities(before, config), learnability(before), exploration_bonus(before), strict=True)
    for index, (probability, learnable, bonus) in enumerate(decided):
        prefix = f"curriculum/{names[index]}/"
        found[prefix + "probability"] = float(probability)
        found[prefix + "learnability"] = float(learnable)
        found[prefix + "bonus"] = float(bonus)
        found[prefix + "count"] = before.sources[index].count
        # The new axis lets one source per prompt stand for all its completions.
        counted_BG = scored_BG & (source_B == index)[:, None]
        if counted_BG.any():
            found[prefix + "reward"] = float(reward_BG[counted_BG].mean())
            found[prefix + "accuracy"] = float(accuracy_BG[counted_BG].mean())
    return found | {"curriculum_audit": explain(before, after, config, names)}


def explain(before: CurriculumState, after: CurriculumState, config: CurriculumConfig, names: Sequence[str]) -> str:
    """One line in plain words: which sources rose and fell most by a step, and why.

    Args:
        before: the state that the step's draws came from.
        after: the state that the step led to.
        config: the rule.
        names: the sources' labels, in the order of source indices.
    """
    if config.kind == "easy_to_hard":
        recent = after.sources[before.level].accuracy
        seen = f"accuracy {_mean(recent):.2f} over {len(recent)} of {config.window} responses"
        if after.level > before.level:
            return f"moved on from {names[before.level]} to {names[after.level]}: {seen}"
        if after.level + 1 == len(names):
            return f"stays on {names[after.level]}, the last: {seen}"
        return f"stays on {names[after.level]}: {seen}, {config.promote_at:g} over all of them moves on"
    if config.kind != "dump":
        return f"probabilities are fixed ({config.kind})"
    # Probabilities are shown with two decimals, so a smaller change would look like none.
    change_M = probabilities(after, config) - probabilities(before, config)
    moved = [
        _why(before, after, config, names, int(index), rose)
        for index, rose in ((change_M.argmax(), True), (change_M.argmin(), False))
        if abs(change_M[index]) >= 0.005
    ]
    return "; ".join(moved) or "no probability moved by 0.005 or more"


def _why(
    before: CurriculumState,
    after: CurriculumState,
    config: CurriculumConfig,
    names: Sequence[str],
    index: int,
    rose: bool,
) -> str:
    """Why one source's probability moved: its own advantages, its own bonus, or what others did."""
    # With the sign, a fall is explained by the same comparisons as a rise.
    probability_M, sign = probabilities(before, config), 1 if rose else -1
    head = f"{names[index]} {'rose' if rose else 'fell'} {probability_M[index]:.2f} to"
    head += f" {probabilities(after, config)[index]:.2f}: "
    terms = {
        "mean |advantage|": (learnability(before), learnability(after)),
        "bonus": (exploration_bonus(before), exploration_bonus(after)),
    }
    change_M = sum((now_M - was_M for was_M, now_M in terms.values()), np.zeros(len(names)))
    others_M = np.where(np.arange(len(names)) == index, 0, probability_M)
    # A source that has all the probability has no others, and the quotient is then 0.
    others = float(others_M @ change_M) / max(float(others_M.sum()), 1e-12)
    # To first order a probability follows its own change less the mean change of the others.
    if sign * change_M[index] < -sign * others:
        return head + f"the other sources {'fell' if rose else 'rose'} by more"
    # The term that moved furthest in the right direction is named as the reason.
    name, (was_M, now_M) = max(terms.items(), key=lambda term: sign * (term[1][1] - term[1][0])[index])
    why = f"its {name} went {was_M[index]:.2f} to {now_M[index]:.2f}"
    source = after.sources[index]
    responses = source.count - before.sources[index].count
    if name == "bonus":
        return head + why + (f", {responses} more responses seen" if responses else ", none of its responses seen")
    return head + why + f", accuracy {_mean(source.accuracy):.2f} over {len(source.accuracy)} responses"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
