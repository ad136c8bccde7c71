"""The long run that is to leave nothing behind: a few of its steps."""

import json
from pathlib import Path

import pytest

from experiments.endurance import main


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_row_at_the_beginning_and_at_each_quarter(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["--backend", "inline", "--steps", "4", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Two batches are under way when a step ends, whoever searches.
    assert all(row["memory (MB)"] > 50 and row["batches under way"] == 2 for row in rows)
    assert "open files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; allowed is a whole number from 1"),
        (["--backend", "dask"], "invalid choice: 'dask'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
