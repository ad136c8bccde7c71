"""Hugging Face transformers on torch: `generate`, with a group as `num_return_sequences`."""

# It runs in an environment of its own, which the checker does not see.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.peer_models import model_of
from experiments.benchmarks.worker import Case, Spec, serve


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: one `generate` of all rows.

    Args:
        spec: names the variant, the weights and the threads.
    """
    model = model_of(spec).eval()
    static = {"cache_implementation": "static"} if spec.variant.endswith("static cache") else {}
    model.generation_config.eos_token_id = None  # nothing stops early

    def make_call(case: Case) -> Callable[[], Any]:
        prompts = torch.tensor(case.prompt_ids(spec.vocab_size), device=spec.device)

        def call() -> None:
            with torch.inference_mode():
                tokens = model.generate(
                    input_ids=prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=case.new_tokens,
                    num_return_sequences=case.group,
                    pad_token_id=0,
                    **static,
                ).cpu()  # a GPU may still be at work
            assert tokens.shape == (case.rows, case.prompt_tokens + case.new_tokens)

        return call

    return make_call


if __name__ == "__main__":
    serve(prepare)
