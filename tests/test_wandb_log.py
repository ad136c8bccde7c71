"""Weights & Biases gets what TensorBoard gets, and whatever it does, the run and its logs are as they would be."""

import json
import math
import struct
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from nested_reft import wandb_log
from nested_reft.cli.main import main
from nested_reft.run_directory import RunDirectory, read_log

CONFIG = {"train": {"wandb_project": "trial", "seed": 3}}
FAILS = RuntimeError("no such\nhost")


class Settings(SimpleNamespace):
    """What W&B is set to."""

    model_fields = ("finish_timeout",)


class StandIn:
    """W&B's package as far as it is used here; every run that was opened is kept with what it was told."""

    Settings = Settings
    run = None

    def __init__(self):
        self.runs, self.before_init, self.before_log = [], lambda mode: None, lambda step: None

    def setup(self, settings):
        assert settings.silent

    def teardown(self):
        pass

    def Histogram(self, np_histogram):
        return np_histogram

    def init(self, **given):
        self.before_init(given["mode"])
        run = SimpleNamespace(given=given, lines=[], exit_code=None, url=None)
        run.log = lambda values, step, commit: (self.before_log(step), run.lines.append((step, values)), commit)
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    """The stand-in, in the place of the package."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def logged(run, *steps):
    for step in steps:
        run.log_metrics(step, {"reward": step / 4})


def test_it_gets_what_tensorboard_gets_and_the_configuration(wandb, tmp_path):
    metrics = {"reward": 0.5, "unscored": 2, "ess": math.nan, "warning": "far", "staleness_completions": [1, 0, 3]}
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        run.log_metrics(1, metrics)
        run.log_samples(1, [{"text": "secret"}])
        run.write_summary({})
    (found,) = wandb.runs
    bins = ([1, 0, 3], [-0.5, 0.5, 1.5, 2.5])
    assert found.lines == [(1, {"reward": 0.5, "unscored": 2.0, "staleness_completions": bins})]
    assert found.exit_code == 0
    given = found.given
    assert (given["project"], given["name"], given["config"]) == ("trial", run.path.name, CONFIG)
    assert given["dir"] == str(run.path) and given["mode"] is None and given["resume"] == "allow"
    settings = given["settings"]
    assert settings.console == "off" and settings.save_code is False and settings.disable_git and settings.disable_code


def test_a_histogram_has_no_more_bins_than_wandb_takes(wandb):
    """Of 600 ages the last 89 share one bin."""
    counts, edges = wandb_log._histogram(wandb, [1] * 600)
    assert len(counts) == 512 and len(edges) == 513 and counts[-2:] == [1, 89]


def test_a_continued_run_is_the_same_one_and_tells_its_whole_log(wandb, tmp_path):
    """Step 3 came after the checkpoint. The directory was moved meanwhile."""
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        logged(run, 0, 1, 2)
        marks = run.marks()
        logged(run, 3)
    moved = run.path.rename(tmp_path / "elsewhere")
    with closing(RunDirectory(moved)) as run:
        run.continue_from(2, marks)
        run.log_metrics(3, {"reward": 0.25})
        run.write_summary({})
    first, second = wandb.runs
    assert first.given["id"] == second.given["id"] and first.exit_code == 1
    assert second.lines == [(0, {"reward": 0.0}), (1, {"reward": 0.25}), (2, {"reward": 0.5}), (3, {"reward": 0.25})]
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as other:
        logged(other, 0)
    assert wandb.runs[2].given["id"] != first.given["id"]


def test_a_run_without_a_project_knows_nothing_of_it(wandb, tmp_path):
    for config in ({"train": {"wandb_project": None}}, {"train": {}}, {}):  # earlier versions had no such field
        with closing(RunDirectory.create(tmp_path, "tiny", config)) as run:
            logged(run, 0)
    assert wandb.runs == [] and not (run.path / "wandb.json").exists()


def test_without_network_or_account_the_run_is_an_offline_one(wandb, tmp_path, caplog):
    def before_init(mode):
        if mode is None:
            raise FAILS

    wandb.before_init = before_init
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        logged(run, 0, 1)
    (found,) = wandb.runs
    assert found.given["mode"] == "offline" and [step for step, _ in found.lines] == [0, 1]
    assert "cannot be reached (RuntimeError: no such host); the run is logged offline in" in caplog.text


def fail(_):
    raise FAILS


def end(_):
    raise SystemExit(3)


@pytest.mark.parametrize(("place", "does"), [("before_init", fail), ("before_init", end), ("before_log", fail)])
def test_whatever_it_raises_the_run_goes_on(place, does, wandb, tmp_path, caplog):
    setattr(wandb, place, does)
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        logged(run, 0, 1, 2)
    assert [line["step"] for line in read_log(run.path / "metrics.jsonl")] == [0, 1, 2]
    assert caplog.text.count("gets nothing more of this run") == 1


def test_one_that_hangs_is_not_waited_for(wandb, monkeypatch, tmp_path, caplog):
    """Also without an end there is room for so many steps only."""
    for name in ("INIT_SECONDS", "FINISH_SECONDS", "_SPARE_SECONDS"):
        monkeypatch.setattr(wandb_log, name, 0.05)
    monkeypatch.setattr(wandb_log, "MOST_WAITING", 2)
    answers = threading.Event()
    wandb.before_init = lambda mode: answers.wait(20)
    started = time.monotonic()
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        logged(run, 0, 1, 2, 3)
        assert run._wandb._waiting.qsize() == 2
    assert time.monotonic() - started < 10
    assert [line["step"] for line in read_log(run.path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert caplog.text.count("gets nothing more of this run") == 1
    answers.set()


@pytest.mark.parametrize(
    "package", [None, SimpleNamespace(), SimpleNamespace(Settings=SimpleNamespace(model_fields={}))]
)
def test_a_package_that_is_missing_or_too_old_is_refused_before_anything_is_loaded(
    package, monkeypatch, capsys, tmp_path
):
    """A folder `wandb` in the working directory is a package without `Settings`."""
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("nested_reft.api.prepare", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["train", "tiny", "--train.wandb-project", "trial", "--runs", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: train.wandb_project is 'trial', and wandb 0.27 or newer is not installed:"
        " pip install 'nested_reft[wandb]'"
    ]
    assert not (tmp_path / "runs").exists()


def test_the_package_itself_writes_the_values_into_the_run_directory(monkeypatch, tmp_path, caplog):
    pytest.importorskip("wandb", minversion="0.27", reason="wandb is not installed; it is the extra `wandb`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in there
    with closing(RunDirectory.create(tmp_path, "tiny", CONFIG)) as run:
        logged(run, 0, 1)
        run.write_summary({})
    time.sleep(1.1)  # W&B names its folders by the second
    with closing(RunDirectory(run.path)) as run:
        logged(run, 2)
    assert not caplog.records
    first, second = sorted((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name
    # W&B's own process writes the file, perhaps a little later, and ends with this one.
    end = time.monotonic() + 20
    while (len(history(first)), len(history(second))) != (2, 3) and time.monotonic() < end:
        time.sleep(0.1)
    assert history(first) == [(0, 0.0), (1, 0.25)] and history(second) == [(0, 0.0), (1, 0.25), (2, 0.5)]


def history(file):
    """(step, reward) of each line of history in one of W&B's files."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    data, place, found = file.read_bytes(), 7, []
    while place < len(data):
        # A record is a checksum in 4 bytes, its length in 2, its kind in 1, and its content; these fit into one block.
        _, length, _ = struct.unpack_from("<IHB", data, place)
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[place + 7 : place + 7 + length])
        for item in record.history.item:
            if "reward" in (item.key, *item.nested_key):
                found.append((record.history.step.num, json.loads(item.value_json)))
        place += 7 + length
    return found
