"""The benchmark of refilled rows: its lengths, what it compares, and when it fails."""

import json
from types import SimpleNamespace

import jax
import numpy as np

from experiments.benchmarks import refill
from experiments.benchmarks.accelerator_parts import SMALL_SHAPE
from experiments.benchmarks.refill import alone_lines, lengths_of, long_tailed, refill_table, sampler, too_different
from experiments.benchmarks.worker import Case
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer


def measured(differing: int | None, differing_alone: int | None = None, variant: str = "refilled rows") -> dict:
    """A row of the table, of 80 completions by 16 rows."""
    row = {"rows": 16, "case": Case(80, 1, 64, 512), "variant": variant, "differing": differing}
    row |= {"alone": 0 if differing_alone is None else 8, "differing_alone": differing_alone}
    row |= {"mean_length": 64.0, "longest": 512, "tokens": 5120, "first_seconds": 9.0, "peak_bytes": 1e9}
    return row | {"seconds": 2.0}


def test_a_tenth_may_differ_and_one_always_may():
    # 8 of 80 is a tenth; of the 8 alone a tenth is less than one.
    assert too_different([measured(None), measured(8, 1)]) == []
    assert too_different([measured(9, 2)]) == [
        "9 of 80 completions of refilled rows are others",
        "2 of 8 completions of rows alone are others",
    ]


def test_more_differences_than_ties_end_with_code_1_and_keep_the_figures(tmp_path, monkeypatch, capsys):
    path, found = tmp_path / "kept.json", [measured(None, variant="batches that shrink"), measured(9)]
    monkeypatch.setattr(refill, "prepare_process", lambda threads: None)
    monkeypatch.setattr(refill, "disturbance", lambda rows: "")
    monkeypatch.setattr(refill, "policy_of", lambda name: SimpleNamespace(model=None))
    monkeypatch.setattr(refill, "refill_rows", lambda *arguments: found)
    assert refill.main(["--rows", "16", "--json", str(path)]) == 1
    assert capsys.readouterr().err == "error: 9 of 80 completions of refilled rows are others\n"
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_more_prompts_alone_than_there_are_are_refused(capsys):
    assert refill.main(["--rows", "32", "2", "--alone", "11"]) == 2
    assert "--alone is 11; allowed is 0 to 10, the prompts of 2 rows" in capsys.readouterr().err


def test_what_alone_found_is_told_once():
    rows = [measured(None, 1, "batches that shrink"), measured(0, 1)]
    assert alone_lines(rows) == ["16 rows: 1 of 8 completions differ from those of rows alone"]
    assert alone_lines([measured(0)]) == []


def test_the_first_variant_is_not_compared_with_itself():
    lines = refill_table([measured(None, variant="batches that shrink"), measured(0)]).splitlines()
    assert [line.split()[-3] for line in lines[-2:]] == ["-", "0"]  # before first s and peak GB


def test_lengths_have_their_mean_and_their_longest():
    """Three of them are L x^2, L x and L for x = exp(-s z), of the spread s and the quantile z of 5/6.

    With L = 1200 and the mean 700, x^2 + x + 1 = 1.75, so x is a half. Normal lengths would be 200, 700 and 1200.
    """
    np.testing.assert_allclose(sorted(long_tailed(3, mean=700, longest=1200)), [300, 600, 1200], atol=1)
    many = long_tailed(80)
    assert many.max() == 512 and abs(many.mean() - 64) < 0.5 and list(many) != sorted(many)


def test_a_length_counts_the_token_that_stops():
    assert list(lengths_of(np.array([[5, 0, 0], [5, 6, 0], [0, 0, 0]]))) == [2, 3, 1]


def test_refilled_rows_and_batches_sample_the_lengths_that_are_asked_for():
    model = Transformer(SMALL_SHAPE, initial_parameters(SMALL_SHAPE, jax.random.key(0)))
    length_N, case = np.array([1, 6, 2, 4], np.int32), Case(4, 1, 4, 6)
    batches, refilled = (sampler(model, case, length_N, 2, refilled)() for refilled in (False, True))
    np.testing.assert_array_equal(lengths_of(batches), length_N)
    np.testing.assert_array_equal(refilled, batches)
