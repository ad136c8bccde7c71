"""The least time that rollouts and updates can take on a machine of measured speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.benchmarks.worker import Case
from nested_reft.layer_plan import Part, PlanShape
from nested_reft.models.config import ModelConfig
from nested_reft.plan_price import bridge_parameters, half_parameters, head_parameters


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at one precision.

    Attributes:
        flops: of matrix products at the shapes concerned, per second.
        bandwidth: bytes per second read from memory.
        weight_bytes: of one weight.
    """

    flops: float
    bandwidth: float
    weight_bytes: float = 4.0

    def product_seconds(self, parameters: float, rows: int) -> float:
        """Least seconds of `rows` vectors through matrices of that many weights: compute, or reading them."""
        return max(2 * parameters * rows / self.flops, parameters * self.weight_bytes / self.bandwidth)


CeilingsAt = Callable[[int], Ceilings]
"""The ceilings of products of that many rows."""


def layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    return sum(half_parameters(config))


def rollout_floor(
    config: ModelConfig, case: Case, shape: PlanShape, ceilings: CeilingsAt, sampling_seconds: float = 0.0
) -> dict[str, float]:
    """Least seconds of a rollout call under plans of one shape, by stage.

    Each prompt runs once per group, without the output head; then C tokens of B * G rows are drawn,
    of which the first C - 1 run through the layers. Attention is left out.

    Args:
        config: the model's shape.
        case: the workload.
        shape: how many layers run, whole or in part, and how many bridges of full rank.
        ceilings: of the machine, by rows.
        sampling_seconds: of one draw for all rows: it does not shrink with the plan.
    """
    head, steps = head_parameters(config), case.new_tokens - 1
    attention, mlp = half_parameters(config)
    sizes = {
        Part.KEEP: attention + mlp,
        Part.BRIDGE: bridge_parameters(config, None),
        Part.NO_ATTENTION: mlp,
        Part.NO_MLP: attention,
    }
    layers = sum(sizes[part] * count for part, count in zip(shape.parts, shape.counts, strict=True))
    prompt_rows, decode = case.prompts * case.prompt_tokens, ceilings(case.rows)
    return {
        "prefill": ceilings(prompt_rows).product_seconds(layers, prompt_rows),
        "layers": steps * decode.product_seconds(layers, case.rows),
        "head": case.new_tokens * decode.product_seconds(head, case.rows),
        "sampling": case.new_tokens * sampling_seconds,
    }


def predicted_speedup(
    config: ModelConfig, case: Case, shape: PlanShape, ceilings: CeilingsAt, sampling_seconds: float = 0.0
) -> float:
    """What the floors say that a plan of this shape gains over the full model."""
    full, nested = (
        sum(rollout_floor(config, case, each, ceilings, sampling_seconds).values())
        for each in (PlanShape(config.num_layers), shape)
    )
    return full / nested


def update_tokens(case: Case, shared_prompt: bool) -> int:
    """Tokens that an update runs: all, or prompts once per group and completions without the last token, which leads
    nowhere.
    """
    if shared_prompt:
        return case.prompts * case.prompt_tokens + case.rows * (case.new_tokens - 1)
    return case.rows * (case.prompt_tokens + case.new_tokens)


def update_floor(config: ModelConfig, case: Case, ceilings: Ceilings, trains_all: bool = True) -> dict[str, float]:
    """Least seconds of an update, by stage.

    Layers run over each prompt once and over the first C - 1 tokens of its completions, the output head over all C.
    Backward is once the forward products for the inputs' gradients and once for the weights', which training
    adapters alone does not need. Attention is left out.
    """
    layer_rows = update_tokens(case, shared_prompt=True)
    layers = config.num_layers * ceilings.product_seconds(layer_parameters(config), layer_rows)
    head = ceilings.product_seconds(head_parameters(config), case.sampled_tokens)
    return {"layers": layers, "head": head, "backward": (2 if trains_all else 1) * (layers + head)}


def decode_rate(case: Case, seconds: float, first_token_seconds: float) -> float | None:
    """Tokens per second of the decode steps alone: a call less one that draws a single token.

    None where noise leaves nothing.
    """
    left = seconds - first_token_seconds
    return case.rows * (case.new_tokens - 1) / left if left > 0 else None


def ratio(value: float | None, other: float | None) -> float | None:
    """value / other, None where one of them is missing or zero."""
    return value / other if value and other else None
