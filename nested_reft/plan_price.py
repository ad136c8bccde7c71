"""What a plan costs: the least seconds of one decode step, from what it reads and multiplies.

    seconds = sum over parts and head of max(bytes / bytes_per_second, operations / operations_per_second)

A layer has two parts, attention and MLP; a bridge is one of its own. Bytes are those of matrices, each read once, and
of keys and values; a product of N rows takes 2 N operations per weight. Norms, sampling and overheads are left out.

A pure rule on published rates and not a measurement: a resumed run finds the same prices as the run before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nested_reft.layer_plan import Part, PlanShape
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import MLP_PARAMETERS, parameter_shapes


@dataclass(frozen=True)
class Ceilings:
    """The most that one device does in a second.

    Attributes:
        bytes_per_second: read from main memory.
        flops_per_second: of dense products; in bfloat16 on accelerators, in float32 on a CPU.
        memory_bytes: of main memory, in units of 10^9 bytes to a GB; None where it is not listed here.
        ici_bytes_per_second: that one device sends to others of its slice, all ports together; None as above.
        dcn_bytes_per_second: a device's share of what it sends to other slices, through the network of the data
            centre; None as above.
    """

    bytes_per_second: float
    flops_per_second: float
    memory_bytes: float | None = None
    ici_bytes_per_second: float | None = None
    dcn_bytes_per_second: float | None = None

    def seconds(self, moved_bytes: int, flops: int) -> float:
        """The least time in which a part can move that many bytes and do that many operations.

        Args:
            moved_bytes: read from main memory.
            flops: floating-point operations.
        """
        return max(moved_bytes / self.bytes_per_second, flops / self.flops_per_second)


CEILINGS = {
    # Google Cloud's documentation (docs.cloud.google.com/tpu/docs), pages "TPU v5e", "TPU v5p" and "TPU v6e", per chip.
    # It gives connections within a slice (ICI) in both directions: 400, 1200 and 800 GB/s. The network between slices
    # is 6.4 Tbit/s for a v5e pod of 256 chips, 50 Gbit/s for a v5p chip, and 25.6 Tbit/s for a v6e pod of 256 chips.
    "TPU v5 lite": Ceilings(819e9, 197e12, 16e9, 200e9, 3.125e9),
    "TPU v5": Ceilings(2765e9, 459e12, 95e9, 600e9, 6.25e9),
    "TPU v6 lite": Ceilings(1638e9, 918e12, 32e9, 400e9, 12.5e9),
    # NVIDIA's data sheets of the H100 (SXM) and the H200, without sparsity.
    "H100": Ceilings(3.35e12, 989e12),
    "H200": Ceilings(4.8e12, 989e12),
    # One channel of DDR4-3200 (JEDEC JESD79-4), and two cores of 3 GHz with two units for 8 fused products each.
    "cpu": Ceilings(25.6e9, 192e9),
}
"""Published rates by a part of `jax.Device.device_kind`; the longest that fits counts."""


def ceilings_of(device_kind: str) -> Ceilings:
    """The published rates of a device; those of an H100 where the kind is none of `CEILINGS`.

    Args:
        device_kind: as `jax.Device.device_kind` has it.
    """
    # JAX has named the same generations in two ways.
    name = device_kind.replace("v5e", "v5 lite").replace("v6e", "v6 lite")
    fitting = [kind for kind in CEILINGS if kind in name]
    return CEILINGS[max(fitting, key=len, default="H100")]


@dataclass(frozen=True)
class Workload:
    """The shapes of a rollout and an update.

    Attributes:
        prompts, group_size, prompt_tokens, completion_tokens: B, G, P and C, of the whole mesh.
    """

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class DecodeStep:
    """One decode step: all that its price depends on beside the plan.

    Attributes:
        model: the model's shape.
        workload: rows, and the tokens that their caches hold; a group shares its prompt's.
        ceilings: of the device. Shares also hold for several that split rows and weights alike.
        weight_bytes, cache_bytes: of one weight, and of one number in the caches.
        bridge_rank: of the bridges' matrices; None is full rank.
    """

    model: ModelConfig
    workload: Workload
    ceilings: Ceilings
    weight_bytes: int = 4
    cache_bytes: int = 4
    bridge_rank: int | None = None

    def product_seconds(self, parameters: int, cached: int = 0, flops: int = 0) -> float:
        """Least seconds of all rows through matrices of so many weights.

        Args:
            parameters: weights.
            cached: numbers read from the caches besides.
            flops: operations besides.
        """
        rows = self.workload.prompts * self.workload.group_size
        moved_bytes = parameters * self.weight_bytes + cached * self.cache_bytes
        return self.ceilings.seconds(moved_bytes, 2 * parameters * rows + flops)


@dataclass(frozen=True)
class Price:
    """What a plan costs.

    Attributes:
        seconds: of one decode step, at least.
        share_of_full: of the full model's decode step.
    """

    seconds: float
    share_of_full: float


def half_parameters(config: ModelConfig) -> tuple[int, int]:
    """Weights of one layer's matrices: those of attention, and those of its MLP.

    Args:
        config: the model.
    """
    # Norms and biases have one axis beside that of the layers.
    matrices = {
        name.removeprefix("layers/"): math.prod(shape[1:])
        for name, shape in parameter_shapes(config).items()
        if name.startswith("layers/") and len(shape) == 3
    }
    mlp = sum(size for name, size in matrices.items() if name in MLP_PARAMETERS)
    return sum(matrices.values()) - mlp, mlp


def head_parameters(config: ModelConfig) -> int:
    """Weights of the output head.

    Args:
        config: the model.
    """
    return config.vocab_size * config.width


def bridge_parameters(config: ModelConfig, rank: int | None) -> int:
    """Weights of one bridge's matrices.

    Args:
        config: the model.
        rank: r; None is full rank.
    """
    return config.width**2 if rank is None else 2 * rank * config.width


def part_price(step: DecodeStep) -> dict[Part, float]:
    """Least seconds of each part of a layer in one decode step; a whole layer costs what its two halves do.

    Args:
        step: the model, its workload and the device.
    """
    config, work = step.model, step.workload
    attention, mlp = half_parameters(config)
    rows = work.prompts * work.group_size
    # A group reads its prompt's keys once; each row multiplies with those of its prompt and its own.
    tokens = work.prompts * work.prompt_tokens + rows * work.completion_tokens
    context = work.prompt_tokens + work.completion_tokens
    attention_seconds = step.product_seconds(
        attention,
        cached=2 * config.num_kv_heads * config.head_size * tokens,
        # Scores and weighted sums, of two operations each.
        flops=4 * config.num_heads * config.head_size * context * rows,
    )
    mlp_seconds = step.product_seconds(mlp)
    return {
        Part.SKIP: 0.0,
        Part.KEEP: attention_seconds + mlp_seconds,
        Part.BRIDGE: step.product_seconds(bridge_parameters(config, step.bridge_rank)),
        Part.NO_ATTENTION: mlp_seconds,
        Part.NO_MLP: attention_seconds,
    }


def plan_price(shape: PlanShape, step: DecodeStep) -> Price:
    """What a plan costs in one decode step, its head included.

    Args:
        shape: how many steps of each kind the plan has.
        step: the model, its workload and the device.
    """
    price, head = part_price(step), step.product_seconds(head_parameters(step.model))
    seconds = head + sum(price[part] * count for part, count in zip(shape.parts, shape.counts, strict=True))
    return Price(seconds, seconds / (head + price[Part.KEEP] * step.model.num_layers))
