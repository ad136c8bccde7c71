"""One decoder-only transformer with stacked layers, run under a layer plan.

All layers' parameters are stacked along a leading axis `L`. The layer loop takes the steps of the
plan and reads each one's layer out of the stack where it stands: a shorter plan does fewer matrix
products and keeps fewer caches, and needs no second copy of the weights.

A prompt is shared by the `G` completions sampled from it. So every forward pass has up to two
streams: the prompt `[B, P]`, run once, and the completions `[B, G, C]`, whose queries attend to
the prompt's keys and to their own earlier ones. Sampling, scoring and training all use it.

Matrix products take the dtype of the matrices, or `compute_dtype`, and accumulate in float32; the residual stream,
norms and softmax are float32. Caches hold keys and values in `cache_dtype`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.attention import attend, attend_texts
from nested_reft.models.bridges import Bridges
from nested_reft.models.config import ModelConfig
from nested_reft.models.heads import ScalarHead
from nested_reft.models.layer import (
    KeyValues,
    add_attention,
    as_operand,
    matmul,
    project_qkv,
    rms_norm,
    rope,
    stored_as,
)
from nested_reft.models.layer_loop import Attention, LayerLoop, Layers, Remat, entry
from nested_reft.models.packing import places
from nested_reft.models.parameters import Parameters, axes_of, parameter_axes, parameter_shapes
from nested_reft.models.prompt_pass import PromptPass
from nested_reft.models.visibility import Visible
from nested_reft.sharding import constrain, constrain_used, used_axes


class LayerStack(nnx.Module):
    """The parameters of all layers, each with a leading axis `L`."""

    def __init__(self, parameters: Parameters):
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))


@struct.dataclass
class PromptCache:
    """A prompt after its forward pass under one plan.

    Attributes:
        layers: keys and values `[A, B, J, P, K]`, of the A steps with attention.
        valid_BP: True at prompt tokens.
        last_hidden_BD: final hidden state at each prompt's last token: it predicts the first
            completion token.
    """

    layers: KeyValues
    valid_BP: Bool[Array, "B P"]
    last_hidden_BD: Float[Array, "B D"]

    @property
    def length_B(self) -> Int[Array, " B"]:
        """Valid tokens of each prompt: the position of its first completion token."""
        return self.valid_BP.sum(axis=-1)


class Transformer(nnx.Module):
    """A decoder-only language model; see `ModelConfig` for the families it covers."""

    def __init__(self, config: ModelConfig, parameters: Parameters):
        """Wraps `parameters`, named and shaped as `parameter_shapes(config)` says.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape.
        """
        expected = parameter_shapes(config)
        missing, unknown = sorted(expected.keys() - parameters.keys()), sorted(parameters.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(f"model parameters do not fit the configuration: missing {missing}, unknown {unknown}")
        for name, shape in expected.items():
            found = tuple(parameters[name].shape)
            if found != shape:
                raise ValueError(f"model parameter '{name}' has shape {found}; the configuration says {shape}")
        self.config = config
        self.cache_dtype: Any = jnp.float32  # of keys and values between decoding steps; see `stored_as`
        self.compute_dtype: Any = None  # of the inputs of matrix products; None takes that of the matrices
        self.layers_unrolled = 1  # layers per iteration of the compiled layer loop
        self.lora_scale = 1.0  # alpha / rank, once `add_lora` has given the layers adapters
        self.embedding = nnx.Param(parameters["embedding"])
        self.final_norm = nnx.Param(parameters["final_norm"])
        self.head = None if config.tied_embeddings else nnx.Param(parameters["head"])
        self.embedding_scale: nnx.Param | None = nnx.data(None)  # of int8 copies; see `models.low_precision`
        self.head_scale: nnx.Param | None = nnx.data(None)
        self.bridges: Bridges | None = nnx.data(None)
        self.value_head: ScalarHead | None = nnx.data(None)  # of a critic on this trunk
        self.layers = LayerStack(
            {name.removeprefix("layers/"): value for name, value in parameters.items() if name.startswith("layers/")}
        )

    def parameters(self) -> Parameters:
        """The model's own parameters by name, adapters left out: the inverse of the constructor."""
        names = parameter_axes(self.config)
        # Names with a slash belong to the stack of layers.
        own = {name: getattr(self, name)[...] for name in names if "/" not in name}
        stack = {name: getattr(self.layers, name.removeprefix("layers/"))[...] for name in names if "/" in name}
        return own | stack

    def stacked_bridges(self) -> Parameters:
        """The bridges of all layers by name, as `Bridges.stack` has them.

        Raises:
            ValueError: the model has none.
        """
        if self.bridges is None:
            raise ValueError("the plan bridges layers, and the model has no bridges; set nesting.bridge.kind")
        return self.bridges.stack()

    def load_bridges(self, stack: Parameters) -> None:
        """Takes over bridges that `stacked_bridges` returned, with other values.

        Args:
            stack: arrays by name.
        """
        assert self.bridges is not None, "a model gets its bridges before their values"
        self.bridges.load(stack)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        valid_BT: Bool[Array, "B T"] | None = None,
        plan: LayerPlan | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits at every position of plain sequences: the reference that the others must equal.

        Args:
            tokens_BT: token ids, padded on either side.
            valid_BT: False at padding; None means that every token is valid.
            plan: layers to run; None is the full model.
        """
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        hidden_BTD, _ = self._run_prompt(tokens_BT, valid_BT, plan)
        return self.logits(hidden_BTD)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 logits of final hidden states.

        Args:
            hidden: what `decode`, `extend` or `completion_hidden` returned, after the final norm.

        Returns:
            Logits at temperature 1.
        """
        head, scale = (self.embedding, self.embedding_scale) if self.head is None else (self.head, self.head_scale)
        table = constrain_used(head[...], axes_of("head"))
        logits: Array = matmul(hidden, as_operand(table), self.compute_dtype)
        return logits if scale is None else logits * scale[...]

    def values(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """The critic's value of each state.

        Args:
            hidden: as in `logits`.

        Raises:
            ValueError: the model has no value head.
        """
        if self.value_head is None:
            raise ValueError("the model has no value head; set loss.advantage 'gae' and loss.critic")
        return self.value_head(hidden)

    def prefill(
        self,
        prompt_BP: Int[Array, "B P"],
        valid_BP: Bool[Array, "B P"],
        plan: LayerPlan | None = None,
        shared_prefix: int = 0,
    ) -> PromptCache:
        """Runs prompts once and keeps what their completions need; see `PromptCache`.

        Args:
            prompt_BP: token ids; padded on the right where a prefix is shared, else on either side.
            valid_BP: True at prompt tokens.
            plan: layers to run; None is the full model.
            shared_prefix: leading tokens that all prompts have in common; they run once for all of them.

        Returns:
            Keys and values in `cache_dtype`, and the hidden state that predicts the first completion token.
        """
        hidden_BPD, layers = self._run_prompt(prompt_BP, valid_BP, plan, self.cache_dtype, shared_prefix)
        return PromptCache(layers, valid_BP, _last_valid(hidden_BPD, valid_BP))

    def empty_cache(self, batch: int, group: int, size: int, plan: LayerPlan | None) -> KeyValues:
        """Zeroed completion caches `[A, B, G, J, size, K]` for `decode`, one for each of the A steps with attention.

        Args:
            batch: B prompts.
            group: G completions per prompt.
            size: completion tokens that the caches have room for.
            plan: layers that get a cache; None is all of them.
        """
        num_cached = self.config.num_layers if plan is None else plan.shape.cached
        shape = (num_cached, batch, group, self.config.num_kv_heads, size, self.config.head_size)
        zeros = constrain(jnp.zeros(shape, self.cache_dtype), "", "batch", "", "kv_heads")
        return KeyValues(zeros, zeros)

    def decode(
        self,
        token_BG: Int[Array, "B G"],
        step: Int[Array, ""],
        cache: KeyValues,
        prompt: PromptCache,
        plan: LayerPlan,
        start_BG: Int[Array, "B G"] | None = None,
    ) -> tuple[Float[Array, "B G D"], KeyValues]:
        """Feeds one completion token of every row and returns what predicts the next.

        Args:
            token_BG: the tokens, which go into slot `step` of the caches.
            step: 0 for the first slot; the same for all rows.
            cache: caches of `empty_cache`, filled up to `step`.
            prompt: the prompts' caches under the same plan.
            plan: layers to run.
            start_BG: the slot of each row's first completion token; None means slot 0 for all. Rows
                whose forced prefixes differ in length start at different slots, so that all of them
                end at the same one and one `step` serves the batch. So do rows that begin later than others.

        Returns:
            Final hidden states and the caches with this token added.
        """
        config = self.config
        position = step if start_BG is None else (step - start_BG)[..., None]
        rotation = rope(config, prompt.length_B[:, None, None] + position)
        slot_T = jnp.arange(cache.key.shape[-2])
        # Caches have room for more tokens than they hold: slots from `step` on are not written yet.
        earlier_mask = slot_T < step
        if start_BG is not None:
            earlier_mask = (earlier_mask & (slot_T >= start_BG[..., None]))[..., None, :]
        # The new token always sees itself: a single True broadcasts to its segment.
        here = jnp.ones((), bool)
        shared_mask = prompt.valid_BP[:, None, None]

        def attention(streams, cache, layer, slot):
            (x,) = streams
            query, new = project_qkv(config, layer, x, rotation)
            shared, earlier = entry((prompt.layers, cache), slot)
            # The token reads its own key and value as rounded as later tokens will read them from the cache.
            new = jax.tree.map(lambda row, whole: stored_as(row, whole.dtype), new, earlier)
            attended = attend(query, (earlier, earlier_mask), (new, here), (shared, shared_mask))
            return (add_attention(layer, x, attended),), cache, new

        loop = self._loop(attention, mlp_waits=True)
        (x,), cache, new = loop.run((self._embed(token_BG[..., None]),), cache, plan)
        # The steps only read the caches and one write adds all steps' rows: a TPU's compiler would move caches
        # that every layer writes to on-chip memory, and back out whole.
        # The scan stacked the new rows along A; the token axis of the caches is the fifth.
        cache = jax.tree.map(
            lambda whole, rows: jax.lax.dynamic_update_slice(whole, rows, (0, 0, 0, 0, step, 0)), cache, new
        )
        cache = jax.tree.map(lambda whole: constrain(whole, "", "batch", "", "kv_heads"), cache)
        return self._final_norm(x[:, :, 0]), cache

    def prefill_completions(
        self,
        tokens_BGF: Int[Array, "B G F"],
        start_BG: Int[Array, "B G"],
        prompt: PromptCache,
        plan: LayerPlan,
    ) -> tuple[Float[Array, "B G D"], KeyValues]:
        """Runs the first tokens of completions, which are given, in one pass.

        Args:
            tokens_BGF: left-padded: row `b, g` holds its tokens from slot `start_BG` to F - 1.
            start_BG: the slot of each row's first token, 0 to F; F means that it has none.
            prompt: the prompts' caches under the same plan.
            plan: layers to run.

        Returns:
            The final hidden states that predict the token at slot F, that is, the prompt's own where a
            row has no tokens; and caches `[S, B, G, J, F, K]`, to be enlarged for `decode`.
        """
        config, size = self.config, tokens_BGF.shape[-1]
        slot_F = jnp.arange(size)
        # Positions are counted from each row's first token. Those of padding come out before it and are never read.
        rotation = rope(config, prompt.length_B[:, None, None] + slot_F - start_BG[..., None])
        # A query sees the slots up to its own, without the padding before `start`. A padded query sees no slot at
        # all, but it always sees the prompt, so its softmax has something to divide by.
        own_seen = Visible(first=start_BG[..., None], causal=True)
        shared_seen = Visible(prompt.valid_BP[:, None])

        def attention(streams, _, layer, slot):
            (x,) = streams
            query, own = project_qkv(config, layer, x, rotation)
            shared = entry(prompt.layers, slot)
            attended = attend_texts(query, (own, own_seen), (shared, shared_seen))
            # Attention above reads the unrounded keys, as a prompt's own pass does; only later tokens read the caches.
            kept = jax.tree.map(lambda a: stored_as(a, self.cache_dtype), own)
            return (add_attention(layer, x, attended),), None, kept

        (x,), _, cache = self._loop(attention).run((self._embed(tokens_BGF),), None, plan)
        # Rows end at the same slot, so the last column predicts the next token of every row that has any.
        has_own_BG1 = (start_BG < size)[..., None]
        return jnp.where(has_own_BG1, self._final_norm(x[:, :, -1]), prompt.last_hidden_BD[:, None]), cache

    def extend(
        self,
        tokens_BGT: Int[Array, "B G T"],
        offset_BG: Int[Array, "B G"],
        cache: KeyValues,
        prompt: PromptCache,
        plan: LayerPlan | None = None,
    ) -> tuple[Float[Array, "B G T D"], KeyValues]:
        """Feeds `T` completion tokens of every row at once, each row from a position of its own.

        Unlike `decode`, caches are those of all `L` layers, and a plan reads and writes the slots of
        the layers it keeps. So a nested policy can continue from the full model's caches, and
        what it writes beyond them is replaced when the full model runs over the same tokens.

        Args:
            tokens_BGT: the tokens at completion positions `offset_BG + t`.
            offset_BG: filled length of each row's caches; `offset + T` must stay within their size.
            cache: `[L, B, G, J, size, K]`.
            prompt: the prompts' caches, of all layers.
            plan: layers to run; None is the full model.

        Returns:
            Final hidden states, and the caches with these tokens added.
        """
        config, length = self.config, tokens_BGT.shape[-1]
        position_BGT = offset_BG[..., None] + jnp.arange(length)
        rotation = rope(config, prompt.length_B[:, None, None] + position_BGT)
        # A query sees every slot up to its own position: what was there before, and the new tokens that come earlier.
        own_mask = jnp.arange(cache.key.shape[-2]) <= position_BGT[..., None]
        shared_mask = prompt.valid_BP[:, None, None]
        # The two vmaps run over B and G, because each row writes at an offset of its own. A write that does not fit
        # would be moved without a word, hence the bound on `offset_BG`.
        write_rows = jax.vmap(jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0))))

        def attention(streams, cache, layer, slot):
            (x,) = streams
            query, new = project_qkv(config, layer, x, rotation)
            shared, own = entry((prompt.layers, cache), slot)
            # New keys are written before attention, so that the new tokens see one another through the cache.
            own = jax.tree.map(
                lambda rows, values: write_rows(rows, stored_as(values, rows.dtype), offset_BG), own, new
            )
            cache = jax.tree.map(
                lambda whole, rows: jax.lax.dynamic_update_index_in_dim(whole, rows, slot, 0), cache, own
            )
            attended = attend(query, (own, own_mask), (shared, shared_mask))
            return (add_attention(layer, x, attended),), cache, None

        loop = self._loop(attention, slots_by_layer=True)
        (x,), cache, _ = loop.run((self._embed(tokens_BGT),), cache, plan)
        return self._final_norm(x), cache

    def completion_hidden(
        self,
        prompt_BP: Int[Array, "B P"],
        valid_BP: Bool[Array, "B P"],
        tokens_BGC: Int[Array, "B G C"],
        plan: LayerPlan | None = None,
        remat: Remat = "none",
        shared_prefix: int = 0,
        segment_BGC: Int[Array, "B G C"] | None = None,
    ) -> Float[Array, "B G C D"]:
        """Hidden states that predict each completion token, the prompt run once per group.

        `hidden[:, :, c]` has seen the prompt and the completion tokens before `c`. Tokens after a
        row's end may hold anything: attention is causal, so they reach nothing before them.

        Args:
            prompt_BP, valid_BP: prompts and their mask.
            tokens_BGC: completions.
            plan: layers to run; None is the full model.
            remat: what the backward pass recomputes in each layer instead of storing it.
            shared_prefix: leading tokens that all prompts have in common; they run once for all of them.
            segment_BGC: the text that each token belongs to, where a completion's row holds several (`models.packing`).
                A text sees the prompt and itself, and its positions go on from the prompt.

        Returns:
            Final hidden states after the norm; `logits` turns them into logits.
        """
        streams = self.text_streams(prompt_BP, tokens_BGC, shared_prefix)
        *prompts, completion = self.run_texts(streams, valid_BP, plan, remat, shared_prefix, segment_BGC)
        # The first completion token is predicted at the prompt's last token, the others by the completion itself.
        prompt_BPD = PromptPass(self.config, valid_BP, shared_prefix).join(tuple(prompts))
        first_BD = _last_valid(self._final_norm(prompt_BPD), valid_BP)
        first = jnp.broadcast_to(first_BD[:, None, None], (*completion.shape[:2], 1, self.config.width))
        return jnp.concatenate([first, self._final_norm(completion)], axis=2)

    def text_streams(
        self, prompt_BP: Int[Array, "B P"], tokens_BGC: Int[Array, "B G C"], shared_prefix: int = 0
    ) -> tuple[Array, ...]:
        """The residual streams of prompts and their completions before the first layer.

        Args:
            prompt_BP, tokens_BGC, shared_prefix: as in `completion_hidden`.

        Returns:
            The prompts' streams, as `PromptPass.split` has them, and that of the completions, `[B, G, C - 1, D]`: the
            last token predicts nothing, so it is not run.
        """
        own, shared = prompt_BP[:, None, shared_prefix:], prompt_BP[:1, None, :shared_prefix]
        prompts = (self._embed(own), self._embed(shared)) if shared_prefix else (self._embed(own),)
        return (*prompts, self._embed(tokens_BGC[:, :, :-1]))

    def run_texts(
        self,
        streams: tuple[Array, ...],
        valid_BP: Bool[Array, "B P"],
        plan: LayerPlan | None = None,
        remat: Remat = "none",
        shared_prefix: int = 0,
        segment_BGC: Int[Array, "B G C"] | None = None,
    ) -> tuple[Array, ...]:
        """The streams of `text_streams` after the steps of a plan, which may begin at any layer.

        Args:
            streams: before the plan's first layer.
            valid_BP, plan, remat, shared_prefix, segment_BGC: as in `completion_hidden`.
        """
        config, completion_size = self.config, streams[-1].shape[2]
        prompts = PromptPass(config, valid_BP, shared_prefix)
        position, own_seen = places(completion_size, segment_BGC)
        # A completion goes on where its own prompt ends; the padding between takes no position.
        rotation = rope(config, valid_BP.sum(axis=-1)[:, None, None] + position)
        shared_seen = Visible(valid_BP[:, None])

        def attention(streams, _, layer, slot):
            *prompt, completion = streams
            # Prompt and completions pass a layer together, so its prompt keys need not be kept for later.
            prompt, shared = prompts.attention(layer, tuple(prompt))
            query, own = project_qkv(config, layer, completion, rotation)
            attended = attend_texts(query, (own, own_seen), (shared, shared_seen))
            return (*prompt, add_attention(layer, completion, attended)), None, None

        # Completions come after their prompts, so they have no first position.
        is_first = (*prompts.first_positions(), None)
        return self._loop(attention, is_first=is_first, remat=remat).run(streams, None, plan)[0]

    def _run_prompt(
        self, tokens_BT, valid_BT, plan, cache_dtype=jnp.float32, shared_prefix=0
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        prompts = PromptPass(self.config, valid_BT, shared_prefix)

        def attention(streams, _, layer, slot):
            streams, keys_values = prompts.attention(layer, streams)
            return (
                streams,
                None,
                jax.tree.map(lambda a: constrain(stored_as(a, cache_dtype), "batch", "kv_heads"), keys_values),
            )

        start = prompts.split(self._embed(tokens_BT[:, None]))
        loop = self._loop(attention, is_first=prompts.first_positions())
        streams, _, layers = loop.run(start, None, plan)
        return self._final_norm(prompts.join(streams)), layers

    def _loop(self, attention: Attention, **how: Any) -> LayerLoop:
        """A pass through the layers; `how` are the other fields of `LayerLoop`."""
        bridges = None if self.bridges is None else self.bridges.stack()
        layers = Layers(self.config, self._stack(), bridges, self.lora_scale, self.layers_unrolled, self.compute_dtype)
        return LayerLoop(layers, attention, **how)

    def _stack(self) -> Parameters:
        return {name: value[...] for name, value in nnx.state(self.layers).items()}

    def _embed(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        # Rows are taken first and widened then, so the whole table is never widened.
        # Its gradient is a scatter of rows, which the compiler cannot leave split along the width.
        table = constrain(self.embedding[...], *used_axes(axes_of("embedding")))
        rows = constrain(as_operand(table[tokens]).astype(jnp.float32), "batch")
        return rows if self.embedding_scale is None else rows * self.embedding_scale[...][tokens][..., None]

    def _final_norm(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.final_norm[...], self.config.norm_epsilon)


def _last_valid(x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Each row's entry at its last valid position."""
    # A count of valid tokens would not do: padding may stand on the left.
    last_B = jnp.max(jnp.where(valid_BT, jnp.arange(valid_BT.shape[-1]), 0), axis=-1)
    return jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
