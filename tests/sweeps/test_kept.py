"""Kept results: none is computed twice, none of another configuration is used, and processes share the work."""

import fcntl
import json

from nested_reft.sweeps import kept
from nested_reft.sweeps.claims import LOCKS, claimed
from nested_reft.sweeps.kept import Wanted, finished, kept_runs
from tests.training.runs import nano


def wanted(path, seeds=(0, 1)):
    return [Wanted(nano(train__seed=seed), path / f"{seed}.json", {"seed": seed}) for seed in seeds]


def test_a_run_is_computed_once(tmp_path, capsys):
    computed = []

    def compute(each):
        computed.append(each.labels["seed"])
        return {"config": each.config.to_json(), "value": each.labels["seed"] * 10}

    assert [run["value"] for run in kept_runs(wanted(tmp_path), compute, "{0[value]}".format) if run] == [0, 10]
    assert "nano: 10" in capsys.readouterr().out
    again = kept_runs(wanted(tmp_path, (1, 2, 0)), compute, "{0[value]}".format)
    assert [run and (run["seed"], run["value"]) for run in again] == [(1, 10), (2, 20), (0, 0)]
    assert computed == [0, 1, 2]
    assert kept_runs(wanted(tmp_path, (3, 0)), compute, str, only_kept=True)[0] is None and computed == [0, 1, 2]


def test_a_result_of_another_configuration_is_not_used(tmp_path, capsys):
    file = tmp_path / "0.json"
    file.write_text(json.dumps({"config": nano(train__steps=9).to_json()}))
    assert finished(file, nano()) is None
    said = capsys.readouterr().err
    assert "is of another configuration (train.steps was 9 and is 4) and is computed again" in said
    file.write_text('{"config"')
    assert finished(file, nano()) is None and "cannot be read and is computed again" in capsys.readouterr().err


def test_a_run_that_fails_is_left_out_and_nothing_is_kept_of_it(tmp_path):
    runs = kept_runs(wanted(tmp_path), lambda each: None if each.labels["seed"] == 0 else {"value": 1}, str)
    assert runs[0] is None and runs[1] is not None and runs[1]["value"] == 1
    assert not (tmp_path / "0.json").exists()


def test_a_run_of_another_process_is_left_to_it(tmp_path, monkeypatch):
    """Seed 0 is held elsewhere, so seed 1 is computed first; when the other process is done, its result is taken."""
    with claimed(tmp_path / "0.json"):  # makes the file of the lock
        pass
    other = (tmp_path / LOCKS / "0.json").open()
    fcntl.flock(other, fcntl.LOCK_EX)
    computed = []

    def compute(each):
        computed.append(each.labels["seed"])
        return {"config": each.config.to_json(), "value": "mine"}

    def other_ends(seconds):
        (tmp_path / "0.json").write_text(json.dumps({"config": nano().to_json(), "value": "theirs"}))
        other.close()

    monkeypatch.setattr(kept.time, "sleep", other_ends)
    runs = kept_runs(wanted(tmp_path), compute, str)
    assert [run and run["value"] for run in runs] == ["theirs", "mine"] and computed == [1]
