"""Prompts on their way through the layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nested_reft.models.attention import attend_texts
from nested_reft.models.config import ModelConfig
from nested_reft.models.layer import KeyValues, add_attention, project_qkv, rope
from nested_reft.models.parameters import Parameters
from nested_reft.models.visibility import Visible


class PromptPass:
    """One stream of tokens, or two where all prompts begin with the same ones.

    A system message and demonstrations are often most of a prompt. As a stream `[1, 1, Q, D]` of their own
    they run once per batch; what is left of each prompt, `[B, 1, P - Q, D]`, attends to their keys.
    """

    def __init__(self, config: ModelConfig, valid_BP: Bool[Array, "B P"], shared_prefix: int):
        self._config, self._batch, self._size = config, valid_BP.shape[0], shared_prefix
        # Positions are counted along whole prompts and split afterwards: each prompt's own tokens go on after the
        # shared ones.
        self._position_BP = _positions(valid_BP)
        rotation = rope(config, self._position_BP[:, None])
        self._rotations = self.split(rotation[0]), self.split(rotation[1])
        # Shared tokens are valid in every row, because prompts are padded on the right.
        seen = Visible(valid_BP[:, None, shared_prefix:], causal=True), Visible(causal=True)
        self._seen = seen if shared_prefix else seen[:1]

    def first_positions(self) -> tuple[Bool[Array, "..."], ...]:
        """For each stream, True at the first positions of prompts."""
        is_first_B1P = (self._position_BP == 0)[:, None]
        own, shared = is_first_B1P[:, :, self._size :], is_first_B1P[:1, :, : self._size]
        return (own, shared) if self._size else (own,)

    def split(self, x_B1PD: Float[Array, "B 1 P D"]) -> tuple[Array, ...]:
        """The stream of each prompt's own tokens and, if they share any, that of the shared ones.

        Args:
            x_B1PD: of whole prompts: embeddings, or cosines and sines.
        """
        # All rows hold the same shared tokens, so the first row stands for all.
        own, shared = x_B1PD[:, :, self._size :], x_B1PD[:1, :, : self._size]
        return (own, shared) if self._size else (own,)

    def join(self, streams: tuple[Array, ...]) -> Float[Array, "B P D"]:
        """The inverse of `split`.

        Args:
            streams: what `split` returned, or what the layers made of it.
        """
        own, *shared = (stream[:, 0] for stream in streams)
        return jnp.concatenate([self._repeat(shared[0]), own], axis=1) if shared else own

    def attention(self, layer: Parameters, streams: tuple[Array, ...]) -> tuple[tuple[Array, ...], KeyValues]:
        """One layer's attention: the streams after it, and the keys and values `[B, J, P, K]` of whole prompts.

        Args:
            layer: parameters of this layer, by name.
            streams: residual streams before the layer.
        """
        own, *shared = zip(streams, zip(*self._rotations, strict=True), self._seen, strict=True)
        if not shared:
            own, keys_values = self._stream(layer, *own)
            return (own,), keys_values
        # The shared stream goes first, because the prompts' own tokens attend to its keys.
        prefix, prefix_keys = self._stream(layer, *shared[0])
        prefix_keys = jax.tree.map(self._repeat, prefix_keys)
        own, keys_values = self._stream(layer, *own, prefix_keys)
        # Completions see a prompt as one segment, so its keys are put together in the order of its tokens.
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), prefix_keys, keys_values)
        return (own, prefix), whole

    def _stream(self, layer, x, rotation, seen, shared: KeyValues | None = None) -> tuple[Array, KeyValues]:
        query, keys_values = project_qkv(self._config, layer, x, rotation)
        # Every own token comes after the whole prefix and sees all of it.
        prefix = [] if shared is None else [(shared, Visible())]
        attended = attend_texts(query, (keys_values, seen), *prefix)
        return add_attention(layer, x, attended), jax.tree.map(lambda a: a[:, 0], keys_values)

    def _repeat(self, x: Array) -> Array:
        return jnp.broadcast_to(x, (self._batch, *x.shape[1:]))


def _positions(valid_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each valid token among the valid ones: padding on either side does not count."""
    # Padding before the first valid token would get -1. Nothing attends to it, so 0 does as well.
    return jnp.maximum(jnp.cumsum(valid_BT, axis=-1) - 1, 0)
