"""Runs of two processes with four devices each: they are the run of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.run_directory import read_log
from tests.process_pairs import free_port
from tests.training.runs import comparable

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 540
SMALL = [
    *("--data.prompts-per-batch", "8", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "8", "--warm-start.steps", "0"),
    *("--warm-start.batch-size", "8", "--optimizer.warmup-steps", "0", "--evaluation.batch-size", "8"),
]


def start(arguments: list[str], directory: Path, devices: int, port: int | None = None, index: int = 0):
    """A `train` command on so many devices, as one of two processes where a port is given."""
    joining = (
        [] if port is None else ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(index)]
    )
    # A proxy would be asked for the coordinator's address.
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "nested_reft.command", "train", *arguments, *joining],
        env=environment,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pair(arguments: list[list[str]], directory: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [start(each, directory, 4, port, index) for index, each in enumerate(arguments)]


def ended(running: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code and output of each."""
    try:
        found = [process.communicate(timeout=LIMIT_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]


def lines(directory: Path, name: str = "metrics") -> list[dict[str, Any]]:
    (run,) = (directory / "runs").iterdir()
    return [comparable(line) for line in read_log(run / f"{name}.jsonl")]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """Tokens are equal, and every metric to the rounding of sums in another order."""
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    arguments = ["tiny", *SMALL, "--train.steps", "2", "--mesh.data", "8"]
    for code, _, err in ended([start(arguments, places[0], 8)]):
        assert code == 0, err
    found = ended(pair([arguments, arguments], places[1]))
    assert [code for code, _, _ in found] == [0, 0], found
    # One process shows and writes; the collectives of CPUs have lines of their own.
    said = [line for line in found[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert "run directory: " in found[0][1] and not said
    samples = [[(line["prompt"], line["text"], line["reward"]) for line in lines(at, "samples")] for at in places]
    assert samples[0] == samples[1] and len(samples[0]) == 2 * 4 * 4
    for one, two in zip(*map(lines, places), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            expected = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert two[name] == expected, name
    (run,) = (places[1] / "runs").iterdir()
    assert newest_checkpoint(run / "checkpoints") == 2 and json.loads((run / "summary.json").read_text())


@pytest.mark.slow
def test_processes_that_differ_are_refused_with_the_field(tmp_path):
    arguments = ["tiny", *SMALL, "--mesh.data", "8"]
    found = ended(pair([arguments, [*arguments, "--train.seed", "1"]], tmp_path))
    assert [code for code, _, _ in found] == [2, 2], found
    for _, _, err in found:
        assert "process 1 has 1 for train.seed, and process 0 has 0; start all processes with the same" in err
    assert not (tmp_path / "runs").exists()
