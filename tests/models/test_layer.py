"""One layer's arithmetic beside what JAX makes of the plain expression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nested_reft.backends import FEW_ROWS
from nested_reft.models.layer import add_mlp, matmul, rms_norm
from nested_reft.models.layer_loop import Layers, _known_after
from nested_reft.models.lora import LoraConfig, add_lora
from tests.tiny_models import TINY, tiny_model


def test_the_gradient_of_a_product_is_that_of_autodiff(key):
    x, weight_OI, out = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(2, 3, 4, 5), (7, 5), (2, 3, 4, 7)])
    )
    written_out = jax.grad(lambda *inputs: jnp.sum(out * matmul(*inputs)), (0, 1))(x, weight_OI)
    expected = jax.grad(lambda x, weight_OI: jnp.sum(out * (x @ weight_OI.T)), (0, 1))(x, weight_OI)
    for gradient, reference in zip(written_out, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5)


def test_products_of_bfloat16_matrices_keep_their_gradients_in_bfloat16(key):
    x, weight_OI = jax.random.normal(key, (6, 5)), jax.random.normal(key, (7, 5)).astype(jnp.bfloat16)
    dx, dweight_OI = jax.grad(lambda *inputs: jnp.sum(matmul(*inputs)), (0, 1))(x, weight_OI)
    assert dx.dtype == jnp.float32 and dweight_OI.dtype == jnp.bfloat16
    np.testing.assert_allclose(dx, jnp.tile(weight_OI.astype(jnp.float32).sum(0), (6, 1)), rtol=0.01)


def with_gradient(function, x, out):
    """The value and the gradient of `sum(out * value)`."""

    @jax.jit
    def run(x, out):
        value, pull_back = jax.vjp(function, x)
        return value, pull_back(out)[0]

    return run(x, out)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_mlp_of_few_rows_and_of_many_is_its_formula(dtype, adapters, key):
    model = tiny_model()
    if adapters:
        add_lora(model, LoraConfig(rank=2), key)
        for name in ("gate", "up", "down"):
            out = getattr(model.layers, f"{name}_lora_out")
            out[...] = 0.3 * jax.random.normal(key, out.shape)
    stack = {name: value[...] for name, value in nnx.state(model.layers).items()}
    layer = Layers(TINY, stack, None, model.lora_scale, unrolled=1).at(jnp.array(2))
    layer = layer | {name: layer[name].astype(dtype) for name in ("gate", "up", "down")}

    def weight(name):
        adapter = layer["lora_scale"] * layer[f"{name}_lora_out"] @ layer[f"{name}_lora_in"] if adapters else 0.0
        return layer[name].astype(jnp.float32) + adapter

    def formula(x):
        normed = rms_norm(x, layer["mlp_norm"], TINY.norm_epsilon)
        return x + (jax.nn.silu(normed @ weight("gate").T) * (normed @ weight("up").T)) @ weight("down").T

    tolerance = 1e-5 if dtype == jnp.float32 else 0.02  # of the largest
    for batch in (FEW_ROWS // 4, FEW_ROWS):  # of four rows each
        x, out = jax.random.normal(key, (2, batch, 2, 2, TINY.width))
        value, gradient = with_gradient(lambda x: add_mlp(TINY, layer, x), x, out)
        expected, expected_gradient = with_gradient(formula, x, out)
        np.testing.assert_allclose(value, expected, atol=tolerance * float(jnp.abs(expected).max()))
        gradient_tolerance = tolerance * float(jnp.abs(expected_gradient).max())
        np.testing.assert_allclose(gradient, expected_gradient, atol=gradient_tolerance)


@pytest.mark.parametrize("platform, rows, is_first", [("cpu", 64, True), ("cpu", 65, False), ("gpu", 64, False)])
def test_only_a_cpus_mlp_of_few_rows_goes_features_first(monkeypatch, platform, rows, is_first):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    up_FD = jnp.zeros((TINY.hidden_width, TINY.width))
    layer = {"mlp_norm": jnp.ones(TINY.width), "gate": up_FD, "up": up_FD, "down": up_FD.T}
    traced = str(jax.make_jaxpr(lambda x: add_mlp(TINY, layer, x))(jnp.zeros((rows, TINY.width))))
    assert ("optimization_barrier" in traced) == is_first


@pytest.mark.parametrize("value", [1.0, jnp.inf, jnp.nan])
def test_an_index_that_waits_is_the_index(value):
    found = jax.jit(_known_after)(jnp.full((2, 2), value), jnp.array(3))
    assert found.dtype == jnp.int32 and found == 3


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only the CPU backend's index waits")
def test_an_index_waits():
    compiled = jax.jit(_known_after).lower(jnp.zeros((2, 2)), jnp.array(3)).compile()
    assert "compare(" in (compiled.as_text() or "")
