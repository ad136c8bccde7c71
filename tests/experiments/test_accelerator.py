"""The accelerator's benchmark on a tiny shape: every case has a row, and what has none says why."""

import dataclasses
import json
import re

import jax
import pytest

from experiments.benchmarks import accelerator, accelerator_parts
from experiments.benchmarks.accelerator import job_rows, part_rows
from experiments.benchmarks.accelerator_parts import (
    PARTS,
    SMALL,
    SMALL_SHAPE,
    Bench,
    Job,
    Part,
    peers_compared,
    steps_compared,
    tails_compared,
)
from experiments.benchmarks.worker import Case

TINY = dataclasses.replace(
    SMALL,
    floats=2**12,
    matrix=8,
    decode_rows=(2,),
    contexts=(8, 16),
    tail_rows=2,
    tail_new_tokens=6,
    tail_mean=3,
    precisions=("int8",),
    exact=(Case(1, 2, 4, 4, 0.1),),
    updates=((Case(1, 2, 4, 4), "full"),),
    repeats=1,
)
COMMAND = ["--small", "--parts", "ceilings", "decode", "rollouts", "--json"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(accelerator, "SMALL", TINY)


def cases(path) -> dict[str, list[dict]]:
    return json.loads(path.read_text())["parts"]


@pytest.mark.slow
def test_every_case_has_its_figures(tiny, tmp_path, capsys):
    assert accelerator.main([*COMMAND, str(tmp_path / "kept.json")]) == 0
    found = cases(tmp_path / "kept.json")
    assert not [row for rows in found.values() for row in rows if "skipped" in row]
    assert [row["case"] for row in found["ceilings"]] == ["copy", "read", "bfloat16 products", "float32 products"]
    assert all(row["rate"] > 0 for row in found["ceilings"])
    names = ["2 rows, context 8", "2 rows, context 16", "2 rows, context 8, 33% skipped"]
    assert [row["case"] for row in found["decode"]] == names
    # 2 rows x 8 more tokens x 10 layers x keys and values x 2 heads of 16 numbers of 2 bytes
    short, long, nested = (row["floor_bytes"] for row in found["decode"])
    assert long - short == 2 * 8 * 10 * 2 * 2 * 16 * 2
    # Three layers of 2 norms in float32, 2 x 64 x 64 + 2 x 64 x 32 of attention and 3 x 64 x 128 of the MLP in two
    # bytes, and their caches
    assert short - nested == 3 * (4 * 2 * 64 + 2 * (12288 + 24576) + 2 * 8 * 2 * 2 * 16 * 2)
    assert found["decode"][2]["layers"] == 7 and found["decode"][2]["share_of_gain"] > 0
    assert [row["case"] for row in found["rollouts"]] == [
        f"int8, {share} skipped, {how}" for share in ("0%", "33%") for how in ("batches", "refilled")
    ]
    # Every call has another plan of the same size.
    assert [row["layers"] for row in found["rollouts"]] == [10, 10, 7, 7]
    assert [row["compilations_later"] for row in found["rollouts"]] == [0] * 4
    assert all(row["tokens"] >= 10 and row["nested_gain"] and row["refill_gain"] for row in found["rollouts"])
    printed = capsys.readouterr().out
    assert re.match(r"cpu, JAX [\d.]+, commit \w+", printed)
    assert all(PARTS[name].title in printed for name in found)


@pytest.mark.slow
def test_exact_rollouts_updates_and_peers_have_their_figures(tiny, tmp_path, monkeypatch):
    # A peer that takes three seconds, instead of one that must be installed.
    asked = []
    monkeypatch.setattr(
        accelerator_parts, "ask", lambda system, spec, seconds: asked.append(spec) or [{"seconds": 3.0}]
    )
    path = tmp_path / "kept.json"
    assert accelerator.main(["--small", "--parts", "exact", "updates", "peers", "--json", str(path)]) == 0
    found = cases(path)
    assert not [row for rows in found.values() for row in rows if "skipped" in row]
    assert [row["case"] for row in found["exact"]] == [
        f"2 rows, {how}" for how in ("plain", "exact, 2 drafts", "exact, 4 drafts")
    ]
    assert all(row["tokens_per_second"] == 8 / row["seconds"] for row in found["exact"])
    # 4 tokens of the prompt, once, and 2 x 3 of the completions
    (update,) = found["updates"]
    assert update["tokens"] == 10 and update["share_of_rate"] > 0
    ours, theirs = found["peers"][:2], found["peers"][2:]
    assert [row["kind"] for row in ours] == [row["kind"] for row in theirs] == ["rollouts", "update"]
    assert ours[1]["seconds"] == update["seconds"]
    assert [row["ours_ratio"] for row in theirs] == [3.0 / row["seconds"] for row in ours]
    assert [(spec.cases, spec.device) for spec in asked] == [((Case(1, 2, 4, 4),), "cpu")] * 2


def test_nested_steps_are_compared_with_what_their_floor_promises():
    full = {"rows": 1, "context": 8, "skip_ratio": 0.0, "step_seconds": 3.0, "floor_bytes": 100}
    nested = full | {"skip_ratio": 0.5, "step_seconds": 2.0, "floor_bytes": 50}
    rows = steps_compared([full, {"case": "2 rows", "skipped": "no time was left"}, nested, nested | {"rows": 2}])
    # 1.5 times as fast, where half of the bytes promise 2; of the steps of two rows there is nothing to compare with
    assert [row.get("nested_gain") for row in rows] == [None, None, 1.5, None]
    assert [row.get("share_of_gain") for row in rows] == [None, None, 0.75, None]


def tail(rate: float, skip_ratio: float, refilled: bool) -> dict:
    return {"precision": "int8", "skip_ratio": skip_ratio, "refilled": refilled, "tokens_per_second": rate}


def test_rollouts_are_compared_with_batches_and_with_all_layers():
    failed = {"case": "int8, 10% skipped, batches", "skipped": "does not fit into memory"}
    rows = [tail(10, 0.0, False), tail(15, 0.0, True), tail(20, 0.33, False), failed, tail(12, 0.1, True)]
    found = tails_compared(rows)
    assert [row.get("refill_gain") for row in found] == [1.0, 1.5, 1.0, None, None]
    # 12 tokens by refilled rows are compared with 15, and not with 10
    assert [row.get("nested_gain") for row in found] == [1.0, 1.0, 2.0, None, 0.8]
    assert found[3] == failed


def test_peers_are_compared_with_our_row_of_their_kind():
    rows = [{"system": "ours", "kind": "rollouts", "seconds": 2.0}, {"case": "our update", "skipped": "no"}]
    rows += [{"system": "torch", "kind": kind, "seconds": 3.0} for kind in ("rollouts", "update")]
    assert [row.get("ours_ratio") for row in peers_compared(rows)] == [1.0, None, 1.5, None]


def test_what_the_time_does_not_allow_is_named(tiny, tmp_path, capsys):
    assert accelerator.main([*COMMAND, str(tmp_path / "kept.json"), "--minutes", "1e-9"]) == 1
    found = cases(tmp_path / "kept.json")
    assert [len(rows) for rows in found.values()] == [4, 3, 4]
    assert {row["skipped"] for rows in found.values() for row in rows} == {"no time was left"}
    printed = capsys.readouterr().out
    assert all(f"{row['case']}: no time was left" in printed for rows in found.values() for row in rows)


def test_results_are_kept_after_each_case_and_the_rest_is_skipped():
    left, kept = iter([9.0, 9.0, 1.0, 1.0, -1.0]), []
    bench = Bench(TINY, SMALL_SHAPE, None, lambda: next(left))
    part = Part("", lambda _: [Job(name, lambda: [{"rate": 1}]) for name in "abc"], {})
    part_rows(part, bench, lambda rows: kept.append([row["case"] for row in rows if "rate" in row]))
    assert kept == [["a"], ["a", "b"], ["a", "b"]]


def test_a_case_that_fails_is_a_line_and_not_the_end():
    bench = Bench(TINY, SMALL_SHAPE, None, lambda: 1.0)

    def fails(error: Exception) -> str:
        def measure():
            raise error

        (row,) = job_rows(Job("large", measure), bench)
        assert row["case"] == "large"
        return row["skipped"]

    assert fails(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) == "does not fit into memory"
    assert fails(TypeError("first\nsecond")) == "failed: TypeError: first"


def test_a_part_that_cannot_begin_is_a_line_and_not_the_end():
    def no_jobs(bench):
        raise MemoryError("the weights")

    kept = []
    bench = Bench(TINY, SMALL_SHAPE, None, lambda: 1.0)
    rows = part_rows(Part("Decode steps", no_jobs, {}), bench, kept.append)
    assert kept == [rows] == [[{"case": "Decode steps", "skipped": "failed: MemoryError: the weights"}]]


def test_a_cpu_is_told_to_take_the_small_shape(capsys):
    assert accelerator.main([]) == 2
    assert "use --small" in capsys.readouterr().err
