"""The accelerator's benchmark on a tiny shape: every case has a row, and what has none says why."""

import dataclasses
import json
import re

import jax
import pytest

from experiments.benchmarks import accelerator
from experiments.benchmarks.accelerator import job_rows, part_rows
from experiments.benchmarks.accelerator_parts import PARTS, SMALL, SMALL_SHAPE, Bench, Job, Part

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
    assert [row["case"] for row in found["decode"]] == ["2 rows, context 8", "2 rows, context 16"]
    # 2 rows x 8 more tokens x 10 layers x keys and values x 2 heads of 16 numbers of 2 bytes
    short, long = (row["floor_bytes"] for row in found["decode"])
    assert long - short == 2 * 8 * 10 * 2 * 2 * 16 * 2
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


def test_what_the_time_does_not_allow_is_named(tiny, tmp_path, capsys):
    assert accelerator.main([*COMMAND, str(tmp_path / "kept.json"), "--minutes", "1e-9"]) == 0
    found = cases(tmp_path / "kept.json")
    assert [len(rows) for rows in found.values()] == [4, 2, 4]
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


def test_a_cpu_is_told_to_take_the_small_shape(capsys):
    assert accelerator.main([]) == 2
    assert "use --small" in capsys.readouterr().err
