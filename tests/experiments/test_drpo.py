"""The experiment on DR-PO: its summary by hand, its task, and runs of a few steps."""

import json
from typing import Any

import numpy as np
import pytest

from experiments.drpo import (
    SHARES,
    experiment_config,
    gold_at_kl,
    gold_rule,
    main,
    reward_config,
    runs_of,
    summarise,
    summary_table,
)
from experiments.runs import EVERY
from nested_reft.config_files import CONFIG_DIRECTORIES, load_module
from nested_reft.training.warm_start import WarmStartConfig

CONFIGS = next(each for each in CONFIG_DIRECTORIES if (each / "_tiny_preferences.py").is_file())


def run(share: float, seed: int, gold: list[float], kl: list[float], warning: str | None = None) -> dict[str, Any]:
    return {
        "share": share,
        "seed": seed,
        "steps": [EVERY * i for i in range(len(gold))],
        "gold": gold,
        "learned": gold,
        "kl": kl,
        "tokens": [5.0] * len(gold),
        "warning": warning,
        "seconds": 2.0,
    }


RUNS = [
    run(0, 0, [0.0, 0.8, 0.2], [0.0, 1.0, 3.0], "hacked"),
    run(0, 1, [0.2, 1.0, 0.4], [0.0, 2.0, 4.0]),
    run(0.5, 0, [0.0, 0.5, 0.6], [0.0, 0.5, 0.8]),
    run(0.5, 1, [0.2, 0.7, 0.8], [0.0, 0.5, 0.9]),
]


def test_shares_are_compared_with_the_same_seed():
    """Both seeds gain 0.4 over PPO, so the interval of the gain is a point. PPO lost 0.6 since its best in both."""
    found = summarise(RUNS)
    assert found["0.5"]["gold_gain"]["mean"] == pytest.approx(0.4)
    np.testing.assert_allclose(found["0.5"]["gold_gain"]["interval"], [0.4, 0.4])
    assert found["0"]["gold_lost"]["mean"] == pytest.approx(0.6) and found["0"]["gold_gain"]["mean"] == 0
    np.testing.assert_allclose(found["0"]["gold"]["interval"], [0.2, 0.4])
    assert found["0"]["warned"] == 1 and found["0.5"]["kl"]["mean"] == pytest.approx(0.85)
    assert "0.400 (0.400..0.400)" in summary_table(found)


def test_noise_alone_is_no_loss():
    """Both seeds stay at 0.5 but for one lucky measurement. Each is judged by the other's best step: 0.5 - 0.5 and
    0.5 - 0.6. By their own best steps they would have lost 0.1 and 0."""
    runs = [run(0, 0, [0.0, 0.6, 0.5, 0.5], [0.0] * 4), run(0, 1, [0.0, 0.5, 0.5, 0.6], [0.0] * 4)]
    found = summarise(runs)["0"]
    assert found["gold_lost"]["values"] == pytest.approx([0, -0.1]) and found["gold_best"]["values"] == [0.5, 0.5]
    assert summarise(runs[:1])["0"]["gold_lost"]["mean"] == pytest.approx(0.1)  # a single run has only its own


def test_gold_at_a_divergence_is_interpolated():
    """PPO at 1 nat: 0.8 of seed 0, and half way from 0.2 to 1.0 of seed 1, so draws of two seeds go from 0.6 to 0.8. No
    run of 0.5 gets to 1 nat."""
    found = gold_at_kl(RUNS, [0.5, 1.0])
    assert [each["values"] for each in found["0"]] == [pytest.approx([0.4, 0.4]), pytest.approx([0.8, 0.6])]
    assert found["0"][1]["mean"] == pytest.approx(0.7)
    np.testing.assert_allclose(found["0"][1]["interval"], [0.6, 0.8])
    assert found["0.5"][0]["mean"] == pytest.approx(0.6) and found["0.5"][1] is None


def test_runs_differ_in_the_share_only():
    plain, *others = [experiment_config(share, 3, 200, "model").to_json() for share in SHARES]
    assert plain["reset"]["share"] == 0 and plain["train"]["seed"] == 3 and plain["warm_start"]["steps"] == 0
    assert plain["reset"]["per"] == "completion"
    for other in others:
        assert {part for part in plain if plain[part] != other[part]} == {"name", "reset"}
    assert reward_config(3, 50).loss.kind == "bradley_terry"


def test_gold_by_hand():
    """A third for each of the first three sevens, and a half off for each further one."""
    gold = gold_rule()
    assert [gold(text, {}) for text in ("", "17", "7177", "7777", "777777")] == pytest.approx([0, 1 / 3, 1, 0.5, -0.5])


def test_the_pairs_that_ship_are_those_that_the_rule_gives():
    module = load_module(CONFIGS / "_tiny_preferences.py", "tiny_preferences_pairs")
    lines = (CONFIGS / "tiny_preferences.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == module.pairs()
    sevens = np.array([[row[name].count("7") for name in ("chosen", "rejected")] for row in module.pairs()])
    # Few answers have too many of them, so that a reward model hardly learns that there can be.
    assert 0.01 < (sevens > module.BEST).mean() < 0.03 and sevens[:, 0].mean() > sevens[:, 1].mean() + 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "15"], "--steps is 15; allowed is a multiple of 10"),
        (["--shares", "0.5"], "--shares lacks '0', which the others are compared with"),
        (["--shares", "0", "1.5"], "--shares is 1.5; allowed is 0 to 1"),
        (["--reward-steps", "0"], "--reward-steps is 0; allowed is a whole number from 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_finished_runs_are_kept(tmp_path, capsys):
    """Both shares start alike, and a repeated command computes nothing."""
    pytest.importorskip("matplotlib", reason="needs the optional package matplotlib")
    runs = runs_of([0.0, 1.0], [1], EVERY, tmp_path, 3, WarmStartConfig(steps=2))
    assert runs[0]["gold"][0] == runs[1]["gold"][0] and runs[0]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert capsys.readouterr().out.count(", KL ") == 2
    arguments = ["--shares", "0", "1", "--seeds", "1", "--steps", str(EVERY), "--reward-steps", "3"]
    arguments += ["--out", str(tmp_path), "--json", str(tmp_path / "summary.json")]
    assert main(arguments) == 0
    assert ", KL " not in capsys.readouterr().out
    assert list(json.loads((tmp_path / "summary.json").read_text())["shares"]) == ["0", "1"]
    assert (tmp_path / "drpo.png").stat().st_size > 0
