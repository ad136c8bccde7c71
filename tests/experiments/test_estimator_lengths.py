"""The experiment on longer completions, at its shortest."""

import json

import pytest

from experiments import estimator_lengths
from experiments.estimator_lengths import ESTIMATORS, main
from nested_reft.verification.enumeration import EXACT


@pytest.mark.slow
def test_what_is_exact_is_so_at_any_length(tmp_path, capsys):
    """The sequence weight and no other; the error by hand from its two parts."""
    main(["--lengths", "1", "2", "--json", str(tmp_path / "lengths.json")])
    for result in json.loads((tmp_path / "lengths.json").read_text()):
        found = result["estimators"]
        assert list(found) == list(ESTIMATORS) and found["sequence"][0] < EXACT
        # A completion of one token has no prefix and nothing to follow, so every level is the same.
        same = result["max_tokens"] == 1
        assert (found["token"][0] < EXACT) == same and (found["geometric"][0] < EXACT) == same
        assert found["one"][0] > 0.05
    direction, noise = found["one"]
    error = (direction**2 + noise**2 / estimator_lengths.COMPLETIONS) ** 0.5
    assert f"{error:.2f} ({direction:.2f} / {noise:.1f})" in capsys.readouterr().out
