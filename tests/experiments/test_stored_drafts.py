"""Stored completions as drafts: what the rules keep, and why training on drafts makes the speculative rule inexact."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import stored_drafts
from experiments.stored_drafts import kept, main
from nested_reft.training.config import load_config


def test_what_is_kept_by_hand():
    """Two tokens with chances 1/2 and 1/2, and one with 1/4; padding has no chance of its own."""
    found = kept(np.array([[0.5, 0.5], [0.25, 0.0]]), np.array([[True, True], [True, False]]))
    assert found.tokens == pytest.approx((0.5 + 0.25 + 0.25) / 3) and found.whole == pytest.approx((0.25 + 0.25) / 2)


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_speculative_rule_is_exact_only_where_the_policy_does_not_depend_on_the_draft(is_trained):
    """One token of two, q = 1/2 each. Training on the draft x gives it p = 0.9; otherwise token 0 has 0.9.

    The mean of p(y) over outputs y should be that of a fresh sample, 0.9^2 + 0.1^2. Summed over all drafts, a token
    that was trained on has p > q, so it is always kept, and the mean is 0.9.
    """
    q, found = np.array([0.5, 0.5]), 0.0
    for x in range(2):
        liked = x if is_trained else 0
        p = np.where(np.arange(2) == liked, 0.9, 0.1)
        chance = min(1.0, p[x] / q[x])
        residual = np.maximum(p - q, 0)
        output = chance * np.eye(2)[x] + (1 - chance) * residual / max(residual.sum(), 1e-9)
        found += q[x] * output @ p
        # A token that is kept with its own probability, or else replaced by another, is exact for every draft.
        others = np.where(np.arange(2) == x, 0, p)
        matched = p[x] * np.eye(2)[x] + (1 - p[x]) * others / others.sum()
        assert matched == pytest.approx(p)
    assert found == pytest.approx(0.9 if is_trained else 0.82)


@pytest.mark.slow
def test_a_run_compares_both_sets_at_both_ages(tmp_path, capsys, monkeypatch):
    """Of a model that was warmed for two steps."""
    tiny = load_config("tiny")
    quick = dataclasses.replace(tiny, warm_start=dataclasses.replace(tiny.warm_start, steps=2))
    monkeypatch.setattr(stored_drafts, "load_config", lambda name: quick)
    arguments = ["--seeds", "0", "--starts", "0", "--ages", "1", "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0 and "not trained on" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert {each["set"] for each in found} == {"trained on", "not trained on"}
    for each in found:
        assert 0 < each["matched_whole"] < each["speculative_whole"] <= 1
        assert 0 < each["matched_tokens"] < each["speculative_tokens"] <= 1
