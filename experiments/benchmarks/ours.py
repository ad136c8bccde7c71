"""Our rollouts, as a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.worker import Case, Spec, serve
from nested_reft.compilation import CompileCounter
from nested_reft.layer_skip import LayerPlan, NestingConfig, draw_plan
from nested_reft.models.low_precision import low_precision
from nested_reft.models.registry import load_model
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.generate import generate
from nested_reft.rollout.sampling import SamplingConfig

VARIANTS: dict[str, Callable[[str], Transformer]] = {
    "float32": lambda directory: load_model(directory, jnp.float32)[0],
    "bfloat16": lambda directory: low_precision(load_model(directory, jnp.float32)[0], "bfloat16"),
    "int8": lambda directory: low_precision(load_model(directory, jnp.float32)[0], "int8"),
}
"""How the sampling model is made of a directory of weights."""


def plan_of(skip_ratio: float, num_layers: int) -> LayerPlan:
    """A plan that skips this share of the layers."""
    return draw_plan(jax.random.key(0), NestingConfig(skip_ratio=skip_ratio), num_layers)


def rollout_call(
    model: Transformer, case: Case, stop_ids: Sequence[int] = (-1,), sampler: Callable[..., Any] = generate
) -> Callable[[], Any]:
    """A rollout of the case, as `sampler` returns it; no token ends it unless some are named."""
    prompt_BP = jnp.asarray(case.prompt_ids(model.config.vocab_size), jnp.int32)
    length_B = jnp.full(case.prompts, case.prompt_tokens, jnp.int32)
    plan, stops = plan_of(case.skip_ratio, model.config.num_layers), jnp.asarray(stop_ids, jnp.int32)

    def call() -> Any:
        return sampler(
            model,
            prompt_BP,
            length_B,
            plan,
            stops,
            jax.random.key(0),
            group_size=case.group,
            max_completion_tokens=case.new_tokens,
            sampling=SamplingConfig(),
        )

    return call


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    model = VARIANTS[spec.variant](spec.directory)

    def make_call(case: Case) -> Callable[[], Any]:
        rollout = rollout_call(model, case)

        def call() -> None:
            assert int(np.asarray(rollout().length_BG).sum()) == case.sampled_tokens

        return call

    return make_call


def compilations() -> Callable[[], dict[str, Any]]:
    """Compilations since the last question."""
    counter = CompileCounter()

    def observe() -> dict[str, Any]:
        found = {"compilations": counter.count, "compile_seconds": counter.seconds}
        counter.count, counter.seconds = 0, 0.0
        return found

    return observe


if __name__ == "__main__":
    serve(prepare, compilations())
