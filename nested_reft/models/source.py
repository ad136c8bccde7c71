"""The model that a run starts from, placed on its mesh, with adapters if it has any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from nested_reft.backends import cache_dtype
from nested_reft.bridging import BridgeConfig
from nested_reft.literals import check_choice
from nested_reft.models.bridges import Bridges
from nested_reft.models.config import ModelConfig
from nested_reft.models.lora import LoraConfig, add_lora
from nested_reft.models.parameters import initial_parameters, parameter_axes, splittable_parts
from nested_reft.models.placement import place_bridges, place_state
from nested_reft.models.registry import load_model
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import check_divisible, shard_parameters
from nested_reft.tokenizer import Tokenizer, check_tokenizer
from nested_reft.untrusted import shown

# Purposes of the seed, each with a key of its own; `training.keys` has the others.
_PARAMETERS, _ADAPTERS = 50, 51

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelSource:
    """The model to fine-tune.

    Attributes:
        name: a known model, a hub id, a GGUF file, a Hugging Face directory, or `scratch`.
        dtype: of the weights, and of the inputs of matrix products.
        shape: for `scratch`, the model's shape; its vocabulary is that of `alphabet`.
        alphabet: for `scratch`, the characters of its tokenizer.
    """

    name: str
    dtype: Dtype = "float32"
    shape: ModelConfig | None = None
    alphabet: str = ""

    def __post_init__(self):
        check_choice("model.dtype", self.dtype, Dtype)
        if self.name == "scratch" and self.shape is None:
            raise ValueError("model.name is 'scratch' and model.shape is None; a model from scratch needs a shape")
        if self.name != "scratch" and self.shape is not None:
            raise ValueError(
                f"model.name is {shown(self.name)}, and model.shape is that of a model from scratch; every other model"
                " brings its own shape, so give --model.shape None too"
            )


def starting_model(
    source: ModelSource, lora: LoraConfig, bridge: BridgeConfig, seed: int, mesh: Mesh
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer that a configuration starts from.

    Args:
        source: which model.
        lora: its adapters; rank 0 for none.
        bridge: its bridges, which are zero until they are fitted.
        seed: of the parameters of a model from scratch, and of the adapters.
        mesh: where the parameters are placed.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_model`; or the mesh does not split the model.
    """
    dtype, key = jnp.dtype(source.dtype), jax.random.key(seed)
    if source.shape is None:
        model, tokenizer = load_model(source.name, dtype, mesh)
    else:
        tokenizer = Tokenizer.characters(source.alphabet)
        check_tokenizer(source.shape, tokenizer)
        check_divisible(splittable_parts(source.shape), mesh)
        parameters = initial_parameters(source.shape, jax.random.fold_in(key, _PARAMETERS), dtype)
        model = Transformer(source.shape, shard_parameters(parameters, parameter_axes(source.shape), mesh))
    model.cache_dtype = cache_dtype(dtype)
    if lora.rank > model.config.width:
        # An adapter of more than full rank has more parameters than what it adapts.
        raise ValueError(f"lora.rank is {lora.rank}; allowed is 0 to the model's width, {model.config.width}")
    if lora.rank:
        add_lora(model, lora, jax.random.fold_in(key, _ADAPTERS))
        nnx.update(model, place_state(nnx.state(model, nnx.LoRAParam), mesh))
    if bridge.is_on:
        bridge.validate_for(model.config.width)
        model.bridges = Bridges(model.config.num_layers, model.config.width, bridge.rank, dtype)
        model.load_bridges(place_bridges(model.bridges.stack(), mesh))
    return model, tokenizer
