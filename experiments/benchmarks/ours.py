"""Our rollouts, as a worker."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.arguments import BELOW_ONE, add_list
from experiments.benchmarks.worker import Case, Spec, serve
from nested_reft.bridging import BridgeConfig
from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.models.bridges import Bridges
from nested_reft.models.low_precision import low_precision
from nested_reft.models.registry import load_model
from nested_reft.rollout.policy import Policy
from nested_reft.types import Prompts, Rollouts

VARIANTS: dict[str, Callable[[str], Policy]] = {
    "float32": lambda directory: policy_of(directory),
    "bfloat16": lambda directory: rounded(policy_of(directory), "bfloat16"),
    "int8": lambda directory: rounded(policy_of(directory), "int8"),
}
"""How the policy that samples is made of a directory of weights."""


def policy_of(directory: str) -> Policy:
    """A policy in float32 at temperature 1, on one device.

    Args:
        directory: weights in Hugging Face layout.
    """
    model, tokenizer = load_model(directory, jnp.float32)
    # Bridges of zeros cost what others do; plans of whole layers do not read them.
    model.bridges = Bridges(model.config.num_layers, model.config.width)
    return Policy(model, tokenizer)


def rounded(policy: Policy, precision: Literal["bfloat16", "int8"]) -> Policy:
    """The policy with its weights in fewer bits, as training with `rollout.weights` samples."""
    return dataclasses.replace(policy, model=low_precision(policy.model, precision))


def plan_of(case: Case, num_layers: int) -> LayerPlan:
    """The plan of a case, always the same: it skips or bridges a share of the layers."""
    bridge = BridgeConfig("per_layer") if case.bridged else BridgeConfig()
    return draw_plan(jax.random.key(0), NestingConfig(skip_ratio=case.skip_ratio, bridge=bridge), num_layers)


def add_skip_ratios(parser: argparse.ArgumentParser, default: Sequence[float], **about: Any) -> None:
    """Adds `--skip-ratios`, which `check_skip_ratios` looks at once the model is known.

    Args:
        parser: of the benchmark.
        default: the shares where it is left out.
        about: further arguments of `add_argument`.
    """
    add_list(parser, "--skip-ratios", default, type=BELOW_ONE, help="shares of layers that plans leave out", **about)


def check_skip_ratios(skip_ratios: Sequence[float], case: Case, num_layers: int) -> None:
    """Refuses shares that the model has no plan for.

    Args:
        skip_ratios: of `--skip-ratios`.
        case: any of the benchmark's.
        num_layers: L of the model.

    Raises:
        ValueError: there is one.
    """
    for skip_ratio in skip_ratios:
        try:
            plan_of(dataclasses.replace(case, skip_ratio=skip_ratio), num_layers)
        except ValueError as error:
            raise ValueError(f"--skip-ratios: {error}") from None


def prompts_of(case: Case, vocab_size: int) -> Prompts:
    """The case's prompts as a batch.

    Args:
        case: how many prompts, and how long.
        vocab_size: V, which token ids stay below.
    """
    # Nothing is scored, so the prompts need no texts and no answers.
    nothing = ("",) * case.prompts
    return Prompts(
        tokens_BP=np.array(case.prompt_ids(vocab_size), np.int32),
        length_B=np.full(case.prompts, case.prompt_tokens, np.int32),
        source_B=np.zeros(case.prompts, np.int32),
        texts=nothing,
        answers=nothing,
        metadata=({},) * case.prompts,
    )


def rollout_call(policy: Policy, case: Case) -> Callable[[], Rollouts]:
    """A rollout of the case, as training makes them; no token ends it.

    Args:
        policy: what samples.
        case: the workload, with the share of layers to skip.
    """
    prompts = prompts_of(case, policy.model.config.vocab_size)
    plan = plan_of(case, policy.num_layers)

    def call() -> Rollouts:
        return policy.generate(
            prompts,
            plan,
            jax.random.key(0),
            group_size=case.group,
            max_completion_tokens=case.new_tokens,
            stops=False,
        )

    return call


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: one whole rollout, its lengths read on the host.

    Args:
        spec: names the variant and the weights.
    """
    policy = VARIANTS[spec.variant](spec.directory)

    def make_call(case: Case) -> Callable[[], Any]:
        rollout = rollout_call(policy, case)

        def call() -> None:
            # The assertion waits for the result, without which the call would be timed before it is done.
            assert int(np.asarray(rollout().length_BG).sum()) == case.sampled_tokens

        return call

    return make_call


def compilations() -> Callable[[], dict[str, Any]]:
    """A function that tells the compilations since it was last asked."""
    counter = CompileCounter()

    def observe() -> dict[str, Any]:
        found = {"compilations": counter.count, "compile_seconds": counter.seconds}
        counter.count, counter.seconds = 0, 0.0
        return found

    return observe


if __name__ == "__main__":
    serve(prepare, compilations())
