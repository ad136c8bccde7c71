"""llama.cpp: decode steps of many sequences at once through `llama_batch`; no token is drawn."""

# It runs in an environment of its own, which the checker does not see.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp

from experiments.benchmarks.worker import Case, Spec, serve


def prepare(spec: Spec) -> Callable[[Case], Callable[[], Any]]:
    """What makes the timed call of a case: the decode steps alone, after the prompts.

    Args:
        spec: names the variant, the weights and the threads.
    """
    model = _load(spec.gguf, extra_buffers=_extra_buffers_work(spec.gguf))

    def make_call(case: Case) -> Callable[[], Any]:
        context = _context(model, case, spec.threads)
        memory = llama_cpp.llama_get_memory(context)
        rows, start = range(case.rows), case.prompt_tokens
        # The prompts run once, outside the clock: each call below goes back to where they end.
        for prompt, ids in enumerate(case.prompt_ids(spec.vocab_size)):
            for row in range(prompt * case.group, (prompt + 1) * case.group):
                _decode(context, ids, range(start), [row] * start, wants_logits=False)
        tokens = case.completion_ids(spec.vocab_size)

        def call() -> None:
            llama_cpp.llama_memory_seq_rm(memory, -1, start, -1)  # back to the prompts
            for step in range(case.new_tokens):
                _decode(context, [row[step] for row in tokens], [start + step] * case.rows, rows, wants_logits=True)

        return call

    return make_call


def _load(gguf: str, extra_buffers: bool) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = extra_buffers
    model = llama_cpp.llama_model_load_from_file(gguf.encode(), params)
    assert model, "llama.cpp cannot load the model"
    return model


def _extra_buffers_work(gguf: str) -> bool:
    """Tries weights laid out for AMX in a child: some virtual machines announce AMX and fault on its use."""
    child = os.fork()
    if child == 0:
        try:
            case = Case(prompts=1, group=1, prompt_tokens=32, new_tokens=1)
            context = _context(_load(gguf, extra_buffers=True), case, threads=1)
            _decode(context, range(100, 132), range(32), [0] * 32, wants_logits=True)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _context(model: Any, case: Case, threads: int) -> Any:
    """A context with a cache of its own for each row, as llama.cpp advises where no long prefix is shared."""
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = case.rows
    params.n_ctx = case.rows * (case.prompt_tokens + case.new_tokens)
    params.n_batch = params.n_ubatch = max(case.rows, case.prompt_tokens)
    params.n_threads = params.n_threads_batch = threads
    params.kv_unified = False
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "llama.cpp cannot make a context"
    return context


def _decode(
    context: Any, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wants_logits: bool
) -> None:
    """Runs one token of each sequence, or a prompt of one, and waits for its logits."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences, strict=True)):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    failed = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_synchronize(context)
    llama_cpp.llama_batch_free(batch)
    assert not failed, f"llama_decode answered {failed}"


if __name__ == "__main__":
    serve(prepare)
