"""Five claims: what an interval says of one, and that each is measured on pairs of its experiment's runs."""

import pytest

from experiments import claims
from experiments.claims import CLAIMS, Finding, draw, findings_table, main, verdict_of


def finding(low: float, high: float, bound: float = 0.0, above: bool = True, claim: str = "dump") -> Finding:
    return Finding(claim, "x", 5, (low + high) / 2, (low, high), bound, above)


@pytest.mark.parametrize(
    ("one", "verdict"),
    [
        (finding(0.1, 0.2), "holds"),
        (finding(-0.1, 0.2), "open here"),
        (finding(-0.2, -0.1), "does not hold here"),
        (finding(0.1, 0.2, bound=0.3, above=False), "holds"),
        (finding(0.1, 0.4, bound=0.3, above=False), "open here"),
        (finding(0.4, 0.5, bound=0.3, above=False), "does not hold here"),
        (finding(-0.01, 0.01, bound=-0.02), "holds"),  # kept within the margin
    ],
)
def test_an_interval_decides(one, verdict):
    assert one.verdict == verdict


def test_a_claim_holds_where_all_of_it_does():
    holds, is_open, fails = finding(1, 2), finding(-1, 2), finding(-2, -1)
    assert verdict_of([holds, holds]) == "holds" and verdict_of([]) == "not run"
    assert verdict_of([holds, fails]) == verdict_of([holds, is_open]) == "partly"
    assert verdict_of([fails, is_open]) == "does not hold here" and verdict_of([is_open]) == "open here"


def test_parts_of_dapo_are_compared_with_the_row_above(monkeypatch, tmp_path):
    """Each part adds 0.1 in seed 0 and 0.2 in seed 1; seed 2 has the first variant alone and is in no pair.

    Two seeds decide nothing.
    """
    runs = [
        {"variant": name, "seed": seed, "accuracy": [[0.0, 0.0], [0.1 * (seed + 1) * index] * 2]}
        for index, name in enumerate(claims.dapo.VARIANTS)
        for seed in (0, 1)
    ]
    runs.append(runs[0] | {"seed": 2})
    monkeypatch.setattr(claims.dapo, "runs_of", lambda *_: runs)
    found = claims.parts_of_dapo((0, 1, 2), tmp_path, True)
    assert [each.what.split(":")[0] for each in found] == list(claims.dapo.VARIANTS[1:])
    assert [each.value for each in found] == pytest.approx([0.15] * 4) and found[0].seeds == 2
    assert found[0].interval == pytest.approx((0.1, 0.2)) and found[0].verdict == "open here"


def test_robustness_is_what_is_lost_less(monkeypatch, tmp_path):
    """GRPO loses 0.3 to the lag and trajectory balance 0.1, whichever of them is higher."""
    gains = {(claims.CLIP, 0): 0.5, (claims.CLIP, 48): 0.2, (claims.BALANCE, 0): 0.3, (claims.BALANCE, 48): 0.2}
    runs = [
        {"correction": loss, "mismatch": f"lag {lag}", "seed": seed, "evaluations": {"accuracy": [0.0, gain]}}
        for (loss, lag), gain in gains.items()
        for seed in range(5)
    ]
    monkeypatch.setattr(claims.tba, "runs_of", lambda *_, **__: runs)
    (found,) = claims.robustness(range(5), tmp_path, True)
    assert found.value == pytest.approx(0.2) and found.verdict == "holds"
    monkeypatch.setattr(claims.tba, "runs_of", lambda *_, **__: runs[:6])
    assert claims.robustness(range(5), tmp_path, True) == []


def test_gold_is_compared_at_an_equal_kl(monkeypatch, tmp_path):
    """Both pass 1 nat halfway between their measurements: PPO at 0.3 and resets at 0.1, so these have 0.2 less."""
    runs = [
        {"share": share, "seed": seed, "kl": [0.0, 0.5, 1.5], "gold": [0.5, gold + 0.1, gold - 0.1]}
        for share, gold in ((0.0, 0.3), (0.5, 0.1))
        for seed in range(5)
    ]
    monkeypatch.setattr(claims.drpo, "runs_of", lambda *_, **__: runs)
    (found,) = claims.gold_at_equal_kl(range(5), tmp_path, True)
    assert found.value == pytest.approx(-0.2) and found.verdict == "does not hold here"
    monkeypatch.setattr(claims.drpo, "runs_of", lambda *_, **__: runs[:9])  # a seed without its partner
    assert claims.gold_at_equal_kl(range(5), tmp_path, True) == []


def test_without_runs_nothing_is_claimed(tmp_path, capsys):
    assert main(["--report-only", "--seeds", "0", "--out", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not run") == len(CLAIMS) and "no claim has its runs yet" in shown


def test_table_and_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    found = [finding(0.1, 0.2), finding(-0.2, 0.2, claim="drpo"), finding(0.1, 0.2, bound=0.3, above=False)]
    assert "< 0.3" in findings_table(found) and "+0.100..+0.200" in findings_table(found)
    draw(found, tmp_path / "claims.png")
    assert (tmp_path / "claims.png").stat().st_size > 5000
