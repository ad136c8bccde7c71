"""How bridges are found: least squares on the policy's own texts, and distillation.

The bridge of layer `l` is to carry a stream from before the layer to what the full model has behind it. With z the
input `(rms(x), 1)` of a token, d the target minus x, and w the token's weight, the ridge solution of

    min_W  sum w |W z - d|^2 + lambda |W - W_0|^2

is `W (A + lambda I) = B + lambda W_0` with `A = sum w z z^T` and `B = sum w d z^T`, lambda a share of A's mean
diagonal and W_0 the bridge so far, zero at first. The bias, z's last entry, is not penalised. Sums are float32; the
system is solved in float64 on the host. First positions are left out of both sums, and their constant is the mean of d
there.

Fitted *in sequence*, a bridge reads the stream that the bridges before it leave, and so makes up for part of their
error; it then belongs to its plan. Fitted *alone*, each reads the full model's stream, and any plan may use it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from nested_reft.divergence import Texts, completion_hidden, mean_divergence
from nested_reft.layer_plan import LayerPlan, Part, PlanShape
from nested_reft.models.bridges import Bridges, BridgeVariable, add_bridge, stream_rms
from nested_reft.models.parameters import Parameters
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import to_host
from nested_reft.types import valid_mask

Streams = tuple[Array, ...]
PROMPT_WEIGHT = 0.25  # of a prompt's token beside that of a completion, which is what nested rollouts sample


@struct.dataclass
class NormalEquations:
    """The sums that a least-squares fit of one layer needs; those of several batches add up.

    Attributes:
        a_ZZ: sum of w z z^T over tokens, Z = D + 1.
        b_DZ: sum of w d z^T.
        first_D: sum of d over first positions.
        prompts: number of first positions.
    """

    a_ZZ: Float[Array, "Z Z"]
    b_DZ: Float[Array, "D Z"]
    first_D: Float[Array, " D"]
    prompts: Int[Array, ""]

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return jax.tree.map(operator.add, self, other)


def solve(
    equations: NormalEquations, ridge: float, start_DZ: Float[np.ndarray, "D Z"], rank: int | None = None
) -> tuple[Float[np.ndarray, "D Z"], Any]:
    """The ridge solution, and the directions of the stream that a bridge of lower rank keeps.

    A rank r < D takes the r directions in which the predicted values vary most: the best approximation of that rank
    in the same least-squares sense (reduced-rank regression; Izenman, 1975).

    Args:
        equations: the sums.
        ridge: lambda as a share of the mean diagonal of A.
        start_DZ: W_0.
        rank: r; None is full rank.

    Returns:
        W with the bias as its last column, and the directions U, `[D, r]`, None of full rank. The map of rank r is
        `U (U^T W)`.
    """
    a_ZZ, b_DZ = (x.astype(np.float64) for x in to_host((equations.a_ZZ, equations.b_DZ)))
    # Ridge keeps directions finite in which the tokens do not vary at all. The bias, which they all share, needs none.
    strength_Z = np.full(len(a_ZZ), ridge * np.trace(a_ZZ[:-1, :-1]) / (len(a_ZZ) - 1))
    strength_Z[-1] = 0.0
    right_DZ = b_DZ + strength_Z * start_DZ.astype(np.float64)
    w_DZ = np.linalg.solve(a_ZZ + np.diag(strength_Z), right_DZ.T).T
    if rank is None:
        return w_DZ, None
    # The last row and column of A hold the sums of z and of w: without them, what is left is the covariance of rms(x).
    mean_D = a_ZZ[:-1, -1] / a_ZZ[-1, -1]
    covariance_DD = a_ZZ[:-1, :-1] - a_ZZ[-1, -1] * np.outer(mean_D, mean_D)
    map_DD = w_DZ[:, :-1]
    _, directions_DD = np.linalg.eigh(map_DD @ covariance_DD @ map_DD.T)
    u_Dr = directions_DD[:, -rank:]
    # The bias makes up for the mean of what the other directions carried.
    lost_D = map_DD @ mean_D - u_Dr @ (u_Dr.T @ (map_DD @ mean_D))
    return np.concatenate([map_DD, (w_DZ[:, -1] + lost_D)[:, None]], axis=1), u_Dr


@partial(jax.jit, static_argnames="shared_prefix")
def _equations(x: tuple[Array, ...], target: tuple[Array, ...], texts: Texts, shared_prefix: int) -> NormalEquations:
    """The sums of one batch from the streams before a bridge and those that it is to reach."""
    prompt_BP, prompt_length_B, tokens_BGC, length_BG = texts
    # The first position's stream is a hundred times as large as the others in most models: it would count alone.
    # Texts are padded on the right, so it is the first column.
    prompt_weight_BP = valid_mask(prompt_length_B, prompt_BP.shape[1]).at[:, 0].set(False) * PROMPT_WEIGHT
    weights = [prompt_weight_BP[:, shared_prefix:]]
    if shared_prefix:
        # The one stream of the shared tokens stands for those of all prompts.
        weights.append(prompt_weight_BP[:, :shared_prefix].sum(axis=0))
    weights.append(valid_mask(length_BG, tokens_BGC.shape[-1])[..., :-1] * 1.0)
    weight_N = jnp.concatenate([weight.ravel() for weight in weights])
    # First positions lie in the shared stream where there is one.
    first_BD = (target[-2] - x[-2])[:, 0, 0]
    x_ND, target_ND = (jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]) for parts in (x, target))
    z_NZ = jnp.concatenate([stream_rms(x_ND), jnp.ones((len(x_ND), 1))], axis=1)
    weighted_NZ = z_NZ * weight_N[:, None]
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return NormalEquations(
        a_ZZ=product("nz,ny->zy", weighted_NZ, z_NZ),
        b_DZ=product("nd,nz->dz", target_ND - x_ND, weighted_NZ),
        first_D=first_BD.mean(axis=0) * len(prompt_BP),
        prompts=jnp.asarray(len(prompt_BP)),
    )


def fit_bridges(
    model: Transformer,
    batches: Sequence[Texts],
    ridge: float,
    plan: LayerPlan | None = None,
    shared_prefix: int = 0,
) -> Parameters:
    """Bridges by least squares: those of a plan in sequence, or each layer's alone.

    Layers are gone through one by one, for all texts at once. Beside the streams of the texts, the sums of one layer
    exist at a time. A plan costs two forward passes of its texts. Layers that are fitted alone cost one.

    Args:
        model: the full model, with the bridges so far, which the ridge draws the new ones to.
        batches: texts, as `divergence.texts_of` returns them; those of one shape compile once.
        ridge: lambda as a share of the mean diagonal.
        plan: the bridges to fit, each on the stream that the plan's earlier steps leave. A bridge spans its own layer
            and those after it that the plan skips. None fits every layer on the full model's stream.
        shared_prefix: leading tokens that all prompts have in common; they run once per batch.

    Returns:
        All bridges by name, as `Bridges.stack` has them; those that were not fitted stay as they were.
    """
    num_layers, stack = model.config.num_layers, model.stacked_bridges()
    full = nested = [_start(model, texts, shared_prefix) for texts in batches]

    def advanced(streams: list[Streams], layer: int, part: Part = Part.KEEP) -> list[Streams]:
        index = jnp.asarray(layer, jnp.int32)
        return [
            _one_step(model, x, texts, index, part, shared_prefix) for x, texts in zip(streams, batches, strict=True)
        ]

    for first, last, part in _spans(plan, num_layers):
        ahead = full
        for layer in range(first, last + 1):
            ahead = advanced(ahead, layer)
        if part == Part.BRIDGE:
            sums = [_equations(*each, shared_prefix) for each in zip(nested, ahead, batches, strict=True)]
            start = {name: to_host(value[first]).astype(np.float32) for name, value in stack.items()}
            bridge = _solved(functools.reduce(operator.add, sums), ridge, start)
            stack = {name: value.at[first].set(bridge[name].astype(value.dtype)) for name, value in stack.items()}
            nested = ahead if plan is None else [_bridged(bridge, x) for x in nested]
        elif part != Part.SKIP:
            # As long as nothing was replaced, the two streams are one.
            nested = ahead if nested is full and part == Part.KEEP else advanced(nested, first, part)
        full = ahead
    return stack


def add_bridges(
    model: Transformer,
    batches: Sequence[Texts],
    ridge: float,
    plan: LayerPlan | None = None,
    rank: int | None = None,
) -> None:
    """Gives the model new bridges, fitted on these texts. Those that it had are not read.

    Args:
        model: changed in place.
        batches, ridge, plan: as in `fit_bridges`.
        rank: of the bridges; None is full rank. They need about twice as many completion tokens as their rank, or as
            the model's width.
    """
    # Bridges that were there before would draw the new ones to them.
    model.bridges = Bridges(model.config.num_layers, model.config.width, rank)
    model.load_bridges(fit_bridges(model, batches, ridge, plan))


def _spans(plan: LayerPlan | None, num_layers: int) -> list[tuple[int, int, Part]]:
    """First and last layer of every step, and its part; skipped layers belong to the bridge before them, if any."""
    if plan is None:
        return [(layer, layer, Part.BRIDGE) for layer in range(num_layers)]
    spans: list[tuple[int, int, Part]] = []
    for layer, part in enumerate(plan.host_parts(num_layers)):
        if part == Part.SKIP and spans and spans[-1][2] == Part.BRIDGE:
            spans[-1] = (spans[-1][0], layer, Part.BRIDGE)
        else:
            spans.append((layer, layer, Part(part)))
    return spans


def _solved(equations: NormalEquations, ridge: float, start: dict[str, np.ndarray]) -> Parameters:
    """One layer's bridge by name, of the rank that `start` has."""
    first_D, prompts = to_host((equations.first_D, equations.prompts))
    found = {"first": first_D / prompts}
    if "map" in start:
        w_DZ, _ = solve(equations, ridge, np.column_stack([start["map"], start["map_bias"]]))
        found |= {"map": w_DZ[:, :-1], "map_bias": w_DZ[:, -1]}
    else:
        start_DZ = np.column_stack([start["widen"] @ start["narrow"], start["widen_bias"]])
        w_DZ, u_Dr = solve(equations, ridge, start_DZ, len(start["narrow"]))
        found |= {"narrow": u_Dr.T @ w_DZ[:, :-1], "widen": u_Dr, "widen_bias": w_DZ[:, -1]}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


@partial(jax.jit, static_argnames="shared_prefix")
def _start(model: Transformer, texts: Texts, shared_prefix: int) -> Streams:
    return model.text_streams(texts[0], texts[2], shared_prefix)


@partial(jax.jit, static_argnames=("part", "shared_prefix"))
def _one_step(
    model: Transformer, streams: Streams, texts: Texts, layer: Int[Array, ""], part: Part, shared_prefix: int
) -> Streams:
    """The streams after one layer, or after a part of it."""
    prompt_BP, prompt_length_B, *_ = texts
    # The layer is data, so that all layers share one program.
    step = LayerPlan(layer[None], jnp.full(1, part, jnp.int32), PlanShape.of([part]))
    return model.run_texts(streams, valid_mask(prompt_length_B, prompt_BP.shape[1]), step, shared_prefix=shared_prefix)


@jax.jit
def _bridged(bridge: Parameters, streams: Streams) -> Streams:
    *prompts, completions = streams
    # The last stream of the prompts begins at their first position, whether they share it or not.
    is_first = jnp.broadcast_to(jnp.arange(prompts[-1].shape[2]) == 0, prompts[-1].shape[:-1])
    *own, first = prompts
    return (
        *(add_bridge(bridge, stream) for stream in own),
        add_bridge(bridge, first, is_first),
        add_bridge(bridge, completions),
    )


def distil_bridges(
    model: Transformer,
    batches: Sequence[Texts],
    temperature: float,
    plans: Sequence[LayerPlan],
    learning_rate: float,
) -> Parameters:
    """Bridges after one step of distillation for each plan: the full model teaches, and only bridges learn.

    A step lowers KL(full || nested) per completion token, exact over the vocabulary, on one batch of texts under one
    plan. The optimizer is Adam; its rate rises for 5 steps and falls to 0 along a cosine. A step costs about as much as
    an update.

    Args:
        model: the full model, with bridges that were fitted.
        batches: texts, which take turns.
        temperature: the sampling temperature of both policies.
        plans: one for each step, all of one shape.
        learning_rate: the highest.

    Returns:
        All bridges by name.
    """
    full = [completion_hidden(model, texts) for texts in batches]
    graph, start, rest = nnx.split(model, BridgeVariable, ...)
    # Small steps would round away in bfloat16.
    bridges = jax.tree.map(lambda array: array.astype(jnp.float32), start)
    optimizer, step = _distillation(learning_rate, len(plans), temperature)
    state = optimizer.init(bridges)
    for number, plan in enumerate(plans):
        turn = number % len(batches)
        bridges, state = step(graph, bridges, rest, state, full[turn], batches[turn], plan)
    bridges = jax.tree.map(lambda array, like: array.astype(like.dtype), bridges, start)
    return nnx.merge(graph, bridges, rest).stacked_bridges()


@functools.cache
def _distillation(learning_rate: float, steps: int, temperature: float) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer and its compiled step; the same ones for the same settings, so that a refit compiles nothing."""
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(5, steps // 2), steps)
    # Few steps are taken, so the second moment must not remember the first of them for long.
    optimizer = optax.adam(rate, b2=0.98)

    @partial(jax.jit, static_argnums=0)
    def step(graph, bridges, rest, state, full_BGCD, texts, plan):
        def divergence(bridges):
            return mean_divergence(nnx.merge(graph, bridges, rest), full_BGCD, texts, temperature, plan)

        updates, state = optimizer.update(jax.grad(divergence)(bridges), state, bridges)
        return optax.apply_updates(bridges, updates), state

    return optimizer, step
