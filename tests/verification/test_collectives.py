"""What devices exchange, read from compiled programs: only what the design allows.

Two slices of 2 x 2 devices. Weights are stored in shares (fsdp), and devices share heads (tensor) and prompts (slice
and fsdp).
"""

import dataclasses
import math
import re

import jax
import pytest

from nested_reft.layer_plan import PlanShape
from nested_reft.models.parameters import parameter_shapes
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.config import load_config
from nested_reft.verification import pod_costs
from nested_reft.verification.program_costs import Collective, program_costs
from tests.tiny_models import TINY

SHAPE = dataclasses.replace(TINY, vocab_size=32)
MESH = MeshConfig(slices=2, fsdp=2, tensor=2)
CONFIG = load_config(
    "tiny", data={"prompts_per_batch": 8, "max_prompt_tokens": 12}, rollout={"max_completion_tokens": 8}
)
PROMPTS, GROUP = 8 // MESH.batch, 8  # of one device

pytestmark = pytest.mark.slow


def collectives_of(monkeypatch, compile_program) -> tuple[Collective, ...]:
    found = []
    monkeypatch.setattr(pod_costs, "program_costs", lambda *a, **k: found.append(program_costs(*a, **k)) or found[0])
    compile_program(make_mesh(MESH))
    return found[0].collectives


def arrays(each: Collective) -> list[tuple[int, ...]]:
    """Shapes of what a collective leaves on a device."""
    return [tuple(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\[([\d,]*)\]", each.result)]


def whole_matrices() -> set[tuple[int, ...]]:
    """Parameters as a device uses them: whole but for its share of heads, hidden units or the vocabulary."""
    axes = pod_costs.Shapes(make_mesh(MESH)).parameters(SHAPE, "float32", in_use=True)
    return {array.sharding.shard_shape(array.shape) for array in axes.values() if len(array.shape) > 1}


def test_a_rollout_gathers_weights_once_and_exchanges_sums_and_tokens(monkeypatch):
    found = collectives_of(
        monkeypatch, lambda mesh: pod_costs.rollout_cost(SHAPE, CONFIG, mesh, PlanShape(SHAPE.num_layers))
    )
    gathers = [each for each in found if each.kind == "all-gather" and "fsdp" in each.over]
    # Each matrix once, before the loops.
    assert {(each.over, each.loops, each.times) for each in gathers} == {(("fsdp",), 0, 1)}
    matrices = [name for name, shape in parameter_shapes(SHAPE).items() if name == "embedding" or len(shape) == 3]
    assert len(gathers) == len(matrices) and {shape for each in gathers for shape in arrays(each)} <= whole_matrices()
    rest = [each for each in found if each not in gathers]
    for each in rest:
        sizes = [math.prod(shape) for shape in arrays(each)]
        if each.over != ("tensor",):
            # Whether any row still runs.
            assert (each.kind, each.over, max(sizes)) == ("all-reduce", ("slice", "fsdp"), 1), each
        elif each.kind == "all-gather":
            # What was drawn, and with which log-probability.
            assert max(sizes) == PROMPTS * GROUP, each
        elif each.kind == "all-to-all":
            # Each device takes the logits of its rows from the others.
            assert sum(sizes) == PROMPTS * GROUP * SHAPE.vocab_size / MESH.tensor, each
        else:
            assert each.kind == "all-reduce" and {shape[-1] for shape in arrays(each)} == {SHAPE.width}, each
    sums = [each for each in rest if each.kind == "all-reduce" and each.loops == 2]
    assert sum(each.times for each in sums) == 2 * 7 * SHAPE.num_layers  # attention and MLP, in each decoding step


def test_an_update_gathers_a_layer_at_a_time_and_exchanges_gradients(monkeypatch):
    found = collectives_of(monkeypatch, lambda mesh: pod_costs.update_cost(SHAPE, CONFIG, mesh))
    layer = {shape[1:] if len(shape) == 3 else shape for shape in whole_matrices()}
    per_token = {PROMPTS * MESH.batch * GROUP * size for size in (1, 8)}
    for each in found:
        if each.kind == "all-gather" and each.over == ("fsdp",):
            shapes = [tuple(size for size in shape if size > 1) for shape in arrays(each)]
            assert set(shapes) <= layer, each  # never a whole stack
            assert each.loops or set(shapes) <= {(SHAPE.vocab_size // MESH.tensor, SHAPE.width)}, each
        elif each.kind == "all-gather":
            # Quantiles are of all rows and all tokens.
            assert each.over == ("slice", "fsdp") and {math.prod(shape) for shape in arrays(each)} <= per_token, each
        else:
            assert each.kind in ("all-reduce", "reduce-scatter"), each
            assert "tensor" not in each.over or each.over == ("tensor",), each
    between = [each for each in found if "slice" in each.over and each.kind == "all-reduce"]
    parameters = sum(math.prod(shape) for shape in parameter_shapes(SHAPE).values())
    # Gradients cross slices once.
    assert sum(each.times * each.bytes for each in between) < 1.2 * 4 * parameters


def test_there_are_eight_devices():
    assert len(jax.devices()) == 8
