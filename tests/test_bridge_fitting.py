"""Bridges by least squares: exact where a layer is affine, the best of their rank, in sequence better than alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.bridge_fitting import NormalEquations, add_bridges, distil_bridges, fit_bridges, solve
from nested_reft.divergence import measure_plan_divergence
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.bridges import Bridges
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import MeshConfig, make_mesh, shard_batch
from nested_reft.types import valid_mask
from tests.tiny_models import TINY, tiny_model


def model_with_bridges(model: Transformer | None = None, rank: int | None = None) -> Transformer:
    model = tiny_model(scale=1.0) if model is None else model
    model.bridges = Bridges(TINY.num_layers, TINY.width, rank)
    return model


def texts(seed: int = 0, prompts: int = 32):
    """Random prompts with four completions each."""
    key = jax.random.key(seed)
    draw = lambda shape, salt: jax.random.randint(jax.random.fold_in(key, salt), shape, 0, TINY.vocab_size)  # noqa: E731
    length_BG = 1 + draw((prompts, 4), 2) % 8
    return draw((prompts, 6), 0), 2 + draw((prompts,), 3) % 5, draw((prompts, 4, 8), 1), length_BG


def divergence(model: Transformer, stack, plan: LayerPlan) -> float:
    model.bridges.load(stack)
    return float(measure_plan_divergence(model, texts(1), 1.0, [plan], "test")[0])


def equations_of(z_NZ: np.ndarray, d_ND: np.ndarray) -> NormalEquations:
    nothing = jnp.zeros(d_ND.shape[1])
    return NormalEquations(jnp.asarray(z_NZ.T @ z_NZ), jnp.asarray(d_ND.T @ z_NZ), nothing, jnp.ones((), int))


def test_a_layer_that_is_affine_in_the_normed_stream_is_met():
    """With one token repeated, attention averages equal values: a layer without MLP is then W_o W_v of the norm."""
    model = tiny_model(scale=1.0)
    parameters = model.parameters()
    parameters["layers/down"] = parameters["layers/down"].at[4].set(0.0)
    # Norms have an epsilon of their own, so streams must be large beside it.
    model = model_with_bridges(Transformer(TINY, parameters | {"embedding": 20 * parameters["embedding"]}))
    token_B = jnp.arange(31)
    prompt_BP, tokens_BGC = jnp.tile(token_B[:, None], (1, 5)), jnp.tile(token_B[:, None, None], (1, 1, 4))
    batch = (prompt_BP, jnp.full(31, 5), tokens_BGC, jnp.full((31, 1), 4))
    # It is the last layer, so that no other one attends to first positions, which no constant meets here.
    plan = LayerPlan.skipping(5, [4], Part.BRIDGE)
    model.bridges.load(fit_bridges(model, [batch], 1e-9, plan))
    run = jax.jit(lambda plan: model.completion_hidden(prompt_BP, jnp.ones((31, 5), bool), tokens_BGC, plan))
    full, bridged, skipped = (run(p) for p in (LayerPlan.full(5), plan, LayerPlan.skipping(5, [4])))
    np.testing.assert_allclose(bridged, full, atol=1e-5 * float(jnp.abs(full).max()))
    assert jnp.abs(skipped - full).max() > 1e-2


def test_the_ridge_draws_to_the_bridge_so_far():
    random = np.random.default_rng(0)
    z_NZ, w_DZ = random.normal(size=(50, 4)), random.normal(size=(3, 4))
    equations, start_DZ = equations_of(z_NZ, z_NZ @ w_DZ.T), random.normal(size=(3, 4))
    near, _ = solve(equations, 1e-9, start_DZ)
    np.testing.assert_allclose(near, w_DZ, atol=1e-5)
    far, _ = solve(equations, 1e9, start_DZ)
    np.testing.assert_allclose(far[:, :-1], start_DZ[:, :-1], atol=1e-5)
    assert np.abs(far[:, -1] - start_DZ[:, -1]).max() > 0.1  # the bias is not penalised
    # In between, as the derivative of the penalised sum says.
    found, _ = solve(equations, 0.5, start_DZ)
    strength = 0.5 * np.trace((z_NZ.T @ z_NZ)[:3, :3]) / 3 * np.array([1, 1, 1, 0])
    slope = (found @ z_NZ.T - w_DZ @ z_NZ.T) @ z_NZ + strength * (found - start_DZ)
    np.testing.assert_allclose(slope, 0, atol=1e-3)


def test_a_low_rank_is_the_best_of_its_rank():
    """Reduced-rank regression, against the singular values of the full solution's predictions."""
    random = np.random.default_rng(1)
    x_ND = random.normal(size=(400, 5)) @ random.normal(size=(5, 5)) + 1.0
    z_NZ, target_ND = np.concatenate([x_ND, np.ones((400, 1))], axis=1), random.normal(size=(400, 5)) + x_ND[:, ::-1]
    w_DZ, u_Dr = solve(equations_of(z_NZ, target_ND), 1e-12, np.zeros((5, 6)), rank=2)
    found_ND = x_ND @ (u_Dr @ u_Dr.T @ w_DZ[:, :-1]).T + w_DZ[:, -1]
    full_ND = z_NZ @ np.linalg.lstsq(z_NZ, target_ND, rcond=None)[0]
    centred_ND = full_ND - full_ND.mean(axis=0)
    u, s, v = np.linalg.svd(centred_ND, full_matrices=False)
    best_ND = (u[:, :2] * s[:2]) @ v[:2] + full_ND.mean(axis=0)
    np.testing.assert_allclose(found_ND, best_ND, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 12])
def test_bridges_come_much_closer_than_skips(rank):
    model = model_with_bridges(rank=rank)
    stack = fit_bridges(model, [texts()], 1e-3)
    skipped, bridged = (divergence(model, stack, LayerPlan.skipping(5, [1, 3], p)) for p in (Part.SKIP, Part.BRIDGE))
    assert bridged < 0.7 * skipped


def test_in_sequence_makes_up_for_earlier_bridges():
    """It minimises the distance to the full model's stream from the stream that the plan really has."""
    model, plan = model_with_bridges(), LayerPlan.skipping(5, [1, 2, 3], Part.BRIDGE)
    alone = fit_bridges(model, [texts()], 1e-4)
    in_sequence = fit_bridges(model, [texts()], 1e-4, plan)
    (prompt_BP, prompt_length_B, tokens_BGC, length_BG) = texts()
    start, valid_BP = model.text_streams(prompt_BP, tokens_BGC), valid_mask(prompt_length_B, 6)
    mask_BGC = valid_mask(length_BG, 8)[..., :-1, None]

    def distance(stack) -> float:
        """Of the completions' streams after layer 3."""
        model.bridges.load(stack)
        parts = [Part.KEEP, Part.BRIDGE, Part.BRIDGE, Part.BRIDGE, Part.SKIP]
        full = model.run_texts(start, valid_BP, LayerPlan.keeping(jnp.arange(4)))[-1]
        nested = model.run_texts(start, valid_BP, LayerPlan.of_parts(np.array(parts)))[-1]
        return float(jnp.where(mask_BGC, (full - nested) ** 2, 0.0).sum())

    assert distance(in_sequence) < 0.98 * distance(alone)
    # The first bridge of a plan reads the full model's stream, as it does alone.
    np.testing.assert_allclose(in_sequence["map"][1], alone["map"][1], atol=1e-4)
    assert not np.any(in_sequence["map"][4])  # not of the plan


def test_distillation_lowers_the_divergence_on_other_texts():
    model, plan = model_with_bridges(), LayerPlan.skipping(5, [1, 2, 3], Part.BRIDGE)
    model.bridges.load(fit_bridges(model, [texts()], 1e-3, plan))
    before, weights = divergence(model, model.stacked_bridges(), plan), model.parameters()
    distilled = distil_bridges(model, [texts(2), texts(3)], 1.0, [plan] * 40, 3e-3)
    assert divergence(model, distilled, plan) < 0.9 * before
    assert np.array_equal(distilled["map"][4], model.stacked_bridges()["map"][4])  # not of the plan
    assert all(np.array_equal(weights[name], value) for name, value in model.parameters().items())


def test_a_bridge_spans_the_left_out_layers_after_it():
    model = model_with_bridges()
    plan = LayerPlan.of_parts(np.array([Part.KEEP, Part.BRIDGE, Part.SKIP, Part.SKIP, Part.KEEP]))
    stack = fit_bridges(model, [texts()], 1e-3, plan)
    alone = fit_bridges(model, [texts()], 1e-3)
    assert divergence(model, stack, plan) < divergence(model, alone, plan)
    assert divergence(model, stack, plan) < divergence(model, stack, LayerPlan.skipping(5, [1, 2, 3]))


def test_the_constant_of_first_positions_is_the_mean_of_what_layers_add_there():
    model, (prompt_BP, prompt_length_B, tokens_BGC, length_BG) = model_with_bridges(), texts()
    prompt_BP = prompt_BP.at[:, 0].set(5)  # all begin alike, so the mean is exact
    batch, plan = (prompt_BP, prompt_length_B, tokens_BGC, length_BG), LayerPlan.skipping(5, [1, 2], Part.BRIDGE)
    model.bridges.load(fit_bridges(model, [batch], 1e-2, plan))
    valid_BP, start = valid_mask(prompt_length_B, 6), model.text_streams(prompt_BP, tokens_BGC)
    full, bridged = (model.run_texts(start, valid_BP, p)[0] for p in (LayerPlan.full(5), plan))
    np.testing.assert_allclose(bridged[:, :, 0], full[:, :, 0], atol=1e-5)
    assert jnp.abs(bridged[:, :, 1] - full[:, :, 1]).max() > 1e-2


def test_batches_add_up():
    model, batch = model_with_bridges(), texts()
    halves = [tuple(array[part] for array in batch) for part in (slice(16), slice(16, None))]
    whole, split = fit_bridges(model, [batch], 1e-2), fit_bridges(model, halves, 1e-2)
    np.testing.assert_allclose(split["map"], whole["map"], atol=1e-3)


def test_a_mesh_changes_nothing():
    model, batch = model_with_bridges(), texts()
    spread = shard_batch(batch, make_mesh(MeshConfig(data=4)))
    one, many = fit_bridges(model, [batch], 1e-2), fit_bridges(model, [spread], 1e-2)
    np.testing.assert_allclose(many["map"], one["map"], atol=1e-3)


def test_padding_and_first_positions_do_not_count():
    model, batch = model_with_bridges(), texts()
    prompt_BP, prompt_length_B, tokens_BGC, length_BG = batch
    # Other tokens where there are none.
    changed = jnp.where(jnp.arange(8) < length_BG[..., None], tokens_BGC, 30 - tokens_BGC)
    padded = jnp.where(jnp.arange(6) < prompt_length_B[:, None], prompt_BP, 30 - prompt_BP)
    expected = fit_bridges(model, [batch], 1e-2)
    found = fit_bridges(model, [(padded, prompt_length_B, changed, length_BG)], 1e-2)
    np.testing.assert_allclose(found["map"], expected["map"], atol=1e-4)


def test_a_shared_prefix_changes_nothing_but_the_time():
    model, (prompt_BP, _, tokens_BGC, length_BG) = model_with_bridges(), texts()
    prompt_length_B = 4 + jnp.arange(32) % 3
    batch = (prompt_BP.at[:, :3].set(jnp.array([5, 9, 2])), prompt_length_B, tokens_BGC, length_BG)
    for plan in (None, LayerPlan.of_parts(np.array([Part.KEEP, Part.BRIDGE, Part.SKIP, Part.KEEP, Part.BRIDGE]))):
        whole, shared = (fit_bridges(model, [batch], 1e-2, plan, shared_prefix=size) for size in (0, 3))
        for name, value in whole.items():
            np.testing.assert_allclose(shared[name], value, atol=1e-3, err_msg=name)
    # Weighing the shared tokens once instead of 32 times would show.
    lone = fit_bridges(model, [tuple(array[:1] for array in batch)], 1e-2)
    assert np.abs(lone["map"] - whole["map"]).max() > 1e-2


def test_new_bridges_come_into_the_model_whatever_it_had_before():
    model, plain = model_with_bridges(), model_with_bridges()
    plan = LayerPlan.skipping(TINY.num_layers, [2], Part.BRIDGE)
    model.bridges.load({name: value + 1.0 for name, value in model.stacked_bridges().items()})
    add_bridges(model, [texts()], 0.1, plan)
    expected = fit_bridges(plain, [texts()], 0.1, plan)
    assert all(np.array_equal(model.stacked_bridges()[name], value) for name, value in expected.items())
    add_bridges(model, [texts()], 0.1, rank=3)
    assert model.bridges.rank == 3
