"""How much of a prompt's stored completions the policy of later would keep, if it used them as drafts.

    python -m experiments.stored_drafts

`tiny` without nesting. At some steps a batch is drawn twice from the policy: once by the step, which trains on it, and
once more beside it. After further updates the policy scores both. From the log-probabilities follow, without another
draw, what two rules would keep of a draft x:

    speculative   each token with probability min(1, p / q), up to the first that is rejected
    matched       each token with probability p: that of a policy which draws afresh and happens to draw the same

The second is what any sampler keeps that is exact given all that has happened. The first is exact where p does not
depend on the draft, which training on it may change. `drift` is the mean of log p - log q over completions: its
difference between the batch that was trained on and the other one is that dependence.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments.arguments import add_json, add_list, add_seeds, command, experiment_parser
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.layer_skip import NestingConfig
from nested_reft.reports.tables import table
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training.config import load_config
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from nested_reft.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a rule keeps of drafts, in expectation.

    Attributes:
        tokens: share of all draft tokens.
        whole: share of drafts that are kept to their end.
    """

    tokens: float
    whole: float


def kept(chance_NC: Float[np.ndarray, "N C"], mask_NC: Bool[np.ndarray, "N C"]) -> Kept:
    """What is kept where each token has a chance, and the first that is rejected ends it.

    Args:
        chance_NC: of each token, given that those before it were kept.
        mask_NC: the tokens of each draft.
    """
    so_far_NC = np.cumprod(np.where(mask_NC, chance_NC, 1.0), axis=1)
    return Kept(float((so_far_NC * mask_NC).sum() / mask_NC.sum()), float(so_far_NC[:, -1].mean()))


def compare(policy: Policy, rollouts: Rollouts) -> dict[str, float]:
    """What both rules keep of some completions, and how far the policy has moved on them.

    Args:
        policy: of now.
        rollouts: on the host; the policy of then drew them.
    """
    prompt_BP, length_B, tokens_BGC = map(
        jnp.asarray, (rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC)
    )
    log_p_BGC = policy.logprobs(prompt_BP, length_B, tokens_BGC)
    size = rollouts.tokens_BGC.shape[-1]
    log_p_NC, log_q_NC = (
        np.asarray(value, np.float64).reshape(-1, size) for value in (log_p_BGC, rollouts.behavior_logprob_BGC)
    )
    mask_NC = np.arange(size) < np.asarray(rollouts.length_BG).reshape(-1, 1)
    speculative = kept(np.exp(np.minimum(log_p_NC - log_q_NC, 0)), mask_NC)
    matched = kept(np.exp(log_p_NC), mask_NC)
    return {
        "speculative_tokens": speculative.tokens,
        "matched_tokens": matched.tokens,
        "speculative_whole": speculative.whole,
        "matched_whole": matched.whole,
        "drift": float(np.where(mask_NC, log_p_NC - log_q_NC, 0).sum(axis=1).mean()),
    }


def measured(seed: int, starts: Sequence[int], ages: Sequence[int], directory: Path) -> list[dict[str, Any]]:
    """One run: both rules on batches of several steps, at several ages.

    Args:
        seed: of the run.
        starts: steps whose batches are kept.
        ages: updates after which they are looked at.
        directory: of the run.
    """
    config = load_config("tiny")
    train = dataclasses.replace(config.train, seed=seed, steps=max(starts) + max(ages) + 1)
    rollout = dataclasses.replace(config.rollout, weights="target")
    config = dataclasses.replace(config, train=train, rollout=rollout, nesting=NestingConfig())
    held, found = dict[int, dict[str, Rollouts]](), list[dict[str, Any]]()
    with Trainer(prepare(config), RunDirectory(directory)) as run:
        run.open().run_earlier_phases()
        for number in range(train.steps):
            policy = run.state.learner.policy()
            for start, sets in held.items():
                if number - start in ages:
                    found += [
                        {"seed": seed, "start": start, "age": number - start, "set": name, **compare(policy, rollouts)}
                        for name, rollouts in sets.items()
                    ]
            key = jax.random.fold_in(jax.random.key(seed), number)
            scored = run.step(number).found[0]
            if number in starts:
                # The policy from before the step has been lent, so the update has left its buffers alone.
                other = policy.generate(scored.prompts, None, key, group_size=config.rollout.group_size)
                held[number] = {"trained on": scored.rollouts, "not trained on": jax.device_get(other)}
            del policy
    return found


def summary_table(found: Sequence[dict[str, Any]]) -> str:
    """One row for each age and set, means over seeds and batches.

    Args:
        found: of `measured`.
    """
    measures = ["speculative_tokens", "matched_tokens", "speculative_whole", "matched_whole", "drift"]
    rows = []
    for age in sorted({each["age"] for each in found}):
        for name in ("trained on", "not trained on"):
            chosen = [each for each in found if each["age"] == age and each["set"] == name]
            rows.append([name, age, *(f"{np.mean([each[measure] for each in chosen]):.3f}" for measure in measures)])
    return table(["drafts", "updates old", *(measure.replace("_", ", ") for measure in measures)], rows)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("stored_drafts", __doc__)
    add_seeds(parser, 3)
    add_list(parser, "--starts", (0, 20, 40), type=whole(0), help="steps at which batches are drawn")
    add_list(parser, "--ages", (1, 10, 40), type=whole(1), help="updates after which they are scored")
    add_json(parser, "the figures")
    known = parser.parse_args(arguments)
    found = []
    for seed in known.seeds:
        with tempfile.TemporaryDirectory() as directory:
            found += measured(seed, known.starts, known.ages, Path(directory) / "run")
    print(summary_table(found))
    keep_json(known.json, {"versions": versions(), "found": found})


if __name__ == "__main__":
    sys.exit(main())
