"""How does the length of answers interact with skipped layers? SmolLM2-135M on questions of GSM8K.

    python -m experiments.answer_lengths [--folder FOLDER] [--json FILE]

The full model and nested policies answer the same questions. One table has the length of their answers, and the share
that ends before the limit. The other follows the importance weight along the answer: how far the nested policy is from
the full one by position, and what is left of the effective sample size when the weights of the first n tokens are
multiplied. Measured plans leave out the layers that cost least; uniform ones are drawn anew for each batch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from experiments.arguments import BELOW_ONE, add_json, add_list, command, experiment_parser
from experiments.bridges import check_prompts, gsm8k
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_skip import NestingConfig, check_share, draw_plan, layers_in
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sharding import to_host
from nested_reft.sweeps.intervals import mean_over_seeds
from nested_reft.training.setup import Setup, prepare

FULL = "full"
BATCH, GROUP = 16, 4  # prompts that are answered at once, and completions of each


@dataclass(frozen=True)
class Answers:
    """What one policy answered; N completions, those of a prompt side by side.

    Attributes:
        length_N: tokens.
        ended_N: whether a stop token came before the limit.
        log_ratio_NC: log pi_full - log pi_nested of each token that was drawn, in nats; 0 behind the end.
    """

    length_N: Int[np.ndarray, " N"]
    ended_N: Bool[np.ndarray, " N"]
    log_ratio_NC: Float[np.ndarray, "N C"]


def answers(setup: Setup, nesting: NestingConfig, skipped: int, prompts: int) -> Answers:
    """The answers of a nested policy, with a plan of its own for each batch.

    Args:
        setup: model and questions.
        nesting: how layers are chosen.
        skipped: how many are left out; 0 is the full model.
        prompts: questions, a multiple of `BATCH`.
    """
    policy, found = setup.policy, list[tuple[np.ndarray, ...]]()
    for start in tqdm(range(0, prompts, BATCH), desc=f"{skipped} skipped, {nesting.choice}", leave=False):
        batch = batch_prompts(setup.data.train_examples[0][start : start + BATCH], [0] * BATCH, setup.data.prompt_size)
        # All policies draw with the same numbers.
        key = jax.random.fold_in(jax.random.key(0), start)
        plan_key, key = jax.random.split(key)
        plan = draw_plan(plan_key, nesting, policy.num_layers, setup.divergence_L, skipped)
        own = to_host(policy.generate(batch, plan, key, group_size=GROUP))
        full_BGC = np.asarray(policy.logprobs(own.prompt_BP, own.prompt_length_B, own.tokens_BGC))
        is_own_BGC = np.arange(full_BGC.shape[-1]) < own.length_BG[..., None]
        log_ratio_BGC = np.where(is_own_BGC, full_BGC - own.behavior_logprob_BGC, 0.0)
        rows = own.length_BG, own.finished_BG, log_ratio_BGC
        found.append(tuple(x.reshape(-1, *x.shape[2:]) for x in rows))
    return Answers(*(np.concatenate(x) for x in zip(*found, strict=True)))


def length_row(name: str, own: Answers, full: Answers) -> dict[str, Any]:
    """Lengths of a policy's answers beside those of the full model, paired by prompt.

    Args:
        name: of the policy.
        own, full: both policies' answers to the same prompts.
    """
    by_prompt = [x.length_N.reshape(-1, GROUP).mean(axis=1) for x in (own, full)]
    longer = mean_over_seeds((by_prompt[0] - by_prompt[1]).tolist())
    return {
        "policy": name,
        "tokens": float(own.length_N.mean()),
        "longer": None if own is full else longer["mean"],
        "interval": None if own is full else longer["interval"],
        "ended": float(own.ended_N.mean()),
    }


def position_row(name: str, own: Answers, ends: Sequence[int]) -> dict[str, Any]:
    """How far a policy is from the full one along its answers.

    Args:
        name: of the policy.
        own: its answers.
        ends: of the stretches of positions that are looked at, in rising order.
    """
    starts = [0, *ends[:-1]]
    is_own_NC = np.arange(own.log_ratio_NC.shape[1]) < own.length_N[:, None]
    kl, share = list[float | None](), list[float]()
    for start, end in zip(starts, ends, strict=True):
        count = int(is_own_NC[:, start:end].sum())
        kl.append(-float(own.log_ratio_NC[:, start:end].sum()) / count if count else None)
        log_weight_N = own.log_ratio_NC[:, :end].astype(np.float64).sum(axis=1)
        weight_N = np.exp(log_weight_N - log_weight_N.max())
        share.append(float(weight_N.sum() ** 2 / (weight_N**2).sum() / len(weight_N)))
    return {"policy": name, "ends": list(ends), "kl": kl, "ess": share}


def report(lengths: Sequence[dict[str, Any]], positions: Sequence[dict[str, Any]]) -> str:
    """Both tables.

    Args:
        lengths: of `length_row`.
        positions: of `position_row`.
    """
    rows = [
        [
            row["policy"],
            f"{row['tokens']:.1f}",
            "-" if row["longer"] is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(row["longer"], *row["interval"]),
            f"{row['ended']:.2f}",
        ]
        for row in lengths
    ]
    first = table(["policy", "tokens", "more than full (95 %)", "ended"], rows)
    ends = positions[0]["ends"] if positions else []
    stretches = [f"KL {start + 1}-{end}" for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
    header = ["policy", *stretches, *(f"ESS of {end}" for end in ends)]
    cells = [
        [
            row["policy"],
            *("-" if kl is None else f"{kl:.3f}" for kl in row["kl"]),
            *(f"{ess:.3f}" for ess in row["ess"]),
        ]
        for row in positions
    ]
    return f"{first}\n\n{table(header, cells)}" if cells else first


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("answer_lengths", __doc__)
    parser.add_argument("--folder", type=Path, help="where GSM8K's files lie; left out, they are downloaded")
    parser.add_argument("--config", default="smollm2_chain_sum", help="whose model, and whose measured layers")
    parser.add_argument("--prompts", type=whole(1), default=64, help=f"questions; a multiple of {BATCH}")
    parser.add_argument("--tokens", type=whole(2), default=192, help="the most of an answer")
    add_list(parser, "--ratios", (0.1, 0.2, 0.33), type=BELOW_ONE, help="shares of the layers that are left out")
    add_json(parser)
    known = parser.parse_args(arguments)
    with checking_input():
        config = gsm8k(known.config, known.folder).config
        if known.prompts % BATCH:
            raise ValueError(f"--prompts is {known.prompts}; allowed are multiples of {BATCH}")
        if config.nesting.choice != "measured":
            raise ValueError(
                f"--config is '{known.config}', whose nesting.choice is '{config.nesting.choice}'; allowed are those"
                " with 'measured' plans"
            )
        rollout = dataclasses.replace(config.rollout, max_completion_tokens=known.tokens)
        setup = prepare(dataclasses.replace(config, rollout=rollout))
        for ratio in known.ratios:
            check_share("--ratios", ratio, setup.policy.num_layers)
        check_prompts("--prompts", known.prompts, BATCH, setup.data.train_examples[0])
    measured = dataclasses.replace(config.nesting, divergence_temperature=0.0)
    choices = {"measured": measured, "uniform": NestingConfig(border=measured.border)}
    ends = sorted({max(known.tokens // share, 1) for share in (12, 4, 1)})
    full = answers(setup, choices["uniform"], 0, known.prompts)
    lengths, positions = [length_row(FULL, full, full)], list[dict[str, Any]]()
    for ratio in known.ratios:
        for choice, nesting in choices.items():
            skipped = layers_in(ratio, setup.policy.num_layers)
            own = answers(setup, nesting, skipped, known.prompts)
            name = f"{skipped} of {setup.policy.num_layers}, {choice}"
            lengths.append(length_row(name, own, full))
            positions.append(position_row(name, own, ends))
            keep_json(known.json, {"versions": versions(), "lengths": lengths, "positions": positions})
    print(report(lengths, positions))


if __name__ == "__main__":
    sys.exit(main())
