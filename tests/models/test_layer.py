"""One layer's arithmetic beside what JAX makes of the plain expression."""

import jax
import jax.numpy as jnp
import numpy as np

from nested_reft.models.layer import _matmul


def test_the_gradient_of_a_product_is_that_of_autodiff(key):
    x, weight_IO, out = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(2, 3, 4, 5), (5, 7), (2, 3, 4, 7)])
    )
    written_out = jax.grad(lambda *inputs: jnp.sum(out * _matmul(*inputs)), (0, 1))(x, weight_IO)
    expected = jax.grad(lambda *inputs: jnp.sum(out * jnp.dot(*inputs)), (0, 1))(x, weight_IO)
    for gradient, reference in zip(written_out, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=1e-5)


def test_products_of_bfloat16_matrices_keep_their_gradients_in_bfloat16(key):
    x, weight_IO = jax.random.normal(key, (6, 5)), jax.random.normal(key, (5, 7)).astype(jnp.bfloat16)
    dx, dweight_IO = jax.grad(lambda *inputs: jnp.sum(_matmul(*inputs)), (0, 1))(x, weight_IO)
    assert dx.dtype == jnp.float32 and dweight_IO.dtype == jnp.bfloat16
    np.testing.assert_allclose(dx, jnp.tile(weight_IO.astype(jnp.float32).sum(1), (6, 1)), rtol=0.01)
