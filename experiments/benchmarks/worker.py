"""The loop of every timed program, ours or a peer's: spec in, timed calls, results out.

Workers run in environments of their own, so this module needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        prompts: B, all different.
        group: G, completions per prompt.
        prompt_tokens: P, of every prompt.
        new_tokens: C, of every completion; nothing stops earlier.
        skip_ratio: share of the layers that the rollout skips; ours alone.
        bridged: whether bridges stand in for them.
    """

    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    skip_ratio: float = 0.0
    bridged: bool = False

    @property
    def rows(self) -> int:
        """B * G."""
        return self.prompts * self.group

    @property
    def sampled_tokens(self) -> int:
        """Tokens that a rollout returns."""
        return self.rows * self.new_tokens

    def token_ids(self, vocab_size: int, rows: int, length: int) -> list[list[int]]:
        """Random token ids, the same for everybody; the first few, which are special tokens, left out."""
        draw = random.Random(f"{rows} {length}")
        return [[draw.randrange(100, vocab_size) for _ in range(length)] for _ in range(rows)]

    def prompt_ids(self, vocab_size: int) -> list[list[int]]:
        """The prompts `[B][P]`."""
        return self.token_ids(vocab_size, self.prompts, self.prompt_tokens)

    def completion_ids(self, vocab_size: int) -> list[list[int]]:
        """Completions for an update `[B * G][C]`."""
        return self.token_ids(vocab_size, self.rows, self.new_tokens)


@dataclass(frozen=True)
class Spec:
    """What a worker is asked for.

    Attributes:
        variant: what the worker calls it: a precision, or full fine-tuning or LoRA.
        cases: the workloads.
        directory: the weights in Hugging Face layout.
        gguf: the 4-bit weights, for who reads them.
        vocab_size: V.
        threads: of every system alike.
        repeats: timed calls of each case, after one that may compile.
        device: of torch.
    """

    variant: str
    cases: tuple[Case, ...]
    directory: str
    gguf: str
    vocab_size: int
    threads: int
    repeats: int
    device: str = "cpu"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        fields = json.loads(text)
        return cls(**fields | {"cases": tuple(Case(**case) for case in fields["cases"])})


def measure(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of the first call, which may compile, and the best of `repeats` more; peak memory of them all.

    `others_cpu` is the number of cores that other programs kept busy during the best call.
    """
    return measure_all([call], repeats)[0]


def measure_all(
    calls: Sequence[Callable[[], Any]], repeats: int, observe: Callable[[], dict[str, Any]] = dict
) -> list[dict[str, Any]]:
    """`measure` of several calls, in turn: a slow minute of the machine falls on all of them alike.

    Args:
        calls: what to time.
        repeats: rounds after the first.
        observe: amounts since it was last asked, added up over each call's rounds.
    """
    found: list[dict[str, Any]] = [{"all_seconds": [], "all_others_cpu": [], "peak_bytes": 0} for _ in calls]
    for _ in range(repeats + 1):
        for result, call in zip(found, calls, strict=True):
            reset_peak_memory()
            observe()
            busy, own = busy_cpu_seconds(), time.process_time()
            result["all_seconds"].append(_seconds(call))
            # What the machine worked beyond this process is the others' share.
            others = busy_cpu_seconds() - busy - (time.process_time() - own)
            result["all_others_cpu"].append(max(0.0, others) / result["all_seconds"][-1])
            result["peak_bytes"] = max(result["peak_bytes"], peak_memory())
            for name, amount in observe().items():
                result[name] = result.get(name, 0) + amount
    for result in found:
        # The first round may compile, so it is told apart and never counts as the best.
        result["first_seconds"] = result["all_seconds"].pop(0)
        result["all_others_cpu"].pop(0)
        result["seconds"], result["others_cpu"] = min(zip(result["all_seconds"], result["all_others_cpu"], strict=True))
    return found


def busy_cpu_seconds() -> float:
    """Seconds that all cores together have worked since the machine started; 0 where the system does not say."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    except (OSError, ValueError):
        return 0.0
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def reset_peak_memory() -> None:
    """Lets `peak_memory` start anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> int:
    """Most bytes that this process has had in memory at once."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(
    prepare: Callable[[Spec], Callable[[Case], Callable[[], Any]]],
    observe: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Reads a spec from standard input, times its cases, writes the results to the file in `argv[1]`.

    Args:
        prepare: loads the model, and returns what makes a case's call; the call waits for its result.
        observe: as in `measure_all`.
    """
    spec = Spec.from_json(sys.stdin.read())
    make_call = prepare(spec)
    results = measure_all([make_call(case) for case in spec.cases], spec.repeats, observe)
    Path(sys.argv[1]).write_text(json.dumps(results))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
