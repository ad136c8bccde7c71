"""Fingerprints of weights: what they depend on, and what they do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nested_reft.models.fingerprint import fingerprint
from nested_reft.models.lora import LoraConfig, add_lora
from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import MeshConfig, make_mesh, shard_parameters
from tests.tiny_models import TINY, tiny_model


def test_equal_weights_have_one_fingerprint_wherever_they_lie():
    model = tiny_model()
    found = fingerprint(model)
    assert fingerprint(tiny_model()) == found != fingerprint(tiny_model(seed=1))
    parameters = model.parameters()
    rounded = {name: jnp.asarray(value, jnp.bfloat16) for name, value in parameters.items()}
    assert fingerprint(Transformer(TINY, rounded)) == found


def test_devices_that_share_the_weights_change_nothing():
    config = dataclasses.replace(TINY, vocab_size=32)  # which two devices can share
    model = tiny_model(config)
    divided = shard_parameters(model.parameters(), parameter_axes(config), make_mesh(MeshConfig(tensor=2)))
    assert fingerprint(Transformer(config, divided)) == fingerprint(model)


def test_one_weight_or_two_that_change_places_make_another():
    parameters = tiny_model().parameters()
    found = fingerprint(Transformer(TINY, parameters))
    up = np.array(parameters["layers/up"])
    for place in ((2, 1, 3), (4, 23, 15)):  # the second is the last
        changed = up.copy()
        changed[place] *= 1.01
        assert fingerprint(Transformer(TINY, parameters | {"layers/up": jnp.asarray(changed)})) != found
    swapped = up.copy()
    swapped[0, 0, 0], swapped[3, 2, 1] = up[3, 2, 1], up[0, 0, 0]
    assert fingerprint(Transformer(TINY, parameters | {"layers/up": jnp.asarray(swapped)})) != found


def test_adapters_count_once_they_have_learnt():
    model, found = tiny_model(), fingerprint(tiny_model())
    add_lora(model, LoraConfig(rank=2), jax.random.key(0))
    assert fingerprint(model) == found
    out = model.layers.up_lora_out  # pyright: ignore[reportAttributeAccessIssue]
    out[...] = out[...] + 0.1
    assert fingerprint(model) != found
