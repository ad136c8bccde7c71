"""Runs of two processes with four devices each: they are the run of one process."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from nested_reft.api import open_trainer
from nested_reft.bridge_file import FittedBridges, save_bridges
from nested_reft.checkpoints import checkpoint_numbers, newest_checkpoint
from nested_reft.cli.overrides import override
from nested_reft.command import environment_of
from nested_reft.models.fingerprint import fingerprint
from nested_reft.reward_model import FACTS
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training.config import Config, load_config
from nested_reft.training.setup import prepare, run_config
from nested_reft.training.trainer import Trainer
from tests.process_pairs import free_port
from tests.training.preference_runs import preferences, write_pairs
from tests.training.runs import comparable

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 540
DEVICES = 4  # of each process
# Half of the reward is that of a reward model, half that of a function, so that every update moves the model. Bridges
# of a file stand in for the layers that are left out.
SMALL = [
    *("--data.prompts-per-batch", "8", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "8", "--warm-start.steps", "0"),
    *("--warm-start.batch-size", "8", "--optimizer.warmup-steps", "0", "--evaluation.batch-size", "8"),
    *("--optimizer.learning-rate", "0.01", "--replay.capacity", "64", "--replay.recent-share", "0.5"),
    *("--reward.checker", "function", "--reward.function", f"{ROOT}/tests/rewards/reward_functions.py:even"),
    *("--reward.workers", "1", "--train.steps", "3", "--train.checkpoint-every", "1", "--mesh.data", f"{2 * DEVICES}"),
    *("--train.keep-checkpoints", "9", "--train.save-seconds", "600", "--nesting.bridge.kind", "per_layer"),
]
TRAIN = ("-m", "nested_reft.command")


def start(arguments: list[str], directory: Path, port: int, index: int, program: tuple[str, ...] = TRAIN):
    """A `train` command, as one of two processes."""
    joining = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(index)]
    return subprocess.Popen(
        [sys.executable, *program, "train", *arguments, *joining],
        env=environment_of(DEVICES) | {"PYTHONPATH": str(ROOT)},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code and output of each; the collectives of CPUs have lines of their own, which are left out."""
    try:
        found = [process.communicate(timeout=LIMIT_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    out = ["".join(line for line in texts[0].splitlines(True) if not line.startswith("[Gloo]")) for texts in found]
    return [(process.returncode, said, err) for process, said, (_, err) in zip(running, out, found, strict=True)]


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [comparable(line) for line in read_log(run / f"{name}.jsonl")]


def assert_same_run(run: Path, expected: Path) -> None:
    """Tokens are equal, and every number to the rounding of sums in another order."""
    texts = [[(line["step"], line["prompt"], line["text"]) for line in lines(at, "samples")] for at in (run, expected)]
    assert texts[0] == texts[1] and len(texts[0]) == 3 * 4 * 4
    for name in ("metrics", "samples"):
        for one, two in zip(lines(expected, name), lines(run, name), strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                close = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
                assert two[key] == close, (name, one["step"], key)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[str]:
    """Arguments of all runs, with a reward model and bridges that were not trained: they are as good as any."""
    directory = tmp_path_factory.mktemp("model")
    config = preferences(write_pairs(directory / "pairs.jsonl"), "bradley_terry")
    with Trainer(prepare(config), RunDirectory.create(directory, "model", config.to_json())) as trainer:
        learner, path = trainer.open().state.learner, trainer.run_directory.path

        def drawn(place: Any, array: jax.Array) -> jax.Array:
            is_head = "value_head" in jax.tree_util.keystr(place) and array.ndim
            return jax.random.normal(jax.random.key(0), array.shape) if is_head else array

        trainable = jax.tree_util.tree_map_with_path(drawn, learner.state.trainable)
        learner.state = dataclasses.replace(learner.state, trainable=trainable)
        trainer.save()
    (path / FACTS).write_text(json.dumps({"mean": 0.0, "std": 1.0}))
    policy = prepare(override(load_config("tiny"), SMALL)).policy
    drawn_stack = {
        name: 0.1 * jax.random.normal(jax.random.key(1), value.shape)
        for name, value in policy.model.stacked_bridges().items()
    }
    fitted = FittedBridges(drawn_stack, np.zeros(policy.num_layers), "tiny", fingerprint(policy.model), None)
    save_bridges(directory / "b.safetensors", fitted)
    files = ["--nesting.bridge.file", str(directory / "b.safetensors"), "--reward.model", str(path)]
    return ["tiny", *SMALL, *files]


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    """The run of one process."""
    config: Config = override(load_config(small[0]), small[1:])
    trainer = open_trainer(config, str(tmp_path_factory.mktemp("alone")))
    trainer.run()
    return trainer.run_directory.path


@pytest.mark.slow
def test_two_processes_are_one_run(small, alone, tmp_path):
    """With replay, a reward model and bridges of a file, and with a model that moves."""
    port = free_port()
    found = ended([start(small, tmp_path, port, index) for index in range(2)])
    assert [code for code, _, _ in found] == [0, 0], found
    # One process shows and writes.
    assert "run directory: " in found[0][1] and not found[1][1]
    (run,) = (tmp_path / "runs").iterdir()
    assert_same_run(run, alone)
    assert all(line["reward"] for line in lines(run)[1:]) and all(line["gradient_norm"] > 0 for line in lines(run)[1:3])
    assert all(line["bridged_layers"] for line in lines(run)[1:])
    assert newest_checkpoint(run / "checkpoints") == 3 and json.loads((run / "summary.json").read_text())


@pytest.mark.slow
def test_a_run_moves_to_two_processes_which_a_signal_to_one_ends_and_back(small, alone, tmp_path):
    """From one process's checkpoint of step 1, since that of step 2 is damaged, to one of step 2 of both."""
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "summary.json").unlink()
    for path in (run / "checkpoints" / "2" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"not this")
    # Process 1 gets a SIGTERM in its first step, which is the second of the run.
    signalled = (str(ROOT / "scripts" / "kill_loop.py"), "--as-child")
    call, port = ("nested_reft.training.learner.Learner.batch", "1", "0.0", "SIGTERM", "--"), free_port()
    resume = ["--resume", str(run)]
    running = [start(resume, tmp_path, port, 0), start(resume, tmp_path, port, 1, (*signalled, *call))]
    found = ended(running)
    assert [code for code, _, _ in found] == [75, 75], found
    assert "continuing after step 1 of 3" in found[0][1] and not found[1][1]
    assert "2' is not used; it is '2.damaged' now" in found[0][2] and "is damaged" not in found[1][2]
    assert checkpoint_numbers(run / "checkpoints") == [2, 1, 0] and lines(run)[-1]["step"] == 2
    with open_trainer(run_config(run), str(tmp_path), resume=run) as trainer:
        assert trainer.state.step == 2
        trainer.run()
    assert_same_run(run, alone)


@pytest.mark.slow
def test_processes_that_differ_are_refused_with_the_field(tmp_path):
    arguments, port = ["tiny", "--mesh.data", f"{2 * DEVICES}"], free_port()
    other = [*arguments, "--train.seed", "1"]
    found = ended([start(each, tmp_path, port, index) for index, each in enumerate((arguments, other))])
    assert [code for code, _, _ in found] == [2, 2], found
    for _, _, err in found:
        assert "process 1 has 1 for train.seed, and process 0 has 0; start all processes with the same" in err
    assert not (tmp_path / "runs").exists()
