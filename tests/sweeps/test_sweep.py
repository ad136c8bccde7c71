"""Whole sweeps and the commands for them; runs are made by hand but in the slow test."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from nested_reft.api import Run, open_trainer
from nested_reft.cli.compare import labelled, without_repeats
from nested_reft.cli.main import main
from nested_reft.exit_codes import INTERRUPTED
from nested_reft.models.lora import split_trainable
from nested_reft.run_directory import read_log
from nested_reft.sweeps import runs as sweep_runs
from nested_reft.sweeps import sweep
from nested_reft.sweeps.grid import grid
from nested_reft.sweeps.runs import begun_run, trained_run
from nested_reft.sweeps.starts import shared_start
from nested_reft.training.reinforcement import Reinforcement
from nested_reft.training.warm_start import WarmStartConfig
from tests.reports.runs_on_disk import line, write_run
from tests.sweeps.results_by_hand import config, result
from tests.training.runs import WITH_KL, comparable, nano

RATIOS = ["--nesting.skip-ratio", "0", "0.2", "--seeds", "0", "1"]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(monkeypatch):
    """The runs that a sweep asks for, in place of training them: accuracy is the skip ratio and a tenth of the seed."""
    asked = []

    def write(config, out):
        asked.append(config)
        accuracy = config.nesting.skip_ratio + config.train.seed / 10
        path = out / "runs" / config.name
        path.parent.mkdir(exist_ok=True)
        after = {"digits": {"greedy_accuracy": accuracy, "sampled_accuracy": accuracy, "prompts": 8}}
        lines = [line(0, **{"heldout/digits": 0.0}), line(1, step_seconds=1.0)]
        return write_run(path, lines, config=config.to_json(), summary={"after": after, "steps": 1}, versions={})

    monkeypatch.setattr(sweep, "trained_run", write)
    monkeypatch.setattr(sweep, "draw_comparison", lambda tasks, path: None)  # it has a test of its own
    return asked


def test_a_sweep_is_compared_kept_and_reported(trained, capsys):
    assert main(["sweep", "tiny", *RATIOS, "--json", "out.json"]) == 0
    shown = capsys.readouterr().out
    assert "three_to_six_digits: compared with nesting.skip-ratio 0, paired by seed" in shown
    variants = json.loads(Path("out.json").read_text())["tasks"]["three_to_six_digits"]["variants"]
    assert variants["nesting.skip-ratio 0.2"]["difference"]["mean"] == pytest.approx(0.2)
    assert [(each.nesting.skip_ratio, each.train.seed) for each in trained] == [(0, 0), (0.2, 0), (0, 1), (0.2, 1)]
    # Nothing is computed again, neither by the same command nor by a larger one.
    assert main(["sweep", "tiny", *RATIOS]) == 0 and len(trained) == 4
    assert main(["sweep", "tiny", *RATIOS[:3], "0.4", *RATIOS[3:]]) == 0 and len(trained) == 6
    capsys.readouterr()
    assert main(["compare", "runs/sweep-tiny"]) == 0
    assert "nesting.skip-ratio 0.4" in capsys.readouterr().out and len(trained) == 6


def test_a_changed_configuration_says_what_is_missing_and_shows_the_rest(trained, capsys):
    assert main(["sweep", "tiny", *RATIOS]) == 0
    capsys.readouterr()
    changed = ["sweep", "tiny", *RATIOS, "2", "--train.steps", "200", "--report-only"]
    assert main(changed) == 2  # no run is of this configuration
    said = capsys.readouterr().err
    assert "the configuration of 4 runs has changed since 'runs/sweep-tiny' was swept" in said
    assert "train.steps was 300 and is 200" in said
    assert "6 of 6 runs are missing" in said and "nesting.skip-ratio 0, seed 0: it has not been computed" in said
    # One seed of the new configuration is there: it is shown, and the others are named.
    assert main(["sweep", "tiny", *RATIOS[:4], "0", "--train.steps", "200"]) == 0
    capsys.readouterr()
    assert main(changed) == 0
    shown = capsys.readouterr()
    assert "4 of 6 runs are missing" in shown.err and "compared with nesting.skip-ratio 0" in shown.out
    # The results of the first configuration are there still.
    assert main(["sweep", "tiny", *RATIOS, "--report-only"]) == 0 and len(trained) == 6


def test_a_run_that_fails_is_named_and_the_others_go_on(monkeypatch, trained, capsys):
    write = sweep.trained_run

    def fails(config, out):
        if config.nesting.skip_ratio == 0.2 and config.train.seed == 0:
            raise FloatingPointError("3 updates in a row were not finite")
        return write(config, out)

    monkeypatch.setattr(sweep, "trained_run", fails)
    assert main(["sweep", "tiny", *RATIOS]) == 1
    shown = capsys.readouterr()
    assert "nesting.skip-ratio 0.2, seed 0: 3 updates in a row were not finite" in shown.err
    assert "1 of 4 runs are missing" in shown.err and "paired by seed" in shown.out
    assert main(["compare", "runs/sweep-tiny"]) == 0
    assert "1 of 4 runs are missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [{"measures": []}, {"measures": {}}, {"measures": {"accuracy": "high"}}, {"curve": {"step": [0]}}]
)
def test_a_damaged_result_is_named_and_computed_again(damage, trained, capsys):
    assert main(["sweep", "tiny", *RATIOS]) == 0
    first = sorted(Path("runs/sweep-tiny/results").glob("*.json"))[0]
    first.write_text(json.dumps(json.loads(first.read_text()) | damage))
    capsys.readouterr()
    assert main(["compare", "runs/sweep-tiny"]) == 0
    shown = capsys.readouterr()
    assert f"'{first}' cannot be read" in shown.err and "1 of 4 runs are missing" in shown.err
    # The variant that lacks a run is the first one still, with which the others are compared.
    assert "compared with nesting.skip-ratio 0," in shown.out
    assert main(["sweep", "tiny", *RATIOS]) == 0 and len(trained) == 5
    assert f"'{first}' is damaged and is computed again" in capsys.readouterr().err


def test_a_damaged_sweep_is_told(trained, capsys):
    assert main(["sweep", "tiny", *RATIOS]) == 0
    first = sorted(Path("runs/sweep-tiny/results").glob("*.json"))[0]
    first.write_text('{"config": {}}')
    capsys.readouterr()
    assert main(["compare", "runs/sweep-tiny"]) == 0
    assert f"'{first}' cannot be read" in capsys.readouterr().err
    manifest = Path("runs/sweep-tiny/sweep.json")
    for runs in ("[]", '[{"label": "a", "seed": 0, "result": "../../secret.json"}]', '[{"label": 1}]', "3"):
        manifest.write_text(f'{{"runs": {runs}}}')
        assert main(["compare", "runs/sweep-tiny"]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "none of these runs" in said or "repeat the sweep" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "sweep needs the name of a configuration as its first word"),
        (["sweep", "tinny"], "configuration 'tinny' is unknown"),
        (["sweep", "tiny", "--nesting.skip-ratio", "0", "2"], "nesting.skip_ratio is 2"),
        (["sweep", "tiny", "--nesting.skip-ratio", "0", "0"], "'nesting.skip-ratio 0' is asked for twice"),
        (
            ["sweep", "tiny", "--nesting.skip-ratio", "0.2", "2e-1"],
            "'nesting.skip-ratio 2e-1' is the configuration of 'nesting.skip-ratio 0.2'; allowed is each once",
        ),
        (["sweep", "tiny", "--nestin.skip-ratio", "0"], "--nestin.skip-ratio is no option of the command"),
        (["sweep", "tiny", "--train.seed", "1", "2"], "train.seed is 1; allowed is --seeds"),
        (["sweep", "tiny", "--seeds", "1", "1"], "--seeds is 1 1; allowed is each once"),
        (["sweep", "tiny", "--seeds", "-1"], "--seeds is -1; allowed is a whole number"),
        (["sweep", "tiny", "--target", "2"], "--target is 2.0; allowed is more than 0 and less than 1"),
        (["sweep", "tiny", "--json", "none/x"], "cannot write 'none/x'"),
        (["compare", "nothing"], "'nothing' is not a run directory"),
        (["compare"], "the following arguments are required: RUN"),
    ],
)
def test_refusals_write_nothing(arguments, message, capsys):
    assert main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert message in said and not list(Path().rglob("*"))


def run_directory(name: str, accuracy: float | None, **fields) -> str:
    after = {"sums": {"greedy_accuracy": accuracy, "prompts": 8}}
    objects = {"config": config(name=name, **fields), "versions": {"commit": "abc"}}
    objects |= {} if accuracy is None else {"summary": {"after": after, "steps": 1}}
    return str(write_run(Path(name), [line(0), line(1, step_seconds=1.0)], **objects))


def test_runs_of_any_kind_are_compared(capsys):
    """Two seeds of one configuration are one variant; what has not ended and what comes twice are left out by name."""
    train, half = [{"seed": seed, "steps": 1} for seed in (0, 1)], {"nesting": {"skip_ratio": 0.5}}
    runs = [run_directory(f"full-{seed}", 0.5 + seed / 10, train=train[seed]) for seed in (0, 1)]
    runs += [run_directory(f"half-{seed}", 0.3 + seed / 10, train=train[seed], **half) for seed in (0, 1)]
    runs += [run_directory("again", 0.9, train=train[1]), run_directory("stopped", None)]
    runs += [run_directory("silent", None, train=train[1])]
    assert main(["compare", *runs, "--json", "out.json"]) == 0
    shown = capsys.readouterr()
    variants = json.loads(Path("out.json").read_text())["tasks"]["sums"]["variants"]
    assert list(variants) == ["nesting.skip_ratio 0.0", "nesting.skip_ratio 0.5"]
    assert variants["nesting.skip_ratio 0.5"]["difference"]["values"] == pytest.approx([-0.2, -0.2])
    assert "stopped: it has not ended: 1 of 4 steps" in shown.err
    assert "silent: it has no summary.json that can be read" in shown.err
    assert "again: it repeats configuration and seed of full-1" in shown.err
    assert "nesting.skip_ratio  0.0 | 0.5" in shown.out
    assert main(["compare", "stopped"]) == 2
    assert "none of these runs has a result that could be compared" in capsys.readouterr().err


def test_runs_of_different_tasks_are_kept_apart(capsys):
    one = run_directory("one", 0.5)
    sources = [{"name": "products", "task": "products"}]
    other = run_directory("other", 0.9, data={"sources": sources})
    assert main(["compare", one, other]) == 0
    shown = capsys.readouterr().out
    assert "These runs are of 2 tasks" in shown and "sums; products" in shown and "+0.400" not in shown


def test_labels_of_many_differences_are_names():
    fields = {f"x{index}": index for index in range(5)}
    other = result("", 0, 0.2, config=config(**fields), run_directory="runs/b")
    found = labelled([result("", 0, 0.1, run_directory="runs/a"), other])
    assert [each["label"] for each in found] == ["a", "b"]
    assert [each["label"] for each in labelled([result("", 0, 0.1)])] == ["a"]  # alone: the configuration's name
    assert len(without_repeats([*found, *found])[0]) == 2


def test_only_runs_of_the_same_configuration_with_a_checkpoint_are_continued(tmp_path, monkeypatch):
    path = write_run(tmp_path / "nano-1", [line(0)], config=nano().to_json())
    assert begun_run(nano(), tmp_path) is None
    monkeypatch.setattr(sweep_runs, "newest_checkpoint", lambda directory: 2)
    assert begun_run(nano(), tmp_path) == path and begun_run(nano(train__steps=9), tmp_path) is None


@pytest.mark.slow
def test_a_killed_sweep_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    """Variants share a warm start. One is stopped after three steps; its metrics end as those of an unbroken run."""
    warm = nano(loss=WITH_KL, warm_start=WarmStartConfig(steps=2, batch_size=4))
    one = grid([("one", warm)], [1], tmp_path / "one")[0].config
    straight = trained_run(one, tmp_path / "straight")
    step = Reinforcement.step

    def stopped(self, state, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, state, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Reinforcement, "step", stopped)
        trained_run(one, tmp_path / "one")
    again = trained_run(one, tmp_path / "one")
    assert len(list((tmp_path / "one" / "runs").iterdir())) == 1
    logs = [[comparable(line) for line in read_log(path / "metrics.jsonl")] for path in (straight, again)]
    assert logs[0] == logs[1] and len(logs[0]) == 5
    # Another variant of the seed begins with the same weights, and a run that is complete is not trained again.
    (start,) = (tmp_path / "one" / "starts").glob("*.safetensors")
    made = start.stat().st_mtime_ns
    deeper = nano(loss=WITH_KL, train__seed=1, nesting__skip_ratio=0.4, warm_start=warm.warm_start)
    other = trained_run(deeper, tmp_path / "one")
    assert start.stat().st_mtime_ns == made and list((tmp_path / "one" / "starts").glob("*.safetensors")) == [start]
    first = [read_log(path / "metrics.jsonl")[0] for path in (again, other)]
    assert first[0] == first[1]
    assert trained_run(one, tmp_path / "one") == again
    # Continued by itself, the run has the shared start as its reference, which its own configuration does not name.
    model = shared_start(one, tmp_path / "one" / "starts", one.warm_start).policy.model
    with open_trainer(Run(again).config(), "", resume=again) as run:
        kept, began = jax.tree.leaves(run.state.learner.reference), jax.tree.leaves(split_trainable(model)[1])
        for a, b in zip(kept, began, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_interrupted_sweep_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(config, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "trained_run", interrupted)
    assert main(["sweep", "tiny", "--seeds", "0"]) == INTERRUPTED
    assert "to continue: the same command" in capsys.readouterr().err
