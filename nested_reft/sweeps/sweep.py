"""A whole sweep: its runs are trained where they are not kept, and then compared task by task."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_reft.json_files import differences, read_json_object, write_json
from nested_reft.run_directory import versions
from nested_reft.sweeps.comparison import by_task, comparison_table, draw_comparison, field_table, summarise
from nested_reft.sweeps.kept import Result, Wanted, kept_runs
from nested_reft.sweeps.results import OUTCOMES, is_whole, run_result
from nested_reft.sweeps.runs import FAILURES, trained_run
from nested_reft.training.interrupts import asked_for, stop_if, stop_requests
from nested_reft.untrusted import BadFile

MANIFEST = "sweep.json"  # the runs of the latest sweep in a folder, by which `nested-reft compare` finds results


@dataclass(frozen=True)
class Missing:
    """A run without a result.

    Attributes:
        run: its label and seed in words.
        reason: why.
    """

    run: str
    reason: str


def run_sweep(wanted: Sequence[Wanted], out: Path, only_kept: bool = False) -> tuple[list[Result], list[Missing]]:
    """The results of all runs of a sweep.

    A run that fails is named, and the others go on. Ctrl-C ends the run in progress with a checkpoint; the next call
    continues it.

    Args:
        wanted: the runs, of `grid`.
        out: the folder of the sweep.
        only_kept: compute nothing.

    Raises:
        KeyboardInterrupt: it was asked to stop.
    """
    failed = dict[str, str]()

    def compute(each: Wanted) -> Result | None:
        try:
            path = trained_run(each.config, out)
        except FAILURES as error:
            failed[str(each.file)] = " ".join(str(error).split())
            return None
        finally:
            # The trainer of a run holds its model in cycles, and the next one needs the memory.
            gc.collect()
        return {"config": each.config.to_json()} | run_result(path)

    if not only_kept:
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(wanted, out)
    with stop_requests() as stopped:
        found = kept_runs(wanted, compute, _told, lambda: stop_if(asked_for(stopped())), only_kept, is_whole)
    missing = [
        Missing(in_words(each.labels), failed.get(str(each.file), "it has not been computed"))
        for each, result in zip(wanted, found, strict=True)
        if result is None
    ]
    return _by_variant([result for result in found if result is not None], [each.labels for each in wanted]), missing


def _by_variant(results: Sequence[Result], asked: Sequence[dict[str, Any]]) -> list[Result]:
    """Results in the order in which variants were asked for, whichever runs are missing: the first is the baseline."""
    order = list(dict.fromkeys(labels["label"] for labels in asked))
    return sorted(results, key=lambda result: order.index(result["label"]))


def in_words(labels: dict[str, Any]) -> str:
    """What a run is called.

    Args:
        labels: its `label` and `seed`.
    """
    return f"{labels['label']}, seed {labels['seed']}"


def _told(result: Result) -> str:
    known = [(OUTCOMES[name], value) for name, value in result["measures"].items() if name in OUTCOMES]
    return ", ".join(f"{measure.title} {value:.{measure.digits}f}" for measure, value in known if value is not None)


def write_manifest(wanted: Sequence[Wanted], out: Path) -> None:
    """Writes which runs a sweep has, and where their results are.

    Args:
        wanted: the runs.
        out: the folder of the sweep.
    """
    runs = [each.labels | {"result": str(each.file.relative_to(out))} for each in wanted]
    write_json(out / MANIFEST, {"runs": runs, "versions": versions()})


def read_sweep(out: Path) -> tuple[list[Result], list[Missing]]:
    """The kept results of a sweep folder, and what it lacks.

    Args:
        out: the folder.

    Raises:
        BadFile: its manifest is damaged.
    """
    found, missing = list[Result](), list[Missing]()
    for entry in _entries(out):
        labels = {name: entry[name] for name in ("label", "seed")}
        try:
            result = read_json_object(out / entry["result"])
        except BadFile:
            result = {"damaged": True}
        if not result:
            missing.append(Missing(in_words(labels), "it has not been computed"))
        # A damaged result is one that is missing.
        elif not is_whole(result):
            missing.append(Missing(in_words(labels), f"'{out / entry['result']}' cannot be read"))
        else:
            found.append(result | labels)
    return _by_variant(found, _entries(out)), missing


def _entries(out: Path) -> list[dict[str, Any]]:
    """The runs that a manifest names.

    Raises:
        BadFile: it is damaged, or names a file outside of its folder.
    """
    entries = read_json_object(out / MANIFEST).get("runs")
    kinds = {"label": str, "seed": int, "result": str}
    for entry in entries if isinstance(entries, list) else [None]:
        if not isinstance(entry, dict) or any(type(entry.get(name)) is not kind for name, kind in kinds.items()):
            raise BadFile(f"'{out / MANIFEST}' is damaged; repeat the sweep, which computes no run again")
        if not (out / entry["result"]).resolve().is_relative_to(out.resolve()):
            raise BadFile(f"'{out / MANIFEST}' names a file outside of its folder; repeat the sweep")
    assert isinstance(entries, list)
    return entries


def changes(wanted: Sequence[Wanted], out: Path) -> str:
    """How the runs that are asked for differ from those of the sweep that the folder holds; empty where they do not.

    Args:
        wanted: the runs.
        out: the folder of the sweep.

    Raises:
        BadFile: its manifest is damaged.
    """
    if not (out / MANIFEST).is_file():
        return ""
    before = {(entry["label"], entry["seed"]): entry["result"] for entry in _entries(out)}
    other = [each for each in wanted if before.get(_key(each)) not in (None, str(each.file.relative_to(out)))]
    if not other:
        return ""
    fields = list[str]()
    for each in other:
        try:
            stored = read_json_object(out / before[_key(each)]).get("config")
        except BadFile:
            continue
        if isinstance(stored, dict):
            changed = differences(stored, each.config.to_json())
            fields += [f"{name} was {was!r} and is {now!r}" for name, was, now in changed if name != "name"]
    listed = "; ".join(list(dict.fromkeys(fields))[:5])
    return (
        f"the configuration of {len(other)} runs has changed since '{out}' was swept{f': {listed}' if listed else ''}."
        " The earlier results stay there, and are not used"
    )


def _key(each: Wanted) -> tuple[str, int]:
    return each.labels["label"], each.labels["seed"]


def compare(
    results: Sequence[Result], measure: str | None, target: float | None, figure: Path | None
) -> tuple[str, dict[str, Any], str | None]:
    """Tables of each task, and a figure of all.

    Args:
        results: with `label`, `seed` and `config`.
        measure: one of `OUTCOMES`; None takes the first that all runs of a task have.
        target: accuracy to which seconds are counted, or None.
        figure: the PNG file; None draws none.

    Returns:
        The text; JSON-able summaries by task, each with the `fields` in which its variants differ; and why there is no
        figure, or None.

    Raises:
        ValueError: a run lacks the measure.
    """
    tasks = {task: (own, summarise(own, measure, target)) for task, own in by_task(results).items()}
    parts = list[str]()
    if len(tasks) > 1:
        parts.append(
            f"These runs are of {len(tasks)} tasks, which have a table each, since their outcomes cannot be compared:"
            f" {'; '.join(tasks)}."
        )
    for task, (own, summary) in tasks.items():
        words = f"{task}: compared with {own[0]['label']}, paired by seed"
        parts += [f"{words}\n\n{comparison_table(summary)}", field_table(own)]
    commits = {str(result["versions"].get("commit")): None for result in results}
    if len(commits) > 1:
        listed = ", ".join(commit[:12] for commit in commits)
        parts.append(f"warning: these runs are of {len(commits)} commits: {listed}")
    no_figure = None
    if figure is not None:
        try:
            draw_comparison(tasks, figure)
        except ImportError as error:
            no_figure = str(error)
    return "\n\n".join(filter(None, parts)), {task: summary for task, (_, summary) in tasks.items()}, no_figure
