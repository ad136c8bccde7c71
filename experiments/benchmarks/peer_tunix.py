"""Tunix: its own JAX `Sampler`, with temperature 1 over the full vocabulary."""

# It runs in an environment of its own, which the checker does not see.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors

from experiments.benchmarks.worker import Case, Spec, serve

CACHE_BLOCK = 32  # cache sizes are rounded up to it


class Numbers:
    """The tokenizer that Tunix wants, for prompts written as token ids; it adds nothing and costs nothing."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is added

    def eos_id(self) -> int:
        return -1  # never drawn, so that nothing stops early

    def pad_id(self) -> int:
        return -1  # prompts are equally long: never fed


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: the sampler's whole answer.

    Args:
        spec: names the variant, the weights and the threads.
    """
    settings = json.loads(Path(spec.directory, "config.json").read_text())
    head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    config = ModelConfig(
        num_layers=settings["num_hidden_layers"],
        vocab_size=settings["vocab_size"],
        embed_dim=settings["hidden_size"],
        hidden_dim=settings["intermediate_size"],
        num_heads=settings["num_attention_heads"],
        head_dim=head_dim,
        num_kv_heads=settings["num_key_value_heads"],
        rope_theta=100_000,  # its model applies one of its own, whatever stands here
        norm_eps=settings["rms_norm_eps"],
        weight_tying=settings["tie_word_embeddings"],
    )
    model = create_model_from_safe_tensors(spec.directory, config, dtype=jnp.dtype(spec.variant))

    def make_call(case: Case) -> Callable[[], Any]:
        needed = case.prompt_tokens + case.new_tokens
        cache_size = -(-needed // CACHE_BLOCK) * CACHE_BLOCK
        sampler = Sampler(
            model, Numbers(), CacheConfig(cache_size, config.num_layers, config.num_kv_heads, config.head_dim)
        )
        # Its sampler knows no groups, so each prompt is given once per completion.
        prompts = [" ".join(map(str, ids)) for ids in case.prompt_ids(spec.vocab_size) for _ in range(case.group)]

        def call() -> None:
            output = sampler(
                prompts,
                max_generation_steps=case.new_tokens,
                max_prompt_length=case.prompt_tokens,
                eos_tokens=[-1],
                temperature=1.0,
                top_p=1.0,
            )
            assert sum(len(row) for row in output.tokens) == case.sampled_tokens

        return call

    return make_call


if __name__ == "__main__":
    serve(prepare)
