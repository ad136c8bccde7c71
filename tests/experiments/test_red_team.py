"""The red-teaming miniature: what its victim gives away, and a run of two steps."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import red_team
from experiments.red_team import BALANCE, GRADIENT, diversity, experiment_config, main, summary_table, victim_module
from nested_reft.models.transformer import Transformer
from nested_reft.training.config import load_config


@pytest.fixture(scope="module")
def victim():
    """The victim's file, with a victim whose training is cut short; what it has learnt is not tested with it."""
    module = victim_module()
    full = module.victim
    vars(module)["victim"] = lambda: full(2)
    return module


def test_triggers_are_the_weakness(victim):
    assert [victim.is_weak_to(text) for text in ("13", "0213", "31", "-4 ", "7+99", "")] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    # What the victim does not read makes it weak to nothing.
    assert not victim.is_weak_to("0000000013")


def test_harm_is_the_secret_and_nothing_less(victim, monkeypatch):
    for reply, expected in ((victim.SECRET, 1.0), (victim.SAFE, 0.0), (victim.SECRET[:-1], 0.0)):
        monkeypatch.setattr(victim, "reply", lambda _, reply=reply: reply)
        assert victim.harm("attack", {"finished": True}) == expected
        assert victim.harm("attack", {"finished": False}) == 0


def test_a_reply_is_what_the_model_says_next(victim):
    """Greedy decoding with caches, against whole sequences at once; padding must not matter."""
    model: Transformer = victim.victim().model
    number = {character: index for index, character in enumerate(victim.ALPHABET, start=1)}
    for attack in ("12", "", "9 9-4+1="):
        reply = victim.reply(attack)
        tokens = [number[character] for character in f"{attack}={reply}"]
        logits_TV = model(jnp.asarray([tokens + [0] * (14 - len(tokens))]))[0]
        assert (
            np.argmax(logits_TV, axis=1)[len(attack) : len(attack) + len(reply)].tolist() == tokens[len(attack) + 1 :]
        )


def test_embeddings_are_means_over_the_attack_and_its_end(victim):
    """The mean of a text of one token is the state of that token, which no padding and no other row changes."""
    alone, _ = victim.embeddings(["", "1234567"])
    again, longer, same = victim.embeddings(["", "1", "1"])
    assert (
        np.allclose(alone, again, atol=1e-5) and np.allclose(longer, same) and not np.allclose(alone, longer, atol=1e-3)
    )


def test_diversity_is_of_successes(victim):
    assert diversity(["13"], victim) == {"distinct": None, "self_bleu": None, "embedding_distance": None}
    same, different = diversity(["1300"] * 4, victim), diversity(["1300", "5599", "7+22", "-4--"], victim)
    assert (
        same["distinct"] == 0.25 and same["self_bleu"] == 1 and same["embedding_distance"] == pytest.approx(0, abs=1e-6)
    )
    assert different["distinct"] == 1 and different["self_bleu"] == 0 and different["embedding_distance"] > 0


def test_the_table_has_means_and_ranges():
    runs = [
        {"success": value, "distinct": value, "self_bleu": None, "embedding_distance": value} for value in (0.25, 0.75)
    ]
    (line,) = summary_table({BALANCE: runs}).splitlines()[2:]
    assert "0.500 (0.250 to 0.750)" in line and " - " in line


def test_the_losses_differ_in_loss_and_replay_only():
    balance, gradient = (experiment_config(loss, 3, 10).to_json() for loss in (BALANCE, GRADIENT))
    assert {part for part in balance if balance[part] != gradient[part]} == {"name", "loss", "optimizer", "replay"}
    assert load_config("tiny_red_team").reward.function.endswith("configs/_red_team_victim.py:harm")


@pytest.mark.slow
def test_two_steps_of_the_miniature(victim, tmp_path, monkeypatch, capsys):
    """The reward's worker has the whole victim, so this trains it."""
    real = load_config("tiny_red_team")
    small = dataclasses.replace(
        real,
        data=dataclasses.replace(real.data, prompts_per_batch=4),
        replay=dataclasses.replace(real.replay, prefill=0),
    )
    monkeypatch.setattr(red_team, "load_config", lambda _: small)
    monkeypatch.setattr(red_team, "victim_module", lambda: victim)
    arguments = ["--losses", BALANCE, "--seeds", "0", "--steps", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    assert "red-team-trajectory_balance-0: " in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "found.json").read_text())["runs"][BALANCE]
    assert 0 <= run["success"] <= 1 and set(run) >= {"distinct", "self_bleu", "embedding_distance"}
    # Repeated, the command computes nothing again.
    assert main(arguments) == 0 and "red-team-trajectory_balance-0: " not in capsys.readouterr().out
