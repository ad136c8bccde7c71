"""Which correction has the least error as completions get longer? Exact, on the model of `verify-estimators`.

    python -m experiments.estimator_lengths [--json FILE]   (about a minute on two cores)

One layer is skipped, drawn per batch, and the target is one update ahead. Completions have at most 2 to 7 tokens, and
all of them are listed. A gradient estimate is of one completion with the true mean reward as its baseline, so that
single completions suffice and no group has to be listed. After n completions, the error of the direction is
sqrt(direction bias^2 + noise^2 / n); the table has n = 1024.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.arguments import add_json, add_list, command, experiment_parser
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.reports.tables import table
from nested_reft.verification.enumerable_model import EnumeratedPolicies, Scenario, TinyModel, enumerate_policies
from nested_reft.verification.enumeration import DEPTHS, gradients_of_rows

COMPLETIONS = 1024
LENGTHS = (2, 3, 5, 7)
EXACT = PolicyGradientConfig("no_baseline", "base", "sequence", "fixed_length", fixed_length_tokens=1)
# The changes of each estimator to the exact one.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "one": {"bias_mitigation": "one", "level": "token"},
    "token": {"level": "token"},
    "token, truncated at 2": {"level": "token", "truncate_at": 2.0},
    "prefix, truncated at 2": {"level": "prefix", "truncate_at": 2.0},
    "geometric": {"level": "geometric"},
    "sequence": {},
    "sequence, truncated at 2": {"truncate_at": 2.0},
    "sequence, truncated at 5": {"truncate_at": 5.0},
}


def direction_and_noise(loss: PolicyGradientConfig, policies: EnumeratedPolicies) -> tuple[float, float]:
    """Direction bias and noise of one completion's gradient, relative to the true gradient's length.

    Args:
        loss: without a baseline.
        policies: of one scenario.
    """
    num_prompts, num_completions = policies.completions.reward_XY.shape
    target_XYC = np.asarray(policies.target_logprob_XYC)
    probability_XY = np.exp(np.asarray(target_XYC, np.float64).sum(axis=-1))
    # A constant per prompt leaves every exact estimator exact.
    mean_X1 = (probability_XY * policies.completions.reward_XY).sum(axis=1, keepdims=True)
    advantage_XY = (policies.completions.reward_XY - mean_X1).astype(np.float32)
    mean_M, square = np.zeros(policies.jacobian_XRM.shape[-1]), 0.0
    plans = policies.nested_logprob_ZXYC
    for nested_XYC in np.asarray(plans):
        gradient_RGC, _ = gradients_of_rows(
            loss,
            jnp.asarray(np.tile(policies.completions.length_Y, num_prompts)[:, None]),
            jnp.asarray(advantage_XY.reshape(-1, 1)),
            _groups_of_one(target_XYC),
            _groups_of_one(policies.old_logprob_XYC),
            _groups_of_one(policies.reference_logprob_XYC),
            _groups_of_one(nested_XYC),
            _groups_of_one(nested_XYC),
            jnp.zeros((num_prompts * num_completions, 1)),
        )
        coefficient_XYC = np.asarray(gradient_RGC, np.float64).reshape(nested_XYC.shape)
        behavior_XY = np.exp(nested_XYC.astype(np.float64).sum(axis=-1)) / (num_prompts * len(plans))
        for x in range(num_prompts):
            jacobian_YCM = policies.jacobian_XRM[x].reshape(*nested_XYC.shape[1:], -1)
            gradient_YM = np.einsum("yc,ycm->ym", coefficient_XYC[x], jacobian_YCM)
            mean_M += behavior_XY[x] @ gradient_YM
            square += float(behavior_XY[x] @ (gradient_YM**2).sum(axis=1))
    truth_M = policies.reward_gradient_M
    along, length = float(mean_M @ truth_M), float(np.linalg.norm(truth_M))
    direction = float(np.linalg.norm(truth_M - mean_M * along / float(mean_M @ mean_M))) / length
    deviation = math.sqrt(max(square - float(mean_M @ mean_M), 0.0)) / length
    return direction, deviation / (along / length**2) if along > 0 else math.inf


def _groups_of_one(logprob_XYC: Any) -> Array:
    """Each prompt and completion as a group by itself."""
    return jnp.asarray(np.asarray(logprob_XYC).reshape(-1, 1, logprob_XYC.shape[-1]))


def measured(seed: int, max_tokens: int) -> dict[str, Any]:
    """Every estimator on completions of at most `max_tokens`.

    Args:
        seed: of the model.
        max_tokens: C.
    """
    model = TinyModel(seed, max_tokens)
    (policies,) = enumerate_policies(model, [Scenario("one layer", DEPTHS["one layer"], 1)])
    found = {
        name: direction_and_noise(PolicyGradientConfig(**(vars(EXACT) | changes)), policies)
        for name, changes in ESTIMATORS.items()
    }
    return {"max_tokens": max_tokens, "kl_per_token": policies.kl_per_token, "estimators": found}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table: error after `COMPLETIONS` completions, and direction bias / noise behind it.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("estimator_lengths", __doc__)
    parser.add_argument("--seed", type=whole(0), default=0, help="of the model")
    # All completions are listed, and each token more makes several times as many.
    add_list(parser, "--lengths", LENGTHS, type=whole(1, 8), help="of completions, in tokens")
    add_json(parser)
    known = parser.parse_args(arguments)
    results = [measured(known.seed, max_tokens) for max_tokens in known.lengths]
    rows = []
    for name in ESTIMATORS:
        pairs = [result["estimators"][name] for result in results]
        errors = [math.hypot(direction, noise / math.sqrt(COMPLETIONS)) for direction, noise in pairs]
        cells = [f"{e:.2f} ({d:.2f} / {n:.1f})" for e, (d, n) in zip(errors, pairs, strict=True)]
        rows.append([name, *cells])
    header = ["error (direction bias / noise)"]
    header += [f"{result['max_tokens']} tokens, {result['kl_per_token']:.2f} nats" for result in results]
    print(table(header, rows))
    keep_json(known.json, results)


if __name__ == "__main__":
    sys.exit(main())
