"""The benchmark of refilled rows: its lengths, what it compares, and when it fails."""

from experiments.benchmarks.refill import alone_lines, refill_table, too_different
from experiments.benchmarks.worker import Case


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


def test_what_alone_found_is_told_once():
    rows = [measured(None, 1, "batches that shrink"), measured(0, 1)]
    assert alone_lines(rows) == ["16 rows: 1 of 8 completions differ from those of rows alone"]
    assert alone_lines([measured(0)]) == []


def test_the_first_variant_is_not_compared_with_itself():
    lines = refill_table([measured(None, variant="batches that shrink"), measured(0)]).splitlines()
    assert [line.split()[-3] for line in lines[-2:]] == ["-", "0"]  # before first s and peak GB
