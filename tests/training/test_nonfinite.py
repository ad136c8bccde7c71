"""Updates that are not finite: left out, counted, and after too many in a row the end of a run, with the last kept."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.api import repeat_failed_update
from nested_reft.checkpoints import Checkpoints, newest_checkpoint
from nested_reft.cli.main import main
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.sharding import shard_batch
from nested_reft.training import failed_update
from nested_reft.training.keys import RunKeys
from nested_reft.training.learner import Learner
from nested_reft.training.phases import NonFiniteUpdatesError
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.runs import MOVING, assert_equal_arrays, comparable, nano, trainer

NO_EVALUATION = {"evaluation__samples_per_prompt": 0, "evaluation__every_steps": 100}
LARGEST = np.finfo(np.float32).max
CONFIG = {"loss": MOVING, "optimizer__learning_rate": 0.01, "train__checkpoint_every": 1, **NO_EVALUATION}


@pytest.fixture
def spoil(monkeypatch):
    """Makes the batches of some steps, counted from 0, too large for float32, also in a run that is resumed."""

    def spoil(*steps: int) -> None:
        keys = RunKeys(jax.random.key(0))
        spoilt = [jax.random.key_data(keys.step(step).acceptance).tolist() for step in steps]

        def batch(learner, groups, acceptance, *rest):
            made = made_of(learner, groups, acceptance, *rest)
            if jax.random.key_data(acceptance).tolist() not in spoilt:
                return made
            # Made on the host, so that nothing is compiled for it.
            signal_BG = shard_batch(np.full(made.arrays.signal_BG.shape, LARGEST), learner.mesh)
            return dataclasses.replace(made, arrays=dataclasses.replace(made.arrays, signal_BG=signal_BG))

        monkeypatch.setattr(Learner, "batch", batch)

    made_of = Learner.batch
    return spoil


def kept_run(config, path) -> Trainer:
    """An open trainer whose directory has its configuration, as that of a command has."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_json()))
    return trainer(config, path)


def parameters(run: Trainer):
    return jax.device_get(run.state.learner.state)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, spoil, capsys):
    spoil(1)
    config = nano(**CONFIG)
    states = []
    run = Trainer(prepare(config), RunDirectory(tmp_path), lambda _: states.append(parameters(run))).open()
    summary = run.run()
    # Parameters, both moments and all counters.
    assert_equal_arrays(states[0], states[1])
    assert not np.array_equal(*(jax.tree.leaves(state.trainable)[0] for state in states[1:3]))
    assert run.state.learner.version == 3 and summary["nonfinite_updates"] == 1
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line.get("nonfinite_updates") for line in lines] == [None, None, 1, None, None]
    assert lines[2]["loss"] is None and "ess_token" not in lines[2] and "empty" not in lines[2]
    # The program is the same whether or not it takes the step.
    assert len({line["compilations"] for line in lines[1:]}) == 1
    assert "nano, step 2: 1 of the step's updates changed nothing, since loss or gradient" in capsys.readouterr().out
    assert run.state.nonfinite_in_a_row == 0


def test_too_many_in_a_row_end_the_run_and_the_last_is_repeated(tmp_path, spoil, capsys):
    """Checkpoints wait while updates fail, so that none of them takes the place of a good one."""
    spoil(1, 2, 3)
    run = kept_run(nano(**CONFIG), tmp_path)
    message = (
        r"nano, step 4: 3 updates in a row .*train.stop_after_nonfinite_updates is 3\. .* is kept in '.*failed_update'"
    )
    with pytest.raises(NonFiniteUpdatesError, match=message):
        run.run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    failed = run.state.learner.failed
    assert failed is not None
    before = sorted(path.name for path in tmp_path.iterdir())
    repeated = repeat_failed_update(tmp_path)
    assert_equal_arrays(jax.device_get(repeated.batch), jax.device_get(failed.arrays))
    assert repeated.result.nonfinite and repeated.not_finite is None
    assert not np.isfinite(repeated.result.loss) or not np.isfinite(repeated.result.gradient_norm)
    assert main(["replay-batch", str(tmp_path), "--json", str(tmp_path.parent / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"signal_BG .*3\.40282e\+38", printed) and "gradient_norm" in printed
    found = json.loads((tmp_path.parent / "out.json").read_text())
    assert found["update"]["parameter that is not finite"] == "none"
    assert {"prompt_BP", "tokens_BGC", "signal_BG"} <= {array["name"] for array in found["arrays"]}
    # The run stays as it is.
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert newest_checkpoint(tmp_path / "checkpoints") == 1


def test_a_repeated_update_finds_what_the_run_found(tmp_path, monkeypatch):
    """An update that would be finite is kept as if it were not: loss, norm and weights come back bit for bit."""
    run = kept_run(nano(**CONFIG, train__updates_per_batch=2, train__mini_batches=2), tmp_path)
    once, found = Learner.update_once, []

    def update_once(learner, batch):
        state = learner.state
        result = once(learner, batch)
        found.append(result)
        # As after an update that was left out.
        learner.state, learner.failed = state, batch
        return result

    # Buffers of the state before must survive the update.
    monkeypatch.setattr(Learner, "_own_state", lambda learner: jax.tree.map(jnp.copy, learner.state))
    monkeypatch.setattr(Learner, "update_once", update_once)
    run.step(0)
    failed_update.keep_failed_update(tmp_path, run.state)
    run.close()
    monkeypatch.setattr(Learner, "update_once", once)
    repeated = repeat_failed_update(tmp_path)
    assert len(found) == 2 and len(repeated.batch.prompt_BP) == 2
    assert_equal_arrays(repeated.result, found[-1])


def test_a_resumed_run_counts_on_and_stays_the_same(tmp_path, spoil):
    spoil(1, 3)
    config = nano(**CONFIG, train__steps=5)
    whole = trainer(config, tmp_path / "whole")
    whole.run()

    class Killed(Exception):
        pass

    def kill(found):
        if found.number == 4:
            raise Killed

    killed = Trainer(prepare(config), RunDirectory(tmp_path / "killed"), kill)
    with pytest.raises(Killed):
        killed.open().run()
    # That of step 2 waited until step 3, whose update was finite.
    assert newest_checkpoint(tmp_path / "killed" / "checkpoints") == 3
    resumed = trainer(config, tmp_path / "killed", resume=True)
    assert resumed.state.nonfinite_updates == 1
    resumed.run()
    assert_equal_arrays(parameters(resumed), parameters(whole))
    assert resumed.state.nonfinite_updates == whole.state.nonfinite_updates == 2
    logs = ([comparable(line) for line in read_log(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed"))
    first, second = logs
    assert first == second


def test_a_run_that_is_stopped_keeps_its_count(tmp_path, spoil):
    spoil(0, 1)
    run = trainer(nano(**CONFIG), tmp_path)
    for number in range(2):
        run.phases[0].step(run.state, number)
    run.state.step, run.state.started = 2, True
    run.save()
    run.close()
    resumed = trainer(nano(**CONFIG), tmp_path, resume=True)
    assert (resumed.state.nonfinite_updates, resumed.state.nonfinite_in_a_row) == (2, 2)
    spoil(2)
    with pytest.raises(NonFiniteUpdatesError, match="step 3: 3 updates in a row"):
        resumed.run()


def test_some_of_a_steps_updates_may_fail(tmp_path, monkeypatch):
    """Two mini-batches; one has a value that is too large. The numbers are those of the other."""
    run = trainer(nano(**CONFIG, train__updates_per_batch=2, train__mini_batches=2), tmp_path)
    made_of = Learner.batch

    def batch(learner, *rest):
        made = made_of(learner, *rest)
        signal_BG = made.arrays.signal_BG.at[0].set(LARGEST)
        return dataclasses.replace(made, arrays=dataclasses.replace(made.arrays, signal_BG=signal_BG))

    monkeypatch.setattr(Learner, "batch", batch)
    update = run.step(0).update
    assert update.nonfinite == 1 and run.state.learner.version == 1 and not update.all_nonfinite
    assert np.isfinite(update.loss) and update.health is not None and not update.empty
    taught = (update.weight_BGC != 0).any(axis=(1, 2))
    assert not taught[0] and taught.sum() == 2
    run.close()


def test_what_cannot_be_kept_does_not_hide_why_the_run_ended(tmp_path, spoil, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    spoil(0)
    run = trainer(nano(**CONFIG, train__stop_after_nonfinite_updates=1), tmp_path)
    monkeypatch.setattr("nested_reft.training.trainer.keep_failed_update", full)
    with pytest.raises(NonFiniteUpdatesError, match=r"step 1: 1 updates .*could not be kept: .*No space left"):
        run.run()


def test_nothing_kept_is_refused(tmp_path, capsys):
    kept_run(nano(**CONFIG), tmp_path).close()
    assert main(["replay-batch", str(tmp_path)]) == 2
    assert "has no failed_update; a run keeps one when" in capsys.readouterr().err


def test_another_failed_update_takes_the_place_of_the_first(tmp_path, spoil):
    spoil(0)
    for resume in (False, True):
        run = trainer(nano(**CONFIG, train__stop_after_nonfinite_updates=1), tmp_path, resume)
        with pytest.raises(NonFiniteUpdatesError):
            run.run()
    with Checkpoints(tmp_path / failed_update.DIRECTORY, keep=1) as kept:
        assert kept.numbers() == [1]
