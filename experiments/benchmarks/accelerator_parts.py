"""The parts of `accelerator`: what each one measures, job by job, and the columns of its table."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.backend import clear_backends

from experiments.benchmarks.ceilings import copy_bandwidth, matrix_rate, memory_bandwidth
from experiments.benchmarks.common import shown
from experiments.benchmarks.exact import exact_rows
from experiments.benchmarks.floors import Ceilings, ratio, update_floor, update_tokens
from experiments.benchmarks.our_updates import grpo_task, initial, train_batch
from experiments.benchmarks.ours import rollout_call
from experiments.benchmarks.peers import Skipped, System, ask
from experiments.benchmarks.refill import PROMPTS_PER_ROW, lengths_of, long_tailed, sampler
from experiments.benchmarks.worker import Case, Spec, measure
from nested_reft.backends import cores
from nested_reft.compilation import CompileCounter
from nested_reft.json_files import write_json
from nested_reft.layer_skip import NestingConfig, draw_plan
from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.huggingface_config import config_to_huggingface
from nested_reft.models.low_precision import low_precision
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.registry import load_model
from nested_reft.models.transformer import PromptCache, Transformer
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import SamplingConfig, row_keys, row_uniforms, sample_token
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.step import UpdatePlans, make_update

Row = dict[str, Any]
Precision = Literal["float32", "bfloat16", "int8"]
Column = Callable[[Row], Any]


@dataclass(frozen=True)
class Sizes:
    """How much work the parts are.

    Attributes:
        floats: numbers that are copied and read for the bandwidth.
        matrix: side of the square matrices for the matrix rate.
        decode_rows, contexts: of the decode steps; half of a context is the prompt, the rest the completion.
        decode_steps: within one timed call.
        decode_skip_ratio: of nested decode steps, at the first context only.
        tail_rows: that are decoded at a time where lengths have a long tail.
        tail_prompt_tokens, tail_new_tokens, tail_mean: of the prompts, of the longest completion and of the mean one.
        precisions: of those rollouts.
        skip_ratios: of the nested plans; the ends first, for a run that is cut short.
        exact: the workload at each number of rows.
        updates: workloads, and what the backward pass recomputes.
        repeats: timed calls of each case, after the first.
    """

    floats: int = 2**29
    matrix: int = 8192
    decode_rows: tuple[int, ...] = (1, 16, 64, 256)
    contexts: tuple[int, ...] = (512, 4096)
    decode_steps: int = 32
    decode_skip_ratio: float = 0.33
    tail_rows: int = 64
    tail_prompt_tokens: int = 64
    tail_new_tokens: int = 512
    tail_mean: int = 64
    precisions: tuple[Precision, ...] = ("bfloat16", "int8")
    skip_ratios: tuple[float, ...] = (0.0, 0.33, 0.1, 0.2)
    exact: tuple[Case, ...] = (Case(1, 1, 64, 64, 0.1), Case(2, 8, 64, 64, 0.1), Case(8, 8, 64, 64, 0.1))
    updates: tuple[tuple[Case, Literal["none", "full"]], ...] = (
        (Case(4, 8, 64, 128), "none"),
        (Case(8, 8, 256, 768), "full"),
    )
    repeats: int = 2


SMALL = Sizes(
    floats=2**22,
    matrix=256,
    decode_rows=(1, 4),
    contexts=(32,),
    decode_steps=4,
    tail_rows=4,
    tail_prompt_tokens=8,
    tail_new_tokens=24,
    tail_mean=6,
    skip_ratios=(0.0, 0.33),
    exact=(Case(2, 2, 8, 8, 0.1),),
    updates=((Case(2, 2, 8, 8), "none"), (Case(2, 2, 16, 16), "full")),
)
SMALL_SHAPE = ModelConfig(
    vocab_size=512, num_layers=10, width=64, hidden_width=128, num_heads=4, num_kv_heads=2, head_size=16
)


class Bench:
    """What the parts share: sizes, weights, and rates that are measured when they are first asked for.

    Args:
        sizes: how much work there is.
        config: the model's shape.
        model: whose weights are loaded; None draws random ones.
        seconds_left: what the time limit leaves.
    """

    def __init__(self, sizes: Sizes, config: ModelConfig, model: str | None, seconds_left: Callable[[], float]):
        self.sizes, self.config, self.model, self.seconds_left = sizes, config, model, seconds_left
        # Asked once: the peers' part closes JAX's backend, which a later question would open again.
        self.platform = jax.default_backend()
        self.update_seconds: dict[Case, float] = {}
        self._kept: dict[str, Policy] = {}

    def policy(self, precision: Precision) -> Policy:
        """A policy with weights in that precision, which is kept until another one is asked for."""
        if precision not in self._kept:
            self.forget()
            # Nothing is decoded into text, so any tokenizer serves.
            self._kept[precision] = Policy(self.weights(precision), Tokenizer.characters("01"))
        return self._kept[precision]

    def forget(self) -> None:
        """Gives back the memory of the policy that is kept."""
        self._kept.clear()
        gc.collect()  # models refer to themselves

    def weights(self, precision: Precision) -> Transformer:
        """A new model in float32, or its copy as training samples from it."""
        if self.model is None:
            return _random_model(jax.random.key(0), self.config, precision)
        model = load_model(self.model)[0]
        return model if precision == "float32" else low_precision(model, precision)

    @functools.cached_property
    def copied(self) -> float:
        """Bytes per second of a copy."""
        return copy_bandwidth(self.sizes.floats)

    @functools.cached_property
    def read(self) -> float:
        """Bytes per second of a matrix that is read."""
        return memory_bandwidth(self.sizes.floats)

    @property
    def bandwidth(self) -> float:
        """The better of both."""
        return max(self.copied, self.read)

    @functools.cached_property
    def bfloat16_rate(self) -> float:
        """Operations per second of products in bfloat16."""
        return matrix_rate(self.sizes.matrix, jnp.bfloat16)

    @functools.cached_property
    def float32_rate(self) -> float:
        """The same in float32, as JAX multiplies it by default."""
        return matrix_rate(self.sizes.matrix, jnp.float32)


@partial(jax.jit, static_argnames=("config", "precision"))
def _random_model(key: jax.Array, config: ModelConfig, precision: Precision) -> Transformer:
    model = Transformer(config, initial_parameters(config, key))
    return model if precision == "float32" else low_precision(model, precision)


@dataclass(frozen=True)
class Job:
    """What is measured, skipped or fails as a whole.

    Attributes:
        case: its name.
        measure: one row for each case within; rows without a `case` get the name.
    """

    case: str
    measure: Callable[[], list[Row]]


@dataclass(frozen=True)
class Part:
    """Jobs with a table of their own.

    Attributes:
        title: above the table.
        jobs: in the order of their value.
        columns: the cells beside the case's name.
        compared: adds to the rows what compares them with one another.
    """

    title: str
    jobs: Callable[[Bench], list[Job]]
    columns: dict[str, Column]
    compared: Callable[[list[Row]], list[Row]] = lambda rows: rows


def timed(call: Callable[[], Any], repeats: int) -> Row:
    """`measure` of a call that waits for its result, with the programs that its first round and later ones compiled."""
    counter, counts = CompileCounter(), []

    def counted() -> None:
        call()
        counts.append(counter.count)

    found = measure(counted, repeats)
    counter.close()
    compiled = {"compilations": counts[0], "compilations_later": counts[-1] - counts[0]}
    return found | compiled | {"compile_seconds": counter.seconds}


def _number(name: str, form: str, scale: float = 1.0) -> Column:
    """A column of a number; a dash where a row has none."""
    return lambda row: shown(None if row.get(name) is None else scale * row[name], form)


COSTS: dict[str, Column] = {
    "first s": _number("first_seconds", ".1f"),
    "compiled": _number("compilations", "d", 1),
    "later": _number("compilations_later", "d", 1),
}


def ceiling_jobs(bench: Bench) -> list[Job]:
    """Bandwidth twice, and the rates of products."""

    def job(name: str, unit: str, value: Callable[[], float]) -> Job:
        return Job(name, lambda: [{"rate": value() / 1e9, "unit": f"G{unit}/s"}])

    return [
        job("copy", "B", lambda: bench.copied),
        job("read", "B", lambda: bench.read),
        job("bfloat16 products", "FLOP", lambda: bench.bfloat16_rate),
        job("float32 products", "FLOP", lambda: bench.float32_rate),
    ]


def decode_jobs(bench: Bench) -> list[Job]:
    """Every number of rows at every context, and then nested steps beside those at the first one."""
    sizes = bench.sizes
    full = [(rows, context, 0.0) for context in sizes.contexts for rows in sizes.decode_rows]
    nested = [(rows, sizes.contexts[0], sizes.decode_skip_ratio) for rows in sizes.decode_rows]
    return [
        Job(
            f"{rows} row{'s' * (rows > 1)}, context {context}" + (f", {share:.0%} skipped" if share else ""),
            partial(decode_row, bench, rows, context, share),
        )
        for rows, context, share in full + nested
    ]


def decode_row(bench: Bench, rows: int, context: int, skip_ratio: float = 0.0) -> list[Row]:
    """The last decode steps of a context, head and sampling included, in one compiled loop as in a rollout.

    Args:
        bench: gives model and bandwidth.
        rows: each with a prompt of its own, so that none share their caches.
        context: tokens in the caches after the last step.
        skip_ratio: share of the layers that the steps skip.
    """
    model, half, steps = bench.policy("bfloat16").model, context // 2, bench.sizes.decode_steps
    plan = draw_plan(jax.random.key(0), NestingConfig(skip_ratio=skip_ratio), model.config.num_layers)
    ones = jnp.ones((rows, half), bool)
    # Keys and values of an empty cache may share a buffer, and one buffer cannot be donated twice.
    cache = jax.tree.map(jnp.copy, model.empty_cache(rows, 1, half, plan))
    prompt = PromptCache(jax.tree.map(lambda x: x[:, :, 0], cache), ones, jnp.zeros((rows, model.config.width)))
    read_bytes = _read_bytes(model, plan.shape.kept) + sum(
        leaf.nbytes for leaf in jax.tree.leaves((cache, prompt.layers))
    )
    key_B1, moving = row_keys(jax.random.key(0), jnp.arange(rows), 1), (jnp.ones((rows, 1), jnp.int32), cache)

    @partial(jax.jit, donate_argnums=1)
    def decode(model: Transformer, moving: Any, prompt: PromptCache) -> Any:
        def step(number: jax.Array, moving: Any) -> Any:
            token_B1, cache = moving
            hidden_B1D, cache = model.decode(token_B1, number, cache, prompt, plan)
            uniform = row_uniforms(key_B1, number)
            return sample_token(uniform, model.logits(hidden_B1D), SamplingConfig())[0], cache

        return jax.lax.fori_loop(half - steps, half, step, moving)

    def call() -> None:
        nonlocal moving
        moving = jax.block_until_ready(decode(model, moving, prompt))

    # The first caches were given away by the first call; this name must not keep them.
    del cache
    found = timed(call, bench.sizes.repeats)
    step, floor = found["seconds"] / steps, read_bytes / bench.bandwidth
    named = {"rows": rows, "context": context, "skip_ratio": skip_ratio, "layers": plan.shape.kept}
    return [named | found | {"step_seconds": step, "floor_bytes": read_bytes, "share_of_floor": floor / step}]


def _read_bytes(model: Transformer, kept: int) -> int:
    """Bytes of the weights that a decode step reads: all but skipped layers and an embedding that is not the head too.

    Args:
        model: what decodes.
        kept: layers that run.
    """
    every, layers = (sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for part in (model, model.layers))
    skipped = layers // model.config.num_layers * (model.config.num_layers - kept)
    return every - skipped - (0 if model.head is None else model.embedding[...].nbytes)


def steps_compared(rows: list[Row]) -> list[Row]:
    """With how much faster nested steps are than those of all layers, alone and beside what their floors say."""
    full = {(row["rows"], row["context"]): row for row in rows if row.get("skip_ratio") == 0}

    def compared(row: Row) -> Row:
        base = full.get((row.get("rows"), row.get("context")))
        if base is None or not row["skip_ratio"]:
            return row
        gain = base["step_seconds"] / row["step_seconds"]
        return row | {"nested_gain": gain, "share_of_gain": gain / (base["floor_bytes"] / row["floor_bytes"])}

    return [compared(row) for row in rows]


def tail_jobs(bench: Bench) -> list[Job]:
    """Every precision and plan, in batches and by rows that are refilled."""
    return [
        Job(
            f"{precision}, {share:.0%} skipped, {'refilled' if refilled else 'batches'}",
            partial(tail_row, bench, precision, share, refilled),
        )
        for precision in bench.sizes.precisions
        for share in bench.sizes.skip_ratios
        for refilled in (False, True)
    ]


def tail_row(bench: Bench, precision: Precision, skip_ratio: float, refilled: bool) -> list[Row]:
    """Whole rollouts with long-tailed lengths; every call draws another plan of the same size."""
    sizes, model = bench.sizes, bench.policy(precision).model
    case = Case(PROMPTS_PER_ROW * sizes.tail_rows, 1, sizes.tail_prompt_tokens, sizes.tail_new_tokens, skip_ratio)
    length_N = long_tailed(case.prompts, sizes.tail_mean, case.new_tokens)
    sample, tokens = sampler(model, case, length_N, sizes.tail_rows, refilled), 0
    nesting = NestingConfig(skip_ratio=skip_ratio)
    plans = [draw_plan(jax.random.key(n), nesting, model.config.num_layers) for n in range(sizes.repeats + 1)]
    waiting = iter(plans)

    def call() -> None:
        nonlocal tokens
        tokens = int(lengths_of(sample(plan=next(waiting))).sum())

    found = timed(call, sizes.repeats)
    named = {"precision": precision, "skip_ratio": skip_ratio, "refilled": refilled, "layers": plans[0].shape.kept}
    return [named | found | {"tokens": tokens, "tokens_per_second": tokens / found["seconds"]}]


def tails_compared(rows: list[Row]) -> list[Row]:
    """With the speed beside that of batches, and beside that of the full model."""
    rates = {_tail_key(row): row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    return [
        row
        if "tokens_per_second" not in row
        else row
        | {
            "refill_gain": ratio(row["tokens_per_second"], rates.get(_tail_key(row | {"refilled": False}))),
            "nested_gain": ratio(row["tokens_per_second"], rates.get(_tail_key(row | {"skip_ratio": 0.0}))),
        }
        for row in rows
    ]


def _tail_key(row: Row) -> tuple[Any, ...]:
    return row["precision"], row["skip_ratio"], row["refilled"]


def exact_jobs(bench: Bench) -> list[Job]:
    """Plain and exact rollouts of every workload."""

    def measure_case(case: Case) -> list[Row]:
        plain = dataclasses.replace(case, skip_ratio=0.0)
        rows = exact_rows(bench.policy("bfloat16"), plain, [case], bench.sizes.repeats, draft_lengths=(2, 4))
        names = [f"{case.rows} rows, {row['variant']}" for row in rows]
        rates = [case.sampled_tokens / row["seconds"] for row in rows]
        return [
            row | {"case": name, "tokens_per_second": rate} for row, name, rate in zip(rows, names, rates, strict=True)
        ]

    return [Job(f"{case.rows} rows", partial(measure_case, case)) for case in bench.sizes.exact]


def update_jobs(bench: Bench) -> list[Job]:
    """One update of each workload, with products in bfloat16."""
    return [
        Job(f"{_workload(case)}, recomputes {remat}", partial(update_row, bench, case, remat))
        for case, remat in bench.sizes.updates
    ]


def update_row(bench: Bench, case: Case, remat: Literal["none", "full"]) -> list[Row]:
    """Updates of float32 weights; the floor has each product once forward and twice backward, recomputed or not."""
    bench.forget()
    task = dataclasses.replace(grpo_task(case, "bfloat16"), remat=remat)
    # The update takes over the buffers of its model, so each case has its own.
    state, base = initial(bench.weights("float32"), task)
    update, batch = make_update(task), train_batch(case, bench.config.vocab_size)

    def call() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(update(state, base, batch, UpdatePlans()))

    found, tokens = timed(call, bench.sizes.repeats), update_tokens(case, shared_prompt=True)
    bench.update_seconds[case] = found["seconds"]
    floor = sum(update_floor(bench.config, case, Ceilings(bench.bfloat16_rate, math.inf)).values())
    rates = {"tokens": tokens, "tokens_per_second": tokens / found["seconds"]}
    return [found | rates | {"share_of_rate": floor / found["seconds"]}]


def peer_jobs(bench: Bench) -> list[Job]:
    """Our rollouts and update, and those of transformers and torch on the same work, if they are there."""
    case, remat = bench.sizes.updates[0]

    def our_rollouts() -> list[Row]:
        call = rollout_call(bench.policy("bfloat16"), case)
        return [
            {"system": "ours", "kind": "rollouts"} | timed(lambda: jax.block_until_ready(call()), bench.sizes.repeats)
        ]

    def our_update() -> list[Row]:
        if case not in bench.update_seconds:
            update_row(bench, case, remat)
        return [{"system": "ours", "kind": "update", "seconds": bench.update_seconds[case]}]

    generate, update = System("transformers", "peer_transformers"), System("torch", "peer_torch_update")
    return [
        Job(f"our rollouts, {_workload(case)}", our_rollouts),
        Job(f"our update, {_workload(case)}", our_update),
        Job("transformers generate", partial(peer_row, bench, generate, "bfloat16, static cache", "rollouts", case)),
        Job("torch update", partial(peer_row, bench, update, "bfloat16", "update", case)),
    ]


def peer_row(bench: Bench, system: System, variant: str, kind: str, case: Case) -> list[Row]:
    """What a peer answers, with random weights in the same shape.

    Raises:
        Skipped: it is not installed beside us, fails or takes too long.
    """
    device = {"cpu": "cpu", "gpu": "cuda"}.get(bench.platform)
    if device is None:
        raise Skipped(f"torch runs on CPUs and GPUs here, and this is a {bench.platform}")
    if device == "cuda":
        # JAX holds most of the memory until its backend is gone; what comes after the peers starts another one.
        bench.forget()
        jax.clear_caches()
        clear_backends()
    with tempfile.TemporaryDirectory() as directory:
        write_json(Path(directory) / "config.json", config_to_huggingface(bench.config, jnp.dtype("bfloat16")))
        spec = Spec(variant, (case,), directory, "", bench.config.vocab_size, cores(), bench.sizes.repeats, device)
        (found,) = ask(system, spec, seconds=max(bench.seconds_left(), 1))
        return [{"system": system.title, "kind": kind} | found]


def peers_compared(rows: list[Row]) -> list[Row]:
    """With how many times longer others take than we do."""
    ours = {row["kind"]: row["seconds"] for row in rows if row.get("system") == "ours"}
    return [
        row | {"ours_ratio": ratio(row["seconds"], ours.get(row["kind"]))} if "seconds" in row else row for row in rows
    ]


def _workload(case: Case) -> str:
    return f"{case.prompts} x {case.group}, {case.prompt_tokens} + {case.new_tokens}"


PARTS = {
    "ceilings": Part(
        "the device's ceilings",
        ceiling_jobs,
        {"rate": _number("rate", ".2f"), "unit": lambda row: row["unit"]},
    ),
    "decode": Part(
        "decode steps in bfloat16, head and sampling included; the floor reads weights and caches once",
        decode_jobs,
        {
            "ms a step": _number("step_seconds", ".3f", 1e3),
            "floor GB": _number("floor_bytes", ".3f", 1e-9),
            "share of floor": _number("share_of_floor", ".2f"),
            "of all layers": _number("nested_gain", ".2f"),
            "of its floor's speed-up": _number("share_of_gain", ".2f"),
            **COSTS,
        },
        steps_compared,
    ),
    "rollouts": Part(
        "whole rollouts whose lengths have a long tail, each call under another plan",
        tail_jobs,
        {
            "layers": _number("layers", "d", 1),
            "tokens": _number("tokens", "d", 1),
            "s": _number("seconds", ".2f"),
            "tokens/s": _number("tokens_per_second", ".0f"),
            "of batches": _number("refill_gain", ".2f"),
            "of all layers": _number("nested_gain", ".2f"),
            **COSTS,
        },
        tails_compared,
    ),
    "exact": Part(
        "exact rollouts in bfloat16; with random weights the acceptance means nothing, what a round costs does",
        exact_jobs,
        {
            "tokens/s": _number("tokens_per_second", ".0f"),
            "accepted": _number("accepted", ".2f"),
            "a round in steps": _number("round_cost", ".2f"),
            "pays from": _number("pays_from", ".2f"),
            "first s": COSTS["first s"],
        },
    ),
    "updates": Part(
        "one update of float32 weights with products in bfloat16",
        update_jobs,
        {
            "tokens": _number("tokens", "d", 1),
            "s": _number("seconds", ".3f"),
            "tokens/s": _number("tokens_per_second", ".0f"),
            "share of matrix rate": _number("share_of_rate", ".2f"),
            **COSTS,
        },
    ),
    "peers": Part(
        "the same work by transformers and torch in bfloat16",
        peer_jobs,
        {"s": _number("seconds", ".3f"), "ours is faster": _number("ours_ratio", ".2f"), "first s": COSTS["first s"]},
        peers_compared,
    ),
}
"""In the order of their value."""
