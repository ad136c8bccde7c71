"""A run that was stopped continues bit for bit, whatever phase it was in."""

import dataclasses
import re
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx

from nested_reft import replay
from nested_reft.checkpoints import Checkpoints, newest_checkpoint
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.splits import SplitConfig
from nested_reft.json_files import write_json
from nested_reft.models.lora import LoraConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.sharding import MeshConfig
from nested_reft.tokenizer import Tokenizer
from nested_reft.training import phases
from nested_reft.training.config import Config
from nested_reft.training.interrupts import Preempted, stop_requests
from nested_reft.training.reinforcement import Reinforcement
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.scored_groups import scored
from tests.training.runs import (
    MEASURED,
    MOVING,
    PPO,
    assert_equal_arrays,
    comparable,
    comparable_steps,
    controlled,
    metrics_of,
    nano,
    save_after,
    trainer,
    two_sources,
)

NO_EVALUATION = {"evaluation__samples_per_prompt": 0, "evaluation__every_steps": 100}


class Killed(Exception):
    """Stands for whatever ends a process."""


def killed_after(config: Config, path, steps: int) -> Trainer:
    """A run that was killed when a step of reinforcement was logged, before its checkpoint."""

    def on_step(found):
        if found.number == steps:
            raise Killed

    run = Trainer(prepare(config), RunDirectory(path), on_step)
    with pytest.raises(Killed):
        run.open().run()
    return run


def warm_steps(run: Trainer, numbers: range) -> None:
    """Steps of the warm start, taken by hand."""
    for number in numbers:
        run.phases[0].step(run.state, number)


def test_a_field_that_an_earlier_version_did_not_have_takes_its_default(tmp_path, monkeypatch):
    first = trainer(nano(**NO_EVALUATION), tmp_path)
    save_after(first, 0)
    first.close()
    whole = Checkpoints.restore_host

    def earlier(self, number, blocks=False):
        host = whole(self, number, blocks)
        host["config"]["train"].pop("mini_batches")
        return host

    monkeypatch.setattr(Checkpoints, "restore_host", earlier)
    with Trainer(prepare(nano(**NO_EVALUATION)), RunDirectory(tmp_path)).open(resume=True) as resumed:
        assert_equal_arrays(resumed.state.learner.state, first.state.learner.state)
    # Another value than the default is a change, since the run had none.
    changed = nano(**NO_EVALUATION, train__updates_per_batch=2, train__mini_batches=2)
    with pytest.raises(ValueError, match=r"train\.mini_batches is 2, and was 1"):
        Trainer(prepare(changed), RunDirectory(tmp_path)).open(resume=True)


def test_same_seed_same_metrics_and_resuming_continues_bit_for_bit(tmp_path):
    config = nano(train__steps=8, loss=MOVING, optimizer__learning_rate=0.01)
    straight = trainer(config, tmp_path / "straight")
    expected = comparable_steps(straight, range(4))

    first = trainer(config, tmp_path / "resumed")
    assert comparable_steps(first, range(2)) == expected[:2]
    save_after(first, 2)
    first.close()
    second = trainer(config, tmp_path / "resumed", resume=True)
    assert second.state.step == 2
    assert comparable_steps(second, range(2, 3)) == expected[2:3]
    compiled = second.compilations.count
    assert comparable_steps(second, range(3, 4)) == expected[3:]
    assert second.compilations.count == compiled
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    other_seed = trainer(nano(train__seed=1), tmp_path / "other")
    assert comparable_steps(other_seed, range(1)) != expected[:1]


def test_a_killed_run_drops_what_it_logged_after_its_checkpoint(tmp_path):
    """Killed in step 2 with a checkpoint of step 1: step 2 is taken again and logged once, with the same result."""
    config = nano(
        train__steps=3, train__checkpoint_every=1, loss=MOVING, optimizer__learning_rate=0.01, **NO_EVALUATION
    )
    killed_after(config, tmp_path, 2)
    before = read_log(tmp_path / "metrics.jsonl")
    summary = trainer(config, tmp_path, resume=True).run()
    after = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in after] == [0, 1, 2, 3]
    assert [comparable(line) for line in after[:3]] == [comparable(line) for line in before]
    assert [line["step"] for line in read_log(tmp_path / "samples.jsonl")] == [1] * 16 + [2] * 16 + [3] * 16
    # The held-out results before training are those of the first process, and its time counts.
    assert summary["before"]["three_to_six_digits"]["prompts"] == 8
    assert summary["training_seconds"] > after[3]["step_seconds"]


def flip_a_bit(run, number: int) -> None:
    """In the largest file of a checkpoint, which holds the arrays."""
    path = max((run / "checkpoints" / str(number) / "arrays").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_an_older_one_and_the_run_ends_the_same(tmp_path, caplog):
    config = nano(
        train__steps=3,
        train__checkpoint_every=1,
        train__keep_checkpoints=3,
        loss=MOVING,
        optimizer__learning_rate=0.01,
        **NO_EVALUATION,
    )
    straight = trainer(config, tmp_path)
    straight.run()
    expected = [comparable(line) for line in read_log(tmp_path / "metrics.jsonl")]
    flip_a_bit(tmp_path, 3)
    (tmp_path / "checkpoints" / "999").mkdir()
    second = trainer(config, tmp_path, resume=True)
    assert second.state.step == 2
    damaged, *set_aside = [record.message for record in caplog.records if record.name.startswith("nested_reft")]
    assert "checkpoint 3 in " in damaged and "does not hold what was written" in damaged
    assert damaged.endswith("the run continues from checkpoint 2, which is whole")
    assert sorted(message.split("'")[3] for message in set_aside) == ["3.damaged", "999.damaged"]
    second.run()
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    assert [comparable(line) for line in read_log(tmp_path / "metrics.jsonl")] == expected
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"1", "2", "3", "3.damaged", "999.damaged"} == left


def test_nothing_is_changed_before_every_check_has_passed(tmp_path):
    """Checkpoints that are all damaged, a configuration that was edited, a log that is a directory."""
    config = nano(train__steps=2, **NO_EVALUATION)
    first = trainer(config, tmp_path)
    save_after(first, 1)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')

    def refused(config: Config, message: str) -> None:
        before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
        with pytest.raises(ValueError, match=message):
            trainer(config, tmp_path, resume=True)
        assert before == {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}

    edited = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    refused(edited, "configuration is not that of checkpoint 1: optimizer.learning_rate is 0.5, and was 0.0005")
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "samples.jsonl").mkdir()
    refused(config, r"samples.jsonl' is not a file")
    (tmp_path / "samples.jsonl").rmdir()
    flip_a_bit(tmp_path, 1)
    refused(
        config, r"checkpoint 1 in .* does not hold what was written \(checksum\); there is no other to continue from"
    )


def test_an_interrupt_ends_a_run_after_the_step_with_a_checkpoint(tmp_path):
    config = nano(train__checkpoint_every=100, **NO_EVALUATION)
    run = Trainer(prepare(config), RunDirectory(tmp_path), lambda found: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.open().run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1
    assert trainer(config, tmp_path, resume=True).state.step == 1


def interrupting(monkeypatch, what: str, times: int = 1) -> None:
    """Signals come while a method of reinforcement runs, which goes on."""
    called = getattr(Reinforcement, what)

    def interrupted(*arguments):
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)
        return called(*arguments)

    monkeypatch.setattr(Reinforcement, what, interrupted)


def test_an_interrupt_while_a_phase_starts_acts_after_that(tmp_path, monkeypatch):
    config = nano(train__save_seconds=600.0, **NO_EVALUATION)
    interrupting(monkeypatch, "start")
    with pytest.raises(KeyboardInterrupt):
        trainer(config, tmp_path).run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 0
    state = trainer(config, tmp_path, resume=True).state
    assert (state.started, state.step) == (True, 0) and state.before


def test_a_preemption_ends_a_run_after_the_step_with_a_checkpoint(tmp_path):
    config = nano(train__save_seconds=600.0, **NO_EVALUATION)
    run = Trainer(prepare(config), RunDirectory(tmp_path), lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted):
        run.open().run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1


class Ended(Exception):
    """Stands for the end of the process."""


def test_a_preemption_that_takes_too_long_names_the_checkpoint_that_holds(tmp_path, monkeypatch, capfd):
    """Step 2 goes on for longer than the limit, with a checkpoint of step 1."""
    codes, released = list[int](), threading.Event()

    def end(code):
        codes.append(code)
        released.set()

    def on_step(found):
        if found.number == 2:
            run.checkpoints.wait()  # the one of step 1 may still be on its way
            signal.raise_signal(signal.SIGTERM)
            assert released.wait(30)
            raise Ended

    monkeypatch.setattr("nested_reft.training.preemption.end_now", end)
    config = nano(train__save_seconds=0.05, train__checkpoint_every=1, **NO_EVALUATION)
    run = Trainer(prepare(config), RunDirectory(tmp_path), on_step)
    with pytest.raises(Ended):
        run.open().run()
    assert codes == [75]
    said = capfd.readouterr().err
    assert f"train.save_seconds, 0.05; to continue from checkpoint 1: nested-reft train --resume {tmp_path}" in said
    # Whoever continues has perhaps more time.
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, save_seconds=100.0))
    with trainer(longer, tmp_path, resume=True) as resumed:
        assert resumed.state.step == 1


def test_an_interrupt_before_the_first_phase_leaves_nothing_to_continue(tmp_path):
    run = trainer(nano(**NO_EVALUATION), tmp_path)
    with pytest.raises(KeyboardInterrupt), stop_requests():
        signal.raise_signal(signal.SIGTERM)
        run.run()
    assert newest_checkpoint(tmp_path / "checkpoints") is None


def test_a_second_interrupt_does_not_drop_the_checkpoint_that_is_written(tmp_path, monkeypatch):
    run = trainer(nano(train__checkpoint_every=1, **NO_EVALUATION), tmp_path)
    save = run.checkpoints.save

    def interrupted(number, *arguments):
        for _ in range(3 * (number == 1)):
            signal.raise_signal(signal.SIGINT)
        save(number, *arguments)

    monkeypatch.setattr(run.checkpoints, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert newest_checkpoint(tmp_path / "checkpoints") == 1


@pytest.mark.parametrize("kind", ["easy_to_hard", "dump"])
def test_resuming_continues_the_curriculum(kind, tmp_path):
    """From above level 0, and with windows that are not empty."""
    config = two_sources(curriculum=CurriculumConfig(kind, window=16, promote_at=0.05))
    first = trainer(config, tmp_path)
    first.state.curriculum = dataclasses.replace(first.state.curriculum, level=1)
    assert (metrics_of(first, first.step(0))["sources"] == [0, 4]) == (kind == "easy_to_hard")
    save_after(first, 1)
    kept = first.state.curriculum
    expected = comparable_steps(first, range(1, 2))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert second.state.curriculum == kept and kept.level == 1
    assert sum(source.count for source in kept.sources) == 4 * 4
    assert comparable_steps(second, range(1, 2)) == expected


def test_groups_that_wait_for_an_update_survive(tmp_path):
    first = trainer(nano(), tmp_path)
    first.state.buffer = replay.add(replay.Buffer(), scored([[1, 0], [0, 0]]))
    save_after(first, 1)
    first.close()
    buffer = trainer(nano(), tmp_path, resume=True).state.buffer
    assert isinstance(buffer, replay.Buffer)
    (found,) = buffer.batches
    np.testing.assert_equal(found.to_plain(), first.state.buffer.batches[0].to_plain())


def test_a_run_on_a_mesh_resumes(tmp_path):
    config = nano(mesh=MeshConfig(data=2), lora=LoraConfig(rank=2), train__micro_batches=2, loss=MOVING)
    first = trainer(config, tmp_path)
    first.step(0)
    save_after(first, 1)
    expected = comparable_steps(first, range(1, 2))
    first.close()
    second = trainer(config, tmp_path, resume=True)
    assert comparable_steps(second, range(1, 2)) == expected


def arrays_of(run: Trainer):
    """The host's copy of all device arrays that a checkpoint holds of a run."""
    arrays = run.state.learner.arrays(True)
    if run.state.searching is not None:
        arrays["searching"] = nnx.state(run.state.searching.model)
    return jax.device_get(arrays)


def host_values_of(run: Trainer, number: int):
    """The host's part of a checkpoint, but for what says when and where it was written."""
    run.checkpoints.wait()
    host = run.checkpoints.restore_host(number)
    return {name: value for name, value in host.items() if name not in ("seconds", "marks", "config")}


@pytest.mark.slow
def test_a_move_from_eight_devices_to_one_and_back_changes_nothing(tmp_path, caplog):
    """Parameters, moments, reference, critic and what searchers hold; and the steps after it are the same."""
    eight = nano(mesh=MeshConfig(data=4, tensor=2), loss=PPO, search=SearchConfig(lag=1, sync_every=2), **NO_EVALUATION)
    first = trainer(eight, tmp_path)
    comparable_steps(first, range(1))
    save_after(first, 1)
    arrays, host = arrays_of(first), host_values_of(first, 1)
    expected = comparable_steps(first, range(1, 3))
    first.close()
    assert {"trainable", "optimizer_state", "reference", "searching"} <= arrays.keys()
    with trainer(dataclasses.replace(eight, mesh=MeshConfig()), tmp_path, resume=True) as moved:
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(moved.state.learner.state)} == {1}
        assert_equal_arrays(arrays_of(moved), arrays)
        # Written anew by one device, as another checkpoint.
        moved.state.save(moved.checkpoints, 2, moved.run_directory.marks())
        np.testing.assert_equal(host_values_of(moved, 2), host)
    assert "mesh.data is 1, and was 4; mesh.tensor is 1, and was 2" in caplog.text
    with trainer(eight, tmp_path, resume=True) as back:
        assert newest_checkpoint(tmp_path / "checkpoints") == 2 and back.state.step == 1
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(back.state.learner.state)} == {8}
        assert_equal_arrays(arrays_of(back), arrays)
        assert comparable_steps(back, range(1, 3)) == expected
        assert_equal_arrays(back.state.learner.state, first.state.learner.state)


def test_a_checkpoint_of_something_else_is_refused_by_name(tmp_path, monkeypatch):
    """The configuration is the same: files of the model, or the program, have changed since."""
    setup = prepare(nano(**NO_EVALUATION))
    with trainer(setup, tmp_path) as first:
        save_after(first, 0)
        first.checkpoints.wait()
        identity = first.state.identity

    def refused(changes: dict, message: str) -> None:
        with monkeypatch.context() as patch:
            now = lambda *_: identity | changes  # noqa: E731
            patch.setattr("nested_reft.training.run_state.checkpoint_identity", now)
            with pytest.raises(ValueError, match=message):
                trainer(setup, tmp_path, resume=True)

    write_json(tmp_path / "config.json", setup.config.to_json())
    with monkeypatch.context() as patch:
        patch.setattr("nested_reft.rollout.policy.checkpoint_identity", lambda *_: identity | {"tokenizer": "another"})
        with pytest.raises(ValueError, match="checkpoint 0 was written with another tokenizer of model 'scratch'"):
            Policy.load(tmp_path)
    assert Policy.load(tmp_path).version == 0
    refused({"name": "other"}, "^checkpoint 0 is of model 'scratch', and this run has model 'other'$")
    refused(
        {"shape": identity["shape"] | {"width": 128, "num_layers": 7}},
        "checkpoint 0 is of another model under the name 'scratch': num_layers was 6 and is 7; width was 64 and is 128",
    )
    refused({"tokenizer": "another"}, "checkpoint 0 was written with another tokenizer of model 'scratch'")
    with monkeypatch.context() as patch:
        patch.setattr("nested_reft.checkpoint_identity.FORMAT", identity["format"] - 1)
        patch.setattr("nested_reft.checkpoint_identity.__version__", "0.0.9")
        written, version = identity["format"], re.escape(identity["version"])
        expected = rf"by nested_reft {version} in format {written}; this is 0\.0\.9, .* up to {written - 1}:"
        with pytest.raises(ValueError, match=expected):
            trainer(setup, tmp_path, resume=True)
    with trainer(setup, tmp_path, resume=True) as resumed:
        assert resumed.state.step == 0


def test_tokenizers_are_told_apart_by_what_they_read():
    one = Tokenizer.characters("0123")
    assert one.fingerprint() == Tokenizer.characters("0123").fingerprint()
    assert one.fingerprint() != Tokenizer.characters("0132").fingerprint()
    one.stop_ids = (0, 3)
    assert one.fingerprint() != Tokenizer.characters("0123").fingerprint()


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    with trainer(nano(**NO_EVALUATION), tmp_path) as first:
        save_after(first, 1)
    checkpoints, blocks = tmp_path / "checkpoints", tmp_path / "checkpoints" / "blocks"
    half = [checkpoints / "2.orbax-checkpoint-tmp", checkpoints / "3.orbax-checkpoint-tmp-1700000000"]
    for path in half:
        shutil.copytree(checkpoints / "1" / "arrays", path / "arrays")
    blocks.mkdir(exist_ok=True)
    half += [blocks / "replay-2.safetensors.partial", tmp_path / "metrics.jsonl.partial"]
    half += [tmp_path / "config.json.4711.partial", tmp_path / "summary.json.4711.partial"]
    kept = [checkpoints / "note.orbax-checkpoint-tmp", tmp_path / "thesis.partial"]
    for path in half[2:] + kept:
        path.write_text("{")
    with trainer(nano(**NO_EVALUATION), tmp_path, resume=True) as resumed:
        assert resumed.state.step == 1
    assert [path for path in half if path.exists()] == [] and all(path.exists() for path in kept)


def test_nesting_control_and_measurements_resume_bit_for_bit(tmp_path):
    config = controlled(nesting=dataclasses.replace(MEASURED, skip_ratio=0.0, remeasure_every=1))
    straight = trainer(config, tmp_path / "straight")
    expected = comparable_steps(straight, range(3))
    first = trainer(config, tmp_path / "resumed")
    first.step(0)
    save_after(first, 1)
    first.close()
    second = trainer(config, tmp_path / "resumed", resume=True)
    assert comparable_steps(second, range(1, 3)) == expected[1:]
    assert second.state.nesting == straight.state.nesting
    assert np.array_equal(second.state.divergence_L, straight.state.divergence_L)


def test_a_warm_start_resumes_in_its_middle(tmp_path):
    """2 + 2 steps are 4, and the step of reinforcement after them is the same too."""
    config = nano(warm_start__steps=4, warm_start__batch_size=8, train__steps=1, **NO_EVALUATION)
    straight = trainer(config, tmp_path / "straight")
    straight.run()

    first = trainer(config, tmp_path / "resumed")
    warm_steps(first, range(2))
    save_after(first, 2)
    first.close()
    second = trainer(config, tmp_path / "resumed", resume=True)
    assert (second.state.phase, second.state.step, second.state.learner.version) == (0, 2, 2)
    assert_equal_arrays(first.state.learner.state, second.state.learner.state)
    second.run()
    assert_equal_arrays(straight.state.learner.state, second.state.learner.state)
    lines, expected = (read_log(tmp_path / name / "metrics.jsonl") for name in ("resumed", "straight"))
    assert [comparable(line) for line in lines] == [comparable(line) for line in expected]
    assert [line["step"] for line in lines] == [0, 1]


def test_reinforcement_after_a_warm_start_resumes_with_its_reference(tmp_path, monkeypatch):
    """The reference is the policy after the warm start, which a resumed run reads and does not train again."""
    config = nano(
        warm_start__steps=2,
        warm_start__batch_size=8,
        train__checkpoint_every=1,
        loss=MOVING,
        optimizer__learning_rate=0.01,
        **NO_EVALUATION,
    )
    first = killed_after(config, tmp_path, 2)
    logged = read_log(tmp_path / "metrics.jsonl")

    def never(*_):
        raise AssertionError("the warm start was trained again")

    monkeypatch.setattr(phases.WarmStart, "step", never)
    second = trainer(config, tmp_path, resume=True)
    assert (second.state.phase, second.state.step) == (1, 1)
    assert_equal_arrays(first.state.learner.reference, second.state.learner.reference)
    (line,) = comparable_steps(second, range(1, 2))
    assert line["reference_kl"] == logged[2]["reference_kl"] > 0
    assert line == {name: value for name, value in comparable(logged[2]).items() if name != "step"}


def half_right(policy, examples, *rest, decoded):
    """Every second question always right, in place of `num_correct`."""
    return np.arange(len(examples)) % 2 * rest[-1], 0


def test_a_resumed_run_takes_its_division_from_the_checkpoint(tmp_path, monkeypatch):
    config = nano(
        curriculum=CurriculumConfig("dump"),
        data__split=SplitConfig("pass_rate", parts=2, samples=2),
        train__checkpoint_every=1,
        **NO_EVALUATION,
    )
    monkeypatch.setattr("nested_reft.training.split.num_correct", half_right)
    first = killed_after(config, tmp_path, 2)
    logged = read_log(tmp_path / "metrics.jsonl")

    def never(*_):
        raise AssertionError("the sources were divided again")

    monkeypatch.setattr(phases, "divide", never)
    second = trainer(config, tmp_path, resume=True)
    assert second.state.data == first.state.data and len(second.state.data.source_names) == 2
    assert second.state.division == first.state.division
    assert len(logged[2]["sources"]) == 2
    (line,) = comparable_steps(second, range(1, 2))
    assert line == {name: value for name, value in comparable(logged[2]).items() if name != "step"}


def test_a_run_resumes_between_its_phases(tmp_path, monkeypatch):
    """The checkpoint of the division's own phase holds none: it is measured when the run goes on."""
    config = nano(
        warm_start__steps=1, warm_start__batch_size=8, data__split=SplitConfig("pass_rate", parts=2, samples=2)
    )

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(phases, "divide", killed)
        first = trainer(config, tmp_path)
        with pytest.raises(Killed):
            first.run()
    assert newest_checkpoint(tmp_path / "checkpoints") == phases.first_checkpoint(first.phases, 1) == 2
    monkeypatch.setattr("nested_reft.training.split.num_correct", half_right)
    second = trainer(config, tmp_path, resume=True)
    assert (second.state.phase, second.state.step, second.state.division) == (1, 0, None)
    assert_equal_arrays(first.state.learner.state.trainable, second.state.learner.state.trainable)
    second.phases[1].step(second.state, 0)
    assert [len(parts) for parts in second.state.division] == [2]
