"""Precision and depth as one policy: what their product saves, and how far off-policy it is. SmolLM2-135M.

    python -m experiments.precision_depth [--json FILE]

The full model answers training prompts of `smollm2_step_sum`, and bridges are fitted on the answers, one for each run
of neighbours. Each policy then answers held-out prompts, and the full float32 model scores what it sampled. Speeds are
of whole calls in the shape of that job (4 prompts x 8 completions, 44 tokens, no stop), timed in turn, best of all
repeats. A plan's bridges are fitted once, in float32, and rounded with the layers. `--config` and `--leave-out` take
another job and other layers.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from experiments.arguments import add_json, command, experiment_parser
from experiments.bridges import answers, check_prompts, tokens_of
from nested_reft.bridge_fitting import fit_bridges
from nested_reft.bridging import BridgeConfig
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.data.pipeline import batch_prompts
from nested_reft.estimators.health import Health, off_policy_health
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.models.low_precision import low_precision
from nested_reft.reports.tables import table
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import versions
from nested_reft.training.config import load_config
from nested_reft.training.setup import Setup, prepare
from nested_reft.types import Prompts, valid_mask

# The layers that cost least to bridge on sums; see `experiments.bridges`.
LEFT_OUT = (
    (3, 4, 5, 6, 7, 12, 15, 27, 28),
    (2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 15, 22, 25, 27, 28),
)
PRECISIONS = ("float32", "bfloat16", "int8")
Policies = dict[tuple[str, str], tuple[Policy, LayerPlan]]


def nested_plan(layers: Sequence[int], num_layers: int) -> LayerPlan:
    """One bridge for each run of neighbours among the layers; the full model without any.

    Args:
        layers: what is left out.
        num_layers: L.

    Raises:
        ValueError: the model does not have one of the layers, or none would be left.
    """
    if not layers:
        return LayerPlan.full(num_layers)
    nesting = NestingConfig(choice="fixed", layers=tuple(layers), bridge=BridgeConfig("per_run"))
    try:
        nesting.validate_for(num_layers)
    except ValueError as error:
        raise ValueError(str(error).replace("nesting.layers", "--leave-out")) from None
    return draw_plan(jax.random.key(0), nesting, num_layers)


def policies_of(setup: Setup, plans: Sequence[LayerPlan], fit_prompts: int) -> Policies:
    """Every policy, by depth and precision, with its plan.

    Args:
        setup: with a model that has bridges.
        plans: of the depths.
        fit_prompts: training prompts to fit on.
    """
    policy, config = setup.policy, setup.config
    size, group_size = config.data.prompts_per_batch, config.rollout.group_size
    texts = answers(setup, setup.data.train_examples[0][:fit_prompts], size, group_size, salt=1)
    print(f"bridges are fitted on {tokens_of(texts)} completion tokens", flush=True)
    nothing, found = policy.model.stacked_bridges(), {}
    for plan in plans:
        left_out = len(plan.left_out(policy.num_layers))
        depth = f"{left_out} layers, {plan.shape.bridged} bridges" if left_out else "full"
        # A model is changed in place, so each depth has its own.
        model = nnx.clone(policy.model)
        model.load_bridges(nothing)
        if left_out:
            model.load_bridges(fit_bridges(model, texts, config.nesting.bridge.ridge, plan, setup.data.shared_prefix))
        for precision in PRECISIONS:
            rounded = model if precision == "float32" else low_precision(model, precision)
            found[depth, precision] = dataclasses.replace(policy, model=rounded), plan
    return found


def mismatch(setup: Setup, policy: Policy, plan: LayerPlan, batches: Sequence[Prompts]) -> Health:
    """How far the samples of a policy are from the full float32 model, over all batches as one.

    Args:
        setup: of the full model.
        policy, plan: what samples.
        batches: held-out prompts.
    """
    size, prefix = setup.config.rollout.group_size, setup.data.shared_prefix
    parts = []
    for number, prompts in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(2), number)
        rollouts = policy.generate(prompts, plan, key, group_size=size, shared_prefix=prefix)
        full = setup.policy.logprobs(
            rollouts.prompt_BP, rollouts.prompt_length_B, rollouts.tokens_BGC, shared_prefix=prefix
        )
        parts.append((full, rollouts.behavior_logprob_BGC, valid_mask(rollouts.length_BG, full.shape[-1])))
    return jax.device_get(off_policy_health(*(jnp.concatenate(part) for part in zip(*parts, strict=True))))


def speeds(setup: Setup, policies: Policies, prompts: Prompts, repeats: int) -> dict[tuple[str, str], float]:
    """Sampled tokens per second of whole calls.

    Args:
        setup: gives the shape of a call.
        policies: what is timed, in turn, so that a slow minute of the machine falls on all.
        prompts: what is answered.
        repeats: timed calls of each; one more before them compiles.
    """
    size, prefix = setup.config.rollout.group_size, setup.data.shared_prefix

    def seconds(policy: Policy, plan: LayerPlan) -> float:
        started = time.monotonic()
        rollouts = policy.generate(prompts, plan, jax.random.key(3), group_size=size, shared_prefix=prefix, stops=False)
        jax.block_until_ready(rollouts)
        return time.monotonic() - started

    for each in policies.values():
        seconds(*each)
    times = [[seconds(*each) for each in policies.values()] for _ in tqdm(range(repeats), desc="timing", leave=False)]
    tokens = len(prompts.tokens_BP) * size * setup.config.rollout.max_completion_tokens
    return {name: tokens / best for name, best in zip(policies, np.min(times, axis=0), strict=True)}


def start_of(name: str, fit_prompts: int, measured_prompts: int) -> Setup:
    """A configuration's full model in float32, with bridges that are zero.

    Args:
        name: of the configuration.
        fit_prompts: training prompts that will be needed.
        measured_prompts: held-out prompts that will be needed.

    Raises:
        ValueError: the configuration cannot work, or there are too few prompts.
    """
    config = load_config(name)
    # How plans are drawn does not matter here; the model needs bridges, of the job's own ridge.
    bridge = dataclasses.replace(config.nesting.bridge, kind="per_layer")
    rollout = dataclasses.replace(config.rollout, weights="target")
    setup = prepare(dataclasses.replace(config, nesting=NestingConfig(bridge=bridge), rollout=rollout))
    size = config.data.prompts_per_batch
    check_prompts("--fit-prompts", fit_prompts, size, setup.data.train_examples[0])
    check_prompts("--measured-prompts", measured_prompts, size, setup.data.heldout_examples[0])
    return setup


def measure(
    setup: Setup, plans: Sequence[LayerPlan], fit_prompts: int, measured_prompts: int, repeats: int
) -> dict[str, Any]:
    """Every policy's speed and mismatch.

    Args:
        setup: of `start_of`.
        plans: of the depths, the full model first.
        fit_prompts: training prompts to fit on.
        measured_prompts: held-out prompts to answer.
        repeats: timed calls.
    """
    size, heldout = setup.config.data.prompts_per_batch, setup.data.heldout_examples[0]
    batches = [
        batch_prompts(heldout[start : start + size], [0] * size, setup.data.prompt_size)
        for start in range(0, measured_prompts - size + 1, size)
    ]
    policies = policies_of(setup, plans, fit_prompts)
    rows = []
    for (depth, precision), (policy, plan) in tqdm(policies.items(), desc="mismatch", leave=False):
        health = mismatch(setup, policy, plan, batches)
        names = ("kl_behavior_target", "ess_token", "ess_sequence", "ratio_tail", "ratio_max")
        rows.append({"depth": depth, "precision": precision} | {name: float(getattr(health, name)) for name in names})
    rates = speeds(setup, policies, batches[0], repeats)
    slowest = rates["full", "float32"]
    for row in rows:
        rate = rates[row["depth"], row["precision"]]
        row |= {"tokens_per_second": rate, "speedup": rate / slowest}
    return {"rows": rows, "versions": versions()}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("precision_depth", __doc__)
    parser.add_argument("--config", default="smollm2_step_sum", help="whose model and prompts")
    # `nested_plan` refuses a layer that is named twice.
    parser.add_argument(
        "--leave-out", type=whole(0), nargs="+", action="append", metavar="LAYER", help="layers of one depth; repeat it"
    )
    parser.add_argument("--fit-prompts", type=whole(1), default=20)
    parser.add_argument("--measured-prompts", type=whole(1), default=32)
    parser.add_argument("--repeats", type=whole(1), default=5)
    add_json(parser)
    known = parser.parse_args(arguments)
    with checking_input():
        setup = start_of(known.config, known.fit_prompts, known.measured_prompts)
        depths = [(), *(known.leave_out or LEFT_OUT)]
        plans = [nested_plan(layers, setup.policy.num_layers) for layers in depths]
    found = measure(setup, plans, known.fit_prompts, known.measured_prompts, known.repeats)
    print(report(found))
    keep_json(known.json, found)


def report(found: dict[str, Any]) -> str:
    """The table of `measure`'s results.

    Args:
        found: what it returned.
    """
    formats = {"tokens_per_second": ".0f", "speedup": ".2f", "kl_behavior_target": ".4f", "ratio_max": ".1f"}
    names = ["speedup", "tokens_per_second", "kl_behavior_target", "ess_token", "ess_sequence", "ratio_tail"]
    names.append("ratio_max")
    rows = [
        [row["depth"], row["precision"], *(format(row[name], formats.get(name, ".3f")) for name in names)]
        for row in found["rows"]
    ]
    return table(["depth", "precision", *names], rows)


if __name__ == "__main__":
    sys.exit(main())
