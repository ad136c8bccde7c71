"""Prices of plans by hand, and that they are the floors of compiled steps."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from nested_reft.layer_plan import Part, PlanShape
from nested_reft.models.registry import QWEN2_5_SHAPE
from nested_reft.plan_price import CEILINGS, Ceilings, DecodeStep, Workload, ceilings_of, part_price, plan_price
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.verification.compiled_costs import decode_cost
from tests.tiny_models import TINY

WORK = Workload(prompts=2, group_size=3, prompt_tokens=8, completion_tokens=4)
# Weights of the tiny model: query and output 16 x 32, key and value 16 x 16; gate, up and down 16 x 24; head 31 x 16.
ATTENTION, MLP, HEAD = 2 * 16 * 32 + 2 * 16 * 16, 3 * 16 * 24, 31 * 16
# Keys and values of 2 heads of 8: of two prompts of 8 tokens, shared by their groups, and of 6 rows' own 4 tokens.
CACHED = 2 * (2 * 8) * (2 * 8 + 6 * 4)
READING, COMPUTING = Ceilings(1.0, math.inf), Ceilings(math.inf, 1.0)


@pytest.mark.parametrize(("rank", "bridge"), [(None, 16 * 16), (3, 2 * 3 * 16)])
def test_few_rows_cost_what_they_read(rank, bridge):
    """At one byte a second; weights take 2 bytes, numbers in the caches 4."""
    found = part_price(DecodeStep(TINY, WORK, READING, weight_bytes=2, cache_bytes=4, bridge_rank=rank))
    assert found == {
        Part.SKIP: 0,
        Part.KEEP: 2 * (ATTENTION + MLP) + 4 * CACHED,
        Part.BRIDGE: 2 * bridge,
        Part.NO_ATTENTION: 2 * MLP,
        Part.NO_MLP: 2 * ATTENTION + 4 * CACHED,
    }


def test_many_rows_cost_what_they_multiply():
    """At one operation a second. Each of 6 rows scores and sums 8 + 4 tokens in 4 heads of 8, its prompt's too."""
    found = part_price(DecodeStep(TINY, WORK, COMPUTING))
    attention = 6 * (2 * ATTENTION + 2 * 2 * (4 * 8) * 12)
    assert found[Part.NO_MLP] == attention and found[Part.NO_ATTENTION] == 6 * 2 * MLP
    assert found[Part.KEEP] == attention + 6 * 2 * MLP
    assert found[Part.BRIDGE] == 6 * 2 * 16 * 16


def test_each_part_is_bound_by_its_own_ceiling():
    """4 bytes a weight at 4 a second take a second, 12 operations of 6 rows at 6 a second two. Keys and values are read
    and not multiplied with much, so attention of long caches is bound by reading."""
    step = DecodeStep(TINY, dataclasses.replace(WORK, completion_tokens=1000), Ceilings(4.0, 6.0))
    found = part_price(step)
    assert found[Part.NO_ATTENTION] == 2 * MLP
    # Both prompts' 8 tokens are read once for their groups, the 1000 of every row for itself.
    assert found[Part.NO_MLP] == ATTENTION + 2 * 16 * (2 * 8 + 6 * 1000)
    assert found[Part.NO_MLP] > 6 * (2 * ATTENTION + 4 * 32 * 1008) / 6


def test_a_plan_costs_its_steps_and_the_head():
    step = DecodeStep(TINY, WORK, READING)
    layer = 4 * (ATTENTION + MLP + CACHED)
    found = plan_price(PlanShape(2, bridged=1, without_attention=1), step)
    assert found.seconds == 4 * HEAD + 2 * layer + 4 * 256 + 4 * MLP
    assert found.share_of_full == pytest.approx(found.seconds / (4 * HEAD + 5 * layer))
    assert plan_price(PlanShape(5), step).share_of_full == 1
    # The head does not shrink, so two of five layers cost more than two fifths.
    assert plan_price(PlanShape(2), step).share_of_full > 0.4


@pytest.mark.parametrize("shape", [PlanShape(5), PlanShape(3, bridged=2)])
def test_reading_is_the_floor_of_a_compiled_step(shape):
    """But for norms and the biases of bridges: with 16 entries beside matrices of 1,536, up to 2 %."""
    floor = decode_cost(TINY, WORK, make_mesh(MeshConfig()), shape, jnp.float32).floor_bytes
    assert plan_price(shape, DecodeStep(TINY, WORK, READING)).seconds == pytest.approx(floor, rel=0.02)


def test_a_bridge_of_a_large_model_costs_a_twentieth_of_a_layer():
    """Weights alone: 1536^2 of 46.8 million is 5.0 %; keys and values make the layer dearer."""
    work = Workload(prompts=8, group_size=8, prompt_tokens=192, completion_tokens=64)
    found = part_price(DecodeStep(QWEN2_5_SHAPE, work, CEILINGS["TPU v5 lite"], weight_bytes=2, cache_bytes=2))
    assert 0.045 < found[Part.BRIDGE] / found[Part.KEEP] < 0.0504


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cpu", "cpu"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5e", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("TPU v5p", "TPU v5"),
        ("TPU v6e", "TPU v6 lite"),
        ("an unknown accelerator", "H100"),
    ],
)
def test_rates_are_found_by_the_name_of_the_device(kind, name):
    assert ceilings_of(kind) is CEILINGS[name]
