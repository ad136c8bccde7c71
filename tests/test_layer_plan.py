"""Layer plans: parts and steps convert both ways, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.layer_plan import LayerPlan, Part, PlanShape, cache_slots, cached_steps

PARTS = [Part.KEEP, Part.SKIP, Part.BRIDGE, Part.NO_MLP, Part.NO_ATTENTION, Part.KEEP]


def test_parts_and_steps_convert_both_ways():
    plan = LayerPlan.of_parts(np.array(PARTS))
    assert plan.layer_S.tolist() == [0, 2, 3, 4, 5]  # a skipped layer has no step
    assert plan.part_S.tolist() == [Part.KEEP, Part.BRIDGE, Part.NO_MLP, Part.NO_ATTENTION, Part.KEEP]
    assert plan.shape == PlanShape(kept=2, bridged=1, without_attention=1, without_mlp=1)
    assert plan.to_parts(6).tolist() == plan.host_parts(6).tolist() == PARTS
    assert plan.left_out(6) == (1, 2, 3, 4)
    assert LayerPlan.full(5).layer_S.tolist() == [0, 1, 2, 3, 4]
    assert LayerPlan.skipping(5, [1, 4]).layer_S.tolist() == [0, 2, 3]
    assert LayerPlan.skipping(3, [1], Part.BRIDGE).to_parts(3).tolist() == [Part.KEEP, Part.BRIDGE, Part.KEEP]


def test_caches_are_counted_by_steps_with_attention():
    plan = LayerPlan.of_parts(np.array(PARTS))
    assert plan.shape.steps == 5 and plan.shape.cached == 3
    assert cached_steps(plan).tolist() == [0, 2, 4]
    assert cache_slots(plan)[cached_steps(plan)].tolist() == [0, 1, 2]


def test_plans_of_one_shape_are_one_program():
    compiled = []

    @jax.jit
    def last_layer(plan):
        compiled.append(plan.shape)
        return plan.layer_S[-1]

    assert last_layer(LayerPlan.skipping(4, [1], Part.BRIDGE)) == 3
    assert last_layer(LayerPlan.skipping(4, [3], Part.BRIDGE)) == 3
    assert last_layer(LayerPlan.skipping(4, [3])) == 2  # three steps, and no bridge
    assert len(compiled) == 2


@pytest.mark.parametrize(
    ("part_L", "message"),
    [
        ([Part.BRIDGE, Part.NO_ATTENTION, Part.SKIP], "leaves attention in none of 3 layers"),
        ([1, 7, 1], r"has parts \[7\]; allowed are 0, 1, 2, 3, 4"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(part_L, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.of_parts(np.array(part_L))


def test_a_plan_of_other_layers_is_refused():
    with pytest.raises(ValueError, match=r"the plan skips \[5\]; the model has layers 0 to 4"):
        LayerPlan.skipping(5, [5])
    with pytest.raises(ValueError, match="the plan skips all 2 layers"):
        LayerPlan.skipping(2, [0, 1])


def test_kept_layers_may_be_traced():
    kept = jax.jit(lambda kept_S: LayerPlan.keeping(kept_S).to_parts(4))(jnp.array([0, 3]))
    assert kept.tolist() == [1, 0, 0, 1]


def test_plans_with_optional_steps_are_one_shape():
    plans = [LayerPlan.skipping(5, skipped).with_optional(5, most=2) for skipped in ([], [3], [0, 4])]
    assert {plan.shape for plan in plans} == {PlanShape(kept=3, optional=2)}
    assert [plan.left_out(5) for plan in plans] == [(), (3,), (0, 4)]
    shape = plans[0].shape
    assert (shape.steps, shape.cached, shape.parts, shape.counts) == (5, 5, (Part.SKIP, Part.KEEP), (2, 5))
