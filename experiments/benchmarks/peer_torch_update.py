"""A plain GRPO step with transformers and torch: every row runs its whole sequence."""

# It runs in an environment of its own, which the checker does not see.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from experiments.benchmarks.peer_models import model_of
from experiments.benchmarks.worker import Case, Spec, serve

CLIP = 0.2


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: one step of AdamW on all rows.

    Args:
        spec: names the variant, the weights and the threads.
    """
    model = model_of(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)

    def make_call(case: Case) -> Callable[[], Any]:
        prompts = torch.tensor(case.prompt_ids(spec.vocab_size), device=spec.device)
        prompts = prompts.repeat_interleave(case.group, dim=0)
        completions = torch.tensor(case.completion_ids(spec.vocab_size), device=spec.device)
        sequences = torch.cat([prompts, completions], dim=1)
        advantage = torch.where(torch.arange(case.rows, device=spec.device) % 2 == 1, 1.0, -1.0)[:, None]
        behavior_logprob = torch.full(completions.shape, -10.0, device=spec.device)

        def call() -> None:
            logits = model(sequences, use_cache=False, logits_to_keep=case.new_tokens + 1).logits[:, :-1]
            logprob = torch.log_softmax(logits.float(), dim=-1).gather(-1, completions[..., None])[..., 0]
            weight = torch.exp(logprob - behavior_logprob)
            clipped = weight.clamp(1 - CLIP, 1 + CLIP)
            loss = -torch.minimum(weight * advantage, clipped * advantage).mean(dim=1).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert torch.isfinite(loss)

        return call

    return make_call


if __name__ == "__main__":
    serve(prepare)
