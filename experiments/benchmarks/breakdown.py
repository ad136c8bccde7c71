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
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.arguments import command
from experiments.benchmarks.ceilings import ceilings_of
from experiments.benchmarks.common import exported_model, parser, prepare_process, write_results
from experiments.benchmarks.floors import Ceilings, CeilingsAt, rollout_floor, update_floor, update_tokens
from experiments.benchmarks.our_updates import grpo_task, initial, train_batch
from experiments.benchmarks.ours import VARIANTS, rollout_call
from experiments.benchmarks.stages import Best, Breakdown, Stage, breakdown_table, timed, with_rest
from experiments.benchmarks.worker import Case, measure
from nested_reft.layer_plan import LayerPlan, PlanShape
from nested_reft.models.attention import attend
from nested_reft.models.layer import KeyValues
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.logprobs import hidden_logprobs
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import row_keys, row_uniforms, sample_token
from nested_reft.training.step import TrainState, UpdatePlans, make_update

ROLLOUT = Case(prompts=8, group=8, prompt_tokens=64, new_tokens=32)
UPDATE = Case(prompts=8, group=8, prompt_tokens=53, new_tokens=12)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    options = parser("breakdown", __doc__)
    options.add_argument("--ours", choices=VARIANTS, default="float32", help="weights of the rollout")
    known = options.parse_args(arguments)
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
        update_breakdown(VARIANTS["float32"](directory).model, training, best),
    ]
    for breakdown in found:
        print(f"\n{breakdown_table(breakdown)}")
    results = {"ours": known.ours, "bandwidth": training.bandwidth, "product_flops": rates}
    write_results(known, results | {"breakdowns": [dataclasses.asdict(breakdown) for breakdown in found]})


def rollout_breakdown(policy: Policy, ceilings: CeilingsAt, best: Best) -> Breakdown:
    """Prefill, then for each token layers, attention, output head and sampling.

    The whole call goes through the policy, as in training. Its stages are no parts of a policy's interface, so
    they are compiled from the model itself.

    Args:
        policy: what samples.
        ceilings: of the machine, by rows.
        best: `measure` with the command's repeats.
    """
    case, model, config = ROLLOUT, policy.model, policy.model.config
    shape, steps = (case.prompts, case.group), case.new_tokens - 1
    plan = LayerPlan.full(config.num_layers)
    # The whole call comes first: what it compiles and how much memory it takes must be its own.
    whole = timed(best, rollout_call(policy, case))
    prompt_BP = jnp.asarray(case.prompt_ids(config.vocab_size), jnp.int32)
    prefill = jax.jit(lambda m, tokens: m.prefill(tokens, jnp.ones(tokens.shape, bool), plan))
    prompt = prefill(model, prompt_BP)
    cache = model.empty_cache(*shape, steps, plan)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache, prompt.layers)))
    decode_seconds, attention_seconds = decode_step_seconds(model, prompt, cache, plan, best)
    hidden_BGD = jnp.ones((*shape, config.width))
    logits = jax.jit(lambda m, hidden: m.logits(hidden))
    draw = jax.jit(lambda keys, logits: sample_token(row_uniforms(keys, 0), logits, policy.sampling))
    logits_BGV, key_BG = logits(model, hidden_BGD), row_keys(jax.random.key(0), jnp.arange(case.prompts), case.group)
    bandwidth, floor = (
        ceilings(case.rows).bandwidth,
        rollout_floor(config, case, PlanShape(config.num_layers), ceilings),
    )
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
                case.new_tokens * timed(best, lambda: draw(key_BG, logits_BGV))["seconds"],
                case.new_tokens * logits_BGV.nbytes / bandwidth,
            ),
        ],
    )


def decode_step_seconds(
    model: Transformer, prompt: PromptCache, cache: KeyValues, plan: LayerPlan, best: Best
) -> tuple[float, float]:
    """Seconds of one decode step through all layers, and of the attention in it.

    Args:
        model: what decodes.
        prompt: after its prefill, [B, ...].
        cache: of the completions, [S, B, J, G, steps, K]; it stays as it is.
        plan: the layers that act.
        best: `measure` with the command's repeats.
    """
    config, steps = model.config, cache.key.shape[-2]
    shape = (ROLLOUT.prompts, ROLLOUT.group)
    # A step in the middle of the completion stands for all: attention reads the whole cache at each of them.
    tokens_BG, middle = jnp.ones(shape, int), jnp.asarray(steps // 2)
    decode = jax.jit(lambda m, cache, prompt: m.decode(tokens_BG, middle, cache, prompt, plan), donate_argnums=1)
    # Within the rollout's loop the cache is written in place, which donation does here. Keys and values of an empty
    # cache may share a buffer, and one buffer cannot be donated twice, so both are copied.
    moving = jax.tree.map(jnp.copy, cache)

    def decode_once() -> Any:
        nonlocal moving
        hidden_BGD, moving = decode(model, moving, prompt)
        return hidden_BGD, moving

    query = jnp.ones((*shape, 1, config.num_heads, config.head_size))
    masks = (jnp.ones(steps, bool), jnp.ones(ROLLOUT.prompt_tokens, bool))
    attention = jax.jit(partial(_all_attention, masks=masks))
    decode_seconds = timed(best, decode_once)["seconds"]
    return decode_seconds, timed(best, lambda: attention(query, moving, prompt.layers))["seconds"]


def update_breakdown(model: Transformer, ceilings: Ceilings, best: Best) -> Breakdown:
    """Layers and log-probabilities forward, both backward, and the optimizer.

    Args:
        model: what is trained; it stays as it is.
        ceilings: of the machine, at the update's number of rows.
        best: `measure` with the command's repeats.
    """
    case, config, task = UPDATE, model.config, grpo_task(UPDATE)
    batch, update = train_batch(case, config.vocab_size), make_update(task)
    # The update takes over its state's buffers, and the stages below still need the model's.
    state, base = initial(jax.tree.map(jnp.copy, model), task)

    def update_once() -> Any:
        nonlocal state
        state = update(state, base, batch, UpdatePlans())[0]
        return state

    whole = timed(best, update_once)
    prompts = (batch.prompt_BP, jnp.ones(batch.prompt_BP.shape, bool), batch.tokens_BGC)

    def logprob_sum(trainable: nnx.State) -> jax.Array:
        merged = base.with_parameters(trainable)
        return hidden_logprobs(merged, merged.completion_hidden(*prompts), batch.tokens_BGC, 1.0)[0].sum()

    forward = jax.jit(lambda m: m.completion_hidden(*prompts))
    hidden_BGCD = forward(model)
    logprobs = jax.jit(lambda m, hidden: hidden_logprobs(m, hidden, batch.tokens_BGC, 1.0))
    gradient_of = jax.jit(jax.grad(logprob_sum))
    layers_seconds = timed(best, lambda: forward(model))["seconds"]
    logprob_seconds = timed(best, lambda: logprobs(model, hidden_BGCD))["seconds"]
    both_ways = timed(best, lambda: gradient_of(state.trainable))["seconds"]
    optimizer_seconds = optimizer_step_seconds(task.optimizer, state, gradient_of(state.trainable), best)
    floor = update_floor(config, case, ceilings)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    return with_rest(
        "update",
        whole,
        [
            Stage("layers, forward", layers_seconds, floor["layers"]),
            Stage("head and log-probabilities, forward", logprob_seconds, floor["head"]),
            # The backward pass cannot run alone, so the forward passes are taken off.
            Stage("backward", both_ways - layers_seconds - logprob_seconds, floor["backward"]),
            # It reads weight, gradient and two moments, and writes all but the gradient.
            Stage("optimizer", optimizer_seconds, 7 * weights / ceilings.bandwidth),
        ],
    )


def optimizer_step_seconds(
    optimizer: optax.GradientTransformation, state: TrainState, gradient: nnx.State, best: Best
) -> float:
    """Seconds of one step of the optimizer alone.

    Args:
        optimizer: as the update applies it.
        state: gives parameters and moments; it stays as it is.
        gradient: of the parameters.
        best: `measure` with the command's repeats.
    """
    step = jax.jit(partial(_optimizer_step, optimizer), donate_argnums=(0, 1))
    moving = jax.tree.map(jnp.copy, (state.trainable, state.optimizer_state))

    def step_once() -> Any:
        nonlocal moving
        moving = step(*moving, gradient)
        return moving

    return timed(best, step_once)["seconds"]


def _all_attention(query: jax.Array, cache: KeyValues, prompt: KeyValues, masks: tuple[jax.Array, jax.Array]) -> Any:
    """Attention of one decode step in every layer.

    Args:
        query: [B, G, 1, H, K], the same for each layer.
        cache: keys and values of the completions, by layer.
        prompt: those of the prompts, shared by the group.
        masks: slots of both that hold a token.

    Returns:
        The outputs added up, so that the compiler can leave none of them out.
    """

    def layer(total: jax.Array, key_values: tuple[KeyValues, KeyValues]) -> tuple[jax.Array, None]:
        own, shared = key_values
        return total + attend(query, (own, masks[0]), (shared, masks[1])), None

    shape = (*query.shape[:3], query.shape[-2] * query.shape[-1])
    return jax.lax.scan(layer, jnp.zeros(shape), (cache, prompt))[0]


def _optimizer_step(optimizer: optax.GradientTransformation, trainable: Any, moments: Any, gradient: Any) -> Any:
    updates, moments = optimizer.update(gradient, moments, trainable)
    return optax.apply_updates(trainable, updates), moments


if __name__ == "__main__":
    sys.exit(main())
