"""What the benchmark commands share: options, the weights that everybody loads, tables."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from experiments.arguments import add_json, add_list, experiment_parser
from experiments.benchmarks.peers import PEERS_DIRECTORY, Skipped, System, ask
from experiments.benchmarks.worker import Case, Spec
from nested_reft.backends import cores
from nested_reft.cli.arguments import keep_json, whole
from nested_reft.cli.bad_input import BadInput
from nested_reft.command import restart_with_huge_pages
from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.models.registry import load_model, model_shape, resolve_model
from nested_reft.run_directory import versions

MODEL = "smollm2-135m"
DISTURBED = 0.1  # cores that other programs may use


def parser(name: str, doc: str | None, peers: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        name: of the benchmark's module.
        doc: of the module, which the help shows.
        peers: systems that it can compare with.
    """
    found, names = experiment_parser(f"benchmarks.{name}", doc), list(peers)
    if names:
        add_list(found, "--peers", names, nargs="*", choices=names, help="systems to compare with")
    found.add_argument("--threads", type=whole(1), default=2, help="of every system alike")
    found.add_argument("--repeats", type=whole(1), default=3, help="timed calls of each case; the best counts")
    add_json(found)
    return found


def exported_model() -> tuple[ModelConfig, str, str]:
    """The model's shape, its directory in Hugging Face layout (written once, and whole), and its 4-bit file.

    Raises:
        BadInput: the model is not there, or cannot be written.
    """
    directory = PEERS_DIRECTORY / "weights" / MODEL
    try:
        if not directory.is_dir():
            print(f"writing {MODEL} for all systems to {directory.relative_to(PEERS_DIRECTORY.parent)}", flush=True)
            model, tokenizer = load_model(MODEL)
            save_huggingface(model, directory, tokenizer)
        return model_shape(MODEL), str(directory), resolve_model(MODEL).location
    except OSError as error:
        raise BadInput(str(error)) from None


def prepare_process(threads: int) -> None:
    """What the workers run under, for this process: huge pages, the CPU, and so many cores, which JAX then takes."""
    if threads > cores():
        raise BadInput(f"--threads is {threads}; allowed is 1 to {cores()}, the cores that this process may use")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    restart_with_huge_pages()
    jax.config.update("jax_platforms", "cpu")


def spec_maker(known: argparse.Namespace) -> tuple[ModelConfig, Callable[[str, Sequence[Case]], Spec]]:
    """The model's shape, and `spec(variant, cases)` under the command's options.

    Args:
        known: the parsed options.
    """
    prepare_process(known.threads)
    shape, directory, gguf = exported_model()

    def spec(variant: str, cases: Sequence[Case]) -> Spec:
        return Spec(variant, tuple(cases), directory, gguf, shape.vocab_size, known.threads, known.repeats)

    return shape, spec


def measured(system: System, spec: Spec) -> list[dict[str, Any]]:
    """One row per case: what the system answered, or why it is skipped.

    Args:
        system: whom to ask.
        spec: what to ask.
    """
    named = [{"system": system.title, "variant": spec.variant, "case": case} for case in spec.cases]
    print(f"{system.title}, {spec.variant}: {len(named)} cases", flush=True)
    try:
        answers = ask(system, spec)
    except Skipped as reason:
        print(f"{system.title}, {spec.variant}: skipped: {reason}", flush=True)
        answers = [{"skipped": str(reason)}] * len(named)
    return [name | answer for name, answer in zip(named, answers, strict=True)]


def shown(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def cost_cells(row: dict[str, Any]) -> list[str]:
    """Seconds of the first call, of compilations and their number, and peak memory in GB."""
    compiled = f"{row['compile_seconds']:.1f} ({row['compilations']})" if "compilations" in row else "-"
    return [f"{row['first_seconds']:.1f}", compiled, f"{row['peak_bytes'] / 1e9:.1f}"]


def plain(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as JSON can hold them."""
    return [row | {"case": dataclasses.asdict(row["case"])} for row in rows]


def disturbance(rows: Iterable[dict[str, Any]]) -> str:
    """A line that says which best calls shared the machine with other programs; empty where none did."""
    spoiled = [row for row in rows if row.get("others_cpu", 0) > DISTURBED]
    if not spoiled:
        return ""
    worst = max(row["others_cpu"] for row in spoiled)
    names = ", ".join(dict.fromkeys(f"{row['system']} {row['variant']}" for row in spoiled))
    return f"disturbed: other programs used up to {worst:.1f} cores during the best calls of {names}; run it again"


def write_results(known: argparse.Namespace, results: dict[str, Any]) -> None:
    """Writes the results with the options and versions that made them, if a file is asked for.

    Args:
        known: the parsed options.
        results: JSON-able.
    """
    keep_json(known.json, {"versions": versions(), "arguments": vars(known) | {"json": str(known.json)}} | results)
