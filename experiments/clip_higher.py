"""Does a higher upper clip keep more entropy (DAPO, arXiv 2503.14476, section 3.1)? On tabular policies.

    python -m experiments.clip_higher

For three starting policies and four schedules: the policy's entropy after training with clips 0.2 / 0.2 and
0.2 / 0.28, mean of eight seeds, once with rewards that say which tokens are right and once with
rewards that are coin flips.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.arguments import add_json, command, experiment_parser
from nested_reft.cli.arguments import keep_json
from nested_reft.estimators.advantages import group_advantages
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.policy_gradient import policy_gradient_loss
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.types import TrainBatch

SHAPE = (8, 16)  # prompts, completions of one token each
# Name, starting probabilities, and how many of the first tokens are right.
STARTS = (
    ("a common, a rare", [0.3, 0.02] + [0.085] * 8, 2),
    ("a common, four rare", [0.6] + [0.05] * 8, 5),
    ("a common, five rarer", [0.5] + [0.02] * 5 + [0.08] * 5, 6),
)
SCHEDULES = tuple(itertools.product((12, 40), ((16, 1.0), (8, 4.0))))  # batches; updates of each, learning rate


def final_entropy(
    clip_high: float,
    probability: Sequence[float],
    num_right: int | None,
    batches: int = 12,
    updates: int = 16,
    learning_rate: float = 1.0,
) -> float:
    """Entropy in nats after training, mean of eight seeds.

    Args:
        clip_high: upper clip; the lower one is 0.2.
        probability: of each token at the start.
        num_right: the first tokens are right; None for rewards by the flip of a coin.
        batches, updates, learning_rate: of gradient descent on the logits.
    """
    config = PolicyGradientConfig("group_std", "base", "token", "token_mean", clip_low=0.2, clip_high=clip_high)

    def one_batch(logits_V: Float[Array, " V"], key: Array):
        # A completion is one token and depends on no prompt, so the logits are the whole policy.
        behavior_V = jax.nn.log_softmax(logits_V)
        tokens_BG = jax.random.categorical(key, logits_V, shape=SHAPE)
        # The coin needs randomness of its own; with the key of the tokens it would follow them.
        coin_BG = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, SHAPE)
        reward_BG = (coin_BG if num_right is None else tokens_BG < num_right).astype(jnp.float32)
        batch = TrainBatch(
            prompt_BP=jnp.zeros((SHAPE[0], 1), jnp.int32),
            prompt_length_B=jnp.ones(SHAPE[0], jnp.int32),
            tokens_BGC=tokens_BG[..., None],
            length_BG=jnp.ones(SHAPE, jnp.int32),
            forced_BG=jnp.zeros(SHAPE, jnp.int32),
            counted_BG=jnp.ones(SHAPE, bool),
            signal_BG=group_advantages(reward_BG, jnp.ones(SHAPE, bool), "group_std"),
            behavior_logprob_BGC=behavior_V[tokens_BG][..., None],
        )

        def loss(logits_V: Float[Array, " V"]) -> Float[Array, ""]:
            logprob_BGC = jax.nn.log_softmax(logits_V)[tokens_BG][..., None]
            return policy_gradient_loss(logprob_BGC, batch, config).total.mean()

        # All updates reuse one batch: the policy moves away from `behavior_V`, and the clips begin to act.
        return jax.lax.fori_loop(0, updates, lambda _, x: x - learning_rate * jax.grad(loss)(x), logits_V), None

    def run(key: Array) -> Float[Array, ""]:
        logits_V, _ = jax.lax.scan(one_batch, jnp.log(jnp.asarray(probability)), jax.random.split(key, batches))
        logprob_V = jax.nn.log_softmax(logits_V)
        return -(jnp.exp(logprob_V) * logprob_V).sum()

    return float(jnp.mean(jax.lax.map(run, jax.random.split(jax.random.key(0), 8))))


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all policies and prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("clip_higher", __doc__)
    add_json(parser)
    known = parser.parse_args(arguments)
    rows = []
    for (name, probability, num_right), (batches, (updates, learning_rate)) in itertools.product(STARTS, SCHEDULES):
        entropies = [
            final_entropy(clip_high, probability, right, batches, updates, learning_rate)
            for right in (num_right, None)
            for clip_high in (0.2, 0.28)
        ]
        rows.append([name, batches, updates, learning_rate, *entropies])
    columns = ["right tokens", "batches", "updates", "rate", "told: 0.2", "0.28", "coin: 0.2", "0.28"]
    print(table(columns, [[*row[:4], *(f"{entropy:.3f}" for entropy in row[4:])] for row in rows]))
    keep_json(known.json, {"versions": versions(), "columns": columns, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
