"""Where the time of one rollout call and of one update goes, against what the machine can do.

    python -m experiments.benchmarks.breakdown [--ours int8] [--json FILE]

Each stage is compiled and timed by itself at the shapes that it has inside: 8 prompts x 8 completions of
SmolLM2-135M, 64 + 32 tokens for the rollout and 53 + 12 for the update. "The rest" is what the whole call
takes beyond them; it is negative where the compiler saves by fusing stages. Floors are products at the
measured rate for their number of rows, or the bytes that a stage must move at the measured bandwidth.
`--ours` picks the weights that the rollout samples from; the update is always of float32 ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.benchmarks.ceilings import ceilings_of
from experiments.benchmarks.common import exported_model, parser, prepare_process, write_results
from experiments.benchmarks.floors import Ceilings, CeilingsAt, rollout_floor, update_floor, update_tokens
from experiments.benchmarks.our_updates import grpo_update, train_batch
from experiments.benchmarks.ours import VARIANTS, rollout_call
from experiments.benchmarks.stages import Breakdown, Stage, breakdown_table, timed, with_rest
from experiments.benchmarks.worker import Case, measure
from nested_reft.layer_skip import LayerPlan
from nested_reft.models.layer import KeyValues, attend
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import hidden_logprobs
from nested_reft.rollout.sampling import SamplingConfig, row_uniforms, sample_token
from nested_reft.training.step import create_train_state

ROLLOUT = Case(prompts=8, group=8, prompt_tokens=64, new_tokens=32)
UPDATE = Case(prompts=8, group=8, prompt_tokens=53, new_tokens=12)


def main() -> None:
    """Prints the tables."""
    options = parser(__doc__ or "", ())
    options.add_argument("--ours", choices=VARIANTS, default="float32", help="weights of the rollout")
    known = options.parse_args()
    prepare_process(known.threads)
    config, directory, _ = exported_model()
    best = partial(measure, repeats=known.repeats)
    sampling = ceilings_of(config, jnp.dtype(known.ours))
    training = ceilings_of(config, jnp.float32)(update_tokens(UPDATE, shared_prompt=True))
    rates = {
        f"{known.ours} decode step": sampling(ROLLOUT.rows).flops,
        f"{known.ours} prefill": sampling(ROLLOUT.prompts * ROLLOUT.prompt_tokens).flops,
        "float32 update": training.flops,
    }
    print(f"memory {training.bandwidth / 1e9:.1f} GB/s; products of", end=" ")
    print(", ".join(f"{name}: {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()), flush=True)
    found = [
        rollout_breakdown(VARIANTS[known.ours](directory), sampling, best),
        update_breakdown(VARIANTS["float32"](directory), training, best),
    ]
    for breakdown in found:
        print(f"\n{breakdown_table(breakdown)}")
    results = {"ours": known.ours, "bandwidth": training.bandwidth, "product_flops": rates}
    write_results(known.json, results | {"breakdowns": [dataclasses.asdict(breakdown) for breakdown in found]})


def rollout_breakdown(model: Transformer, ceilings: CeilingsAt, best: Callable[[Any], dict[str, Any]]) -> Breakdown:
    """Prefill, then for each token layers, attention, output head and sampling."""
    case, config = ROLLOUT, model.config
    shape, steps = (case.prompts, case.group), case.new_tokens - 1
    prompt_BP = jnp.asarray(case.prompt_ids(config.vocab_size), jnp.int32)
    plan = LayerPlan.full(config.num_layers)
    whole = timed(best, rollout_call(model, case))
    prefill = jax.jit(lambda m, tokens: m.prefill(tokens, jnp.ones(tokens.shape, bool), plan))
    prompt = prefill(model, prompt_BP)
    decode = jax.jit(
        lambda m, cache, prompt: m.decode(jnp.ones(shape, int), steps // 2, cache, prompt, plan), donate_argnums=1
    )
    cache = jax.tree.map(jnp.copy, model.empty_cache(*shape, steps, plan))  # donated: keys and values apart

    def decode_once() -> Any:
        nonlocal cache
        hidden_BGD, cache = decode(model, cache, prompt)
        return hidden_BGD, cache

    query = jnp.ones((*shape, 1, config.num_heads, config.head_size))
    attention = jax.jit(partial(_all_attention, masks=(jnp.ones(steps, bool), jnp.ones(case.prompt_tokens, bool))))
    hidden_BGD = jnp.ones((*shape, config.width))
    logits = jax.jit(lambda m, hidden: m.logits(hidden))
    draw = jax.jit(lambda key, logits: sample_token(row_uniforms(key, shape), logits, SamplingConfig()))
    logits_BGV = logits(model, hidden_BGD)
    decode_seconds, attention_seconds = (
        timed(best, call)["seconds"] for call in (decode_once, lambda: attention(query, cache, prompt.layers))
    )
    bandwidth, floor = ceilings(case.rows).bandwidth, rollout_floor(config, case, config.num_layers, ceilings)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache, prompt.layers)))
    return with_rest(
        "rollout call",
        whole,
        [
            Stage("prefill", timed(best, lambda: prefill(model, prompt_BP))["seconds"], floor["prefill"]),
            Stage("decode: layers without attention", steps * (decode_seconds - attention_seconds), floor["layers"]),
            Stage("decode: attention", steps * attention_seconds, steps * cache_bytes / bandwidth),
            Stage(
                "output head",
                case.new_tokens * timed(best, lambda: logits(model, hidden_BGD))["seconds"],
                floor["head"],
            ),
            Stage(
                "sampling",
                case.new_tokens * timed(best, lambda: draw(jax.random.key(0), logits_BGV))["seconds"],
                case.new_tokens * logits_BGV.nbytes / bandwidth,
            ),
        ],
    )


def update_breakdown(model: Transformer, ceilings: Ceilings, best: Callable[[Any], dict[str, Any]]) -> Breakdown:
    """Layers and log-probabilities forward, both backward, and the optimizer."""
    case, config = UPDATE, model.config
    batch = train_batch(case, config.vocab_size)
    optimizer, update = grpo_update()
    state = create_train_state(jax.tree.map(jnp.copy, model), optimizer)

    def update_once() -> Any:
        nonlocal state
        state = update(state, batch)[0]
        return state

    whole = timed(best, update_once)
    graph, trainable = state.graph, state.trainable
    prompts = (batch.prompt_BP, jnp.ones(batch.prompt_BP.shape, bool), batch.tokens_BGC)

    def logprob_sum(trainable: nnx.State) -> jax.Array:
        merged = nnx.merge(graph, trainable, state.frozen)
        return hidden_logprobs(merged, merged.completion_hidden(*prompts), batch.tokens_BGC, 1.0)[0].sum()

    forward = jax.jit(lambda m: m.completion_hidden(*prompts))
    hidden_BGCD = forward(model)
    logprobs = jax.jit(lambda m, hidden: hidden_logprobs(m, hidden, batch.tokens_BGC, 1.0))
    gradient_of = jax.jit(jax.grad(logprob_sum))
    gradient = gradient_of(trainable)
    step = jax.jit(partial(_optimizer_step, optimizer), donate_argnums=(0, 1))
    moving = (jax.tree.map(jnp.copy, trainable), state.optimizer_state)

    def step_once() -> Any:
        nonlocal moving
        moving = step(*moving, gradient)
        return moving

    layers_seconds = timed(best, lambda: forward(model))["seconds"]
    logprob_seconds = timed(best, lambda: logprobs(model, hidden_BGCD))["seconds"]
    both_ways = timed(best, lambda: gradient_of(trainable))["seconds"]
    floor = update_floor(config, case, ceilings)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    return with_rest(
        "update",
        whole,
        [
            Stage("layers, forward", layers_seconds, floor["layers"]),
            Stage("head and log-probabilities, forward", logprob_seconds, floor["head"]),
            Stage("backward", both_ways - layers_seconds - logprob_seconds, floor["backward"]),
            # reads weight, gradient and two moments, writes all but the gradient
            Stage("optimizer", timed(best, step_once)["seconds"], 7 * weights / ceilings.bandwidth),
        ],
    )


def _all_attention(query: jax.Array, cache: KeyValues, prompt: KeyValues, masks: tuple[jax.Array, jax.Array]) -> Any:
    """Attention of one decode step in every layer."""

    def layer(total: jax.Array, key_values: tuple[KeyValues, KeyValues]) -> tuple[jax.Array, None]:
        own, shared = key_values
        return total + attend(query, (own, masks[0]), (shared, masks[1])), None

    shape = (*query.shape[:3], query.shape[-2] * query.shape[-1])
    return jax.lax.scan(layer, jnp.zeros(shape), (cache, prompt))[0]


def _optimizer_step(optimizer: optax.GradientTransformation, trainable: Any, moments: Any, gradient: Any) -> Any:
    updates, moments = optimizer.update(gradient, moments, trainable)
    return optax.apply_updates(trainable, updates), moments


if __name__ == "__main__":
    main()
