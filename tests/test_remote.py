"""Runs, models and data on gs://, against a store in the memory of the test."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("google.cloud.storage", reason="the extra `gcs` is not installed")


from nested_reft import api, paths, remote_files, run_mirror
from nested_reft.api import Run
from nested_reft.checkpoints import CheckpointError, Checkpoints, checkpoint_numbers
from nested_reft.cli.main import main
from nested_reft.data.jsonl import read_jsonl
from nested_reft.host_values import Block
from nested_reft.models.registry import resolve_model
from nested_reft.paths import address, is_remote, local_path
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.run_mirror import local_run
from nested_reft.training.config import load_config, with_absolute_paths
from scripts.tpu import newest_run
from tests.fake_gcs import serving
from tests.process_pairs import run_together
from tests.training.runs import assert_equal_arrays, comparable, lines_of, nano

CONFIG = {"train": {"keep_checkpoints": 2}}
RUNS = "gs://bucket/runs"
NO_EVALUATION = {"evaluation__samples_per_prompt": 0, "evaluation__every_steps": 100}


@pytest.fixture
def store(monkeypatch, tmp_path):
    """A bucket; what fails is given up after a moment, and local copies are this test's own."""
    with serving() as found:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.url)
        monkeypatch.setattr(remote_files, "RETRY_SECONDS", 0.1)
        on_machine(monkeypatch, tmp_path / "first machine")
        yield found


def on_machine(monkeypatch, path):
    """From here on, everything happens on another machine: nothing is here yet, and its processes are others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    monkeypatch.setattr(run_mirror, "_place", lambda: path.name)
    paths._fetched.cache_clear()


def save(run, checkpoints, number, **host):
    """What a trainer does with a step: a line, a checkpoint, its copy."""
    run.log_metrics(number, {"reward": 0.5})
    run.wait_copied()
    checkpoints.save(number, {"a": jnp.full(3, number)}, {"marks": run.marks()} | host)
    run.copy(number)


@contextmanager
def opened(path=None):
    """A new run, or one to go on with, and its checkpoints."""
    run = RunDirectory.create(RUNS, "tiny", CONFIG) if path is None else RunDirectory(path)
    with closing(run), Checkpoints(run.path / "checkpoints", keep=2) as checkpoints:
        yield run, checkpoints


def remote_numbers(store, run):
    """Numbers of the remote checkpoints with a seal."""
    names = store.below(f"{run.removeprefix('gs://bucket/')}/checkpoints/")
    return sorted(int(name.split("/")[0]) for name in names if name.endswith("/checksums.json"))


def test_paths_are_taken_for_what_they_are():
    assert is_remote("gs://b-1/x") and is_remote(Path("gs://b-1/x")) and not is_remote("runs/gs:/x")
    assert address(Path("gs://b-1/x/y/")) == "gs://b-1/x/y" and address("gs://b-1") == "gs://b-1"
    for wrong in ("gs://", "gs://b-1/../x", "gs://b-1/a//b", "gs://B/x"):
        with pytest.raises(ValueError, match=r"allowed is gs://BUCKET/NAME"):
            address(wrong)
    with pytest.raises(ValueError, match=r"'s3://b/x' cannot be used; allowed are local paths and gs://"):
        local_path("s3://b/x")


def test_where_a_remote_path_makes_no_sense_it_is_refused_by_name(capsys, tmp_path):
    refused = {
        ("configs", "--json", "gs://b-1/x"): "--json is 'gs://b-1/x'; allowed is a local path",
        ("export", "run", "gs://b-1/x"): "directory is 'gs://b-1/x'; allowed is a local path",
        ("train", "gs://b-1/x.py"): "the configuration is 'gs://b-1/x.py'; allowed is a local path",
        ("train", "tiny", "--reward.function", "gs://b-1/x.py:f"): "reward.function is 'gs://b-1/x.py'; allowed is a",
    }
    for arguments, message in refused.items():
        assert main(list(arguments)) == 2
        assert message in capsys.readouterr().err


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, capsys):
    remote_files._client_of.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    monkeypatch.delattr("google.cloud.storage", raising=False)
    assert main(["report", "gs://bucket/run"]) == 2
    assert "pip install 'nested_reft[gcs]'" in capsys.readouterr().err


def test_files_come_and_go_whole(store, tmp_path):
    big, back = tmp_path / "big", tmp_path / "a/back"
    big.write_bytes(os.urandom(20 << 20))  # more than one request takes
    generation = remote_files.send(big, "gs://bucket/big")
    assert store.objects["big"] == big.read_bytes()
    remote_files.fetch("gs://bucket/big", generation, back)
    assert back.read_bytes() == big.read_bytes() and [path.name for path in back.parent.iterdir()] == ["back"]
    with pytest.raises(remote_files.MissingError, match="'gs://bucket/big' does not exist"):
        remote_files.fetch("gs://bucket/big", generation + 1, back)
    with pytest.raises(remote_files.ChangedError):
        remote_files.write("gs://bucket/big", b"", 0)
    store.fault = lambda method, name: 403
    with pytest.raises(remote_files.RemoteError, match=r"'gs://bucket/big' cannot be used: 403 .*it was told"):
        remote_files.entry("gs://bucket/big")


def test_data_and_models_are_fetched_once_and_again_when_they_change(store, monkeypatch, tmp_path):
    store.put("data/x.jsonl", b'{"question": "1+1", "answer": "2"}\n')
    store.put("models/m/config.json", b"{}")
    store.put("models/m/deep/file", b"deep")

    def answers():
        found = read_jsonl("gs://bucket/data/x.jsonl", "f", "s", "question", "answer", None)
        return [example.answer for example in found]

    assert answers() == answers() == ["2"]
    fetches = len([name for method, name in store.requests if name == "data/x.jsonl"])
    store.put("data/x.jsonl", b'{"question": "1+1", "answer": "3"}\n')
    assert answers() == ["2"] and len([n for _, n in store.requests if n == "data/x.jsonl"]) == fetches
    with pytest.raises(ValueError, match=r"config\.json"):  # the copy of the directory is there, and is no model
        resolve_model("gs://bucket/models/m")
    copy = local_path("gs://bucket/models/m")
    assert (copy / "deep/file").read_bytes() == b"deep"
    # Another process asks again, and fetches what is new alone.
    paths._fetched.cache_clear()
    del store.objects["models/m/deep/file"], store.generations["models/m/deep/file"]
    store.requests.clear()
    assert answers() == ["3"] and not (local_path("gs://bucket/models/m") / "deep").exists()
    assert ("GET", "models/m/config.json") not in store.requests
    with pytest.raises(FileNotFoundError, match="'gs://bucket/none' does not exist"):
        local_path("gs://bucket/none")
    kept = with_absolute_paths(load_config("tiny", model={"name": "gs://bucket/models/m", "shape": None}), tmp_path)
    assert kept.model.name == "gs://bucket/models/m"


def test_a_checkpoint_is_copied_before_its_seal_and_old_ones_go(store, monkeypatch, tmp_path):
    block = Block("replay-1", {"x": np.arange(3)})
    with opened() as (run, checkpoints):
        url, name = run.address, run.address.removeprefix("gs://bucket/")
        assert url.startswith(f"{RUNS}/tiny-") and (run.path / "remote.json").is_file()
        save(run, checkpoints, 1, buffer=block)
        save(run, checkpoints, 2, buffer=Block("replay-1"))
        run.wait_copied()
        assert run.newest_checkpoint() == 2
        assert f"{name}/checkpoints/blocks/replay-1.safetensors" in store.objects
        save(run, checkpoints, 3)
        save(run, checkpoints, 4)
    assert remote_numbers(store, url) == [3, 4] and not store.below(f"{name}/checkpoints/blocks")
    sent = [path for method, path in store.requests if method == "POST" and path.startswith(f"{name}/checkpoints/4/")]
    assert sent[-1] == f"{name}/checkpoints/4/checksums.json" and len(sent) > 3
    # The log grew, so that only its ends were sent.
    assert store.objects[f"{name}/metrics.jsonl"] == (run.path / "metrics.jsonl").read_bytes()
    assert f"{name}/metrics.jsonl.end" in [path for _, path in store.requests]
    assert not [path for path in store.objects if path.endswith((".end", ".partial", "remote.json"))]
    # Elsewhere, the newest alone is fetched, and it is as it was.
    on_machine(monkeypatch, tmp_path / "second machine")
    copy = local_run(url)
    assert checkpoint_numbers(copy / "checkpoints") == [4]
    with opened(copy) as (run, checkpoints):
        assert checkpoints.restore_host(4)["marks"] == run.marks()
        save(run, checkpoints, 5)
    # The one before stays until there are enough newer ones.
    assert remote_numbers(store, url) == [4, 5]
    assert [line["step"] for line in read_log(local_run(url) / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    # The first machine's copy is not part of the run any more.
    on_machine(monkeypatch, tmp_path / "first machine")
    assert checkpoint_numbers(local_run(url) / "checkpoints") == [5]


def test_a_damaged_remote_checkpoint_is_passed_over(store, monkeypatch, tmp_path):
    with opened() as (run, checkpoints):
        url, name = run.address, run.address.removeprefix("gs://bucket/")
        save(run, checkpoints, 1)
        save(run, checkpoints, 2)
    del store.objects[f"{name}/checkpoints/2/host/metadata"], store.generations[f"{name}/checkpoints/2/host/metadata"]
    on_machine(monkeypatch, tmp_path / "second machine")
    with opened(local_run(url)) as (run, checkpoints):
        assert checkpoints.numbers() == [2, 1]
        assert checkpoints.restore_host(1)["marks"]
        checkpoints.set_aside_after(1)
        save(run, checkpoints, 2)
    assert remote_numbers(store, url) == [1, 2]
    on_machine(monkeypatch, tmp_path / "third machine")
    assert checkpoint_numbers(local_run(url) / "checkpoints") == [2]


def test_half_a_checkpoint_is_none(store, monkeypatch, tmp_path):
    """A process that is killed while it copies leaves files without a seal."""
    with opened() as (run, checkpoints):
        url, name = run.address, run.address.removeprefix("gs://bucket/")
        save(run, checkpoints, 1)
    store.put(f"{name}/checkpoints/2/host/metadata", b"half")
    on_machine(monkeypatch, tmp_path / "second machine")
    with opened(local_run(url)) as (run, checkpoints):
        assert checkpoints.numbers() == [1]
        run.copy()
    assert not store.below(f"{name}/checkpoints/2/")


def test_what_cannot_be_copied_is_heard_and_damages_nothing(store):
    with opened() as (run, checkpoints):
        url = run.address
        save(run, checkpoints, 1)
        run.wait_copied()
        store.fault = lambda method, name: 403 if method == "POST" and "/checkpoints/" in name else None
        save(run, checkpoints, 2)
        with pytest.raises(
            CheckpointError, match=f"could not be copied to '{url}': .*403.* It is whole in '{run.path}'"
        ):
            run.wait_copied()
    assert remote_numbers(store, url) == [1]
    store.fault = lambda method, name: None
    # On the same machine the run goes on from what only this one has.
    with opened(local_run(url)) as (run, checkpoints):
        assert checkpoints.numbers() == [2, 1]
        run.copy()
    assert remote_numbers(store, url) == [1, 2]


def test_the_end_of_a_run_waits_for_its_copy_and_says_when_it_fails(store):
    run = RunDirectory.create(RUNS, "tiny", CONFIG)
    run.wait_copied()
    store.fault = lambda method, name: 403 if name.endswith("summary.json") else None
    run.write_summary({"steps": 1})
    with pytest.raises(CheckpointError, match=r"summary\.json' cannot be used"):
        run.close()
    assert json.loads(store.objects[f"{run.address.removeprefix('gs://bucket/')}/owner.json"])["released"]


def test_one_process_at_a_time_owns_a_run(store, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(run_mirror, "BEAT_SECONDS", 0.1)
    first = RunDirectory.create(RUNS, "tiny", CONFIG)
    first.wait_copied()
    on_machine(monkeypatch, tmp_path / "second machine")
    copy = local_run(first.address)
    with pytest.raises(
        ValueError, match=rf"'{first.address}' is in use by process {os.getpid()} on host '.+'; wait un"
    ):
        RunDirectory(copy)
    # The first machine loses its network, which looks like its death.
    monkeypatch.setattr(run_mirror, "STALE_SECONDS", 1.0)
    beat = run_mirror.Owner.beat
    monkeypatch.setattr(run_mirror.Owner, "beat", lambda owner: None)
    time.sleep(1)  # one may be under way
    with closing(RunDirectory(copy)):
        assert "was not left in order by process" in caplog.text
        monkeypatch.setattr(run_mirror.Owner, "beat", beat)
        # Back again, it hears that the run is not its own any more, and writes nothing.
        with pytest.raises(CheckpointError, match="another process has taken it over"):
            for _ in range(600):  # a minute at most
                first.check_copied()
                time.sleep(0.1)
    first.close()
    # A run that was left in order is free at once.
    monkeypatch.setattr(run_mirror, "STALE_SECONDS", 1000.0)
    RunDirectory(copy).close()


def test_two_runs_of_one_second_get_two_names(store, monkeypatch, tmp_path):
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    first = RunDirectory.create(RUNS, "tiny", CONFIG)
    on_machine(monkeypatch, tmp_path / "second machine")
    second = RunDirectory.create(RUNS, "tiny", CONFIG)
    assert [first.address, second.address] == [f"{RUNS}/tiny-20260101-000000", f"{RUNS}/tiny-20260101-000000-2"]
    for run in (first, second):
        run.close()


KILLED = """
import json, os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from nested_reft.api import open_trainer
from nested_reft.training.config import Config

def on_step(found):
    if found.number == 3:
        run.checkpoints.wait()
        run.run_directory.wait_copied()
        os.kill(os.getpid(), signal.SIGKILL)

run = open_trainer(Config.from_json(json.loads(sys.stdin.read())), "gs://bucket/runs", on_step=on_step)
run.run()
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_on_another_machine_as_if_nothing_had_happened(store, monkeypatch, tmp_path, capsys):
    config = nano(**NO_EVALUATION)
    straight = api.train(config, runs=str(tmp_path / "runs"))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps(config.to_json()),
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env=os.environ,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (url,) = {f"{RUNS}/{name.split('/')[0]}" for name in store.below("runs/")}
    assert remote_numbers(store, url) == [0, 2]
    on_machine(monkeypatch, tmp_path / "second machine")
    monkeypatch.setattr(run_mirror, "STALE_SECONDS", 1.0)  # nobody says that the run is free
    api.train(Run(url))
    said = capsys.readouterr().out
    assert f"run directory: {url}" in said and "continuing after step 2 of 4" in said
    assert remote_numbers(store, url) == [2, 4]
    on_machine(monkeypatch, tmp_path / "third machine")
    resumed = Run(url)
    assert resumed.summary()["steps"] == 4 and not (resumed.path / "checkpoints/2").exists()
    for name in ("metrics", "samples"):
        lines = [[comparable(line) for line in lines_of(run.path, name)] for run in (straight, resumed)]
        assert lines[0] == lines[1] and lines[0]
    assert_equal_arrays(nnx.state(resumed.policy().model), nnx.state(straight.policy().model))
    # What is complete stays as it is.
    store.requests.clear()
    assert main(["train", "--resume", url]) == 0
    assert {method for method, _ in store.requests} == {"GET"}


def test_a_run_that_cannot_be_copied_ends_with_a_line_and_goes_on_here(store, monkeypatch, tmp_path, capsys):
    config = nano(**NO_EVALUATION, train__checkpoint_every=1, train__steps=3)
    monkeypatch.setattr("nested_reft.cli.train.load_config", lambda name: config)
    monkeypatch.setattr("nested_reft.cli.train._report", lambda run: None)  # which takes long
    store.fault = lambda method, name: 403 if method == "POST" and "/checkpoints/2/" in name else None
    assert main(["train", "nano", "--runs", RUNS]) == 1
    said = capsys.readouterr().err
    (url,) = {f"{RUNS}/{name.split('/')[0]}" for name in store.below("runs/")}
    assert f"could not be copied to '{url}'" in said and f"to continue: nested-reft train --resume {url}" in said
    assert max(remote_numbers(store, url)) == 1
    store.fault = lambda method, name: None
    assert main(["train", "--resume", url]) == 0
    assert max(remote_numbers(store, url)) == 3
    # A bucket that cannot be used is refused before anything is loaded.
    assert main(["train", "nano", "--runs", "gs://other/x"]) == 2
    assert "'gs://other/x' does not exist" in capsys.readouterr().err


PAIR = """
import os, sys
os.environ["XDG_CACHE_HOME"] = "{machines} " + sys.argv[-1]
from contextlib import closing
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from nested_reft.checkpoints import Checkpoints
from nested_reft.run_directory import RunDirectory, SilentRunDirectory
from nested_reft.run_mirror import local_run
jax.devices()  # JAX lets processes wait here for each other
mesh, whole = jax.make_mesh((4,), ("x",)), np.arange(64.0, dtype=np.float32).reshape(8, 8)
a = jax.make_array_from_callback((8, 8), NamedSharding(mesh, PartitionSpec("x")), lambda index: whole[index])
url = "{url}"
if url:
    path = processes.agreed(lambda: local_run(url))
    run = RunDirectory(path) if processes.is_writer() else SilentRunDirectory(path)
else:
    run = RunDirectory.create("{runs}", "tiny", {config}) if processes.is_writer() else None
    address = processes.broadcast_text(None if run is None else run.address)
    run = run or SilentRunDirectory.at(address)
with closing(run), Checkpoints(run.path / "checkpoints", 2, exchange=run.exchange()) as checkpoints:
    found = checkpoints.numbers()
    print(found)
    if found:
        a = checkpoints.restore_some(found[0], {{"a": a}})["a"]
        checkpoints.set_aside_after(found[0])
    first = found[0] + 1 if found else 1
    for number in (first, first + 1):
        a = a + 1
        run.wait_copied()
        checkpoints.save(number, {{"a": a}}, {{"marks": run.marks()}})
        run.copy(number)
print(sorted(path.name for path in (run.path / "checkpoints").iterdir()))
processes.end_together(0)
"""


@pytest.mark.slow
def test_processes_without_a_shared_directory_write_one_checkpoint(store, tmp_path):
    """As the hosts of a pod, each of which has a disk of its own; then other hosts go on."""

    def both(machines, url=""):
        code = PAIR.format(machines=tmp_path / machines, url=url, runs=RUNS, config=CONFIG)
        pair = run_together(code, devices=2)
        assert [process.returncode for process in pair] == [0, 0], pair[0].stderr + pair[1].stderr
        return [process.stdout.splitlines()[-2:] for process in pair]

    # The second process keeps nothing of what it wrote.
    assert both("host") == [["[]", "['1', '2']"], ["[]", "[]"]]
    (url,) = {f"{RUNS}/{name.split('/')[0]}" for name in store.below("runs/")}
    assert remote_numbers(store, url) == [1, 2] and not any("/parts/" in name for name in store.objects)
    # Each of the other hosts has fetched the newest one.
    assert both("other host", url) == [["[2]", "['3', '4']"], ["[2]", "['2']"]]
    assert remote_numbers(store, url) == [3, 4] and not any("/parts/" in name for name in store.objects)
    with Checkpoints(local_run(url) / "checkpoints", keep=2) as checkpoints:
        found = checkpoints.restore_some(4, {"a": jnp.zeros((8, 8))})
    np.testing.assert_array_equal(found["a"], np.arange(64.0).reshape(8, 8) + 4)


def test_scripts_find_the_newest_run_that_can_be_continued(store, capsys):
    assert newest_run.newest_run(RUNS) is None
    for name in ("000002/config.json", "000002/checkpoints/3/arrays/a", "000001/checkpoints/9/checksums.json"):
        store.put(f"runs/tiny-20260101-{name}", b"{}")  # not sealed yet, and without a configuration
    assert newest_run.main([RUNS]) == 0 and capsys.readouterr().out == ""
    for name in ("000001/config.json", "000001/checkpoints/10/checksums.json"):
        store.put(f"runs/tiny-20260101-{name}", b"{}")
    assert newest_run.main([f"{RUNS}/"]) == 0
    assert capsys.readouterr().out == f"10 {RUNS}/tiny-20260101-000001\n"
    # What may pass has another code than a mistake: scripts try again.
    store.fault = lambda method, name: 503
    assert newest_run.main([RUNS]) == 1
    store.put("runs/other-20260101-000001/config.json", b"{}")
    store.fault = lambda method, name: None
    assert newest_run.main([RUNS]) == 2 and newest_run.main(["s3://b/x"]) == 2
