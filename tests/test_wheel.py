"""An installed wheel works without the checkout: it imports, lists its configurations and trains."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("nested_reft", "experiments/configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TRAIN = [
    *("train", "tiny", "--train.steps", "2", "--warm-start.steps", "2", "--evaluation.samples-per-prompt", "0"),
    *("--data.prompts-per-batch", "4", "--rollout.group-size", "4"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "4"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory that holds the wheel's files, built from a copy: building writes into the sources."""
    sources, wheels, target = (tmp_path_factory.mktemp(name) for name in ("sources", "wheels", "installed"))
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (sources / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, sources / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources))
    (wheel,) = wheels.glob("nested_reft-*.whl")
    pip("install", "--target", str(target), str(wheel))
    return target


def pip(command: str, *arguments: str) -> None:
    """Runs pip without an index: the packages that it needs are in the environment already."""
    run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *arguments], os.environ, ROOT)


def run(command: list[str], environment: Mapping[str, str], directory: Path) -> str:
    """What a command prints; its complaints are shown where it fails."""
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def from_wheel(installed, tmp_path):
    """Runs a command in an empty directory, where only the wheel's files can be found."""
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return lambda *command: run([*command], environment, tmp_path)


@pytest.mark.slow
def test_a_wheel_imports_lists_and_trains(installed, from_wheel, tmp_path):
    found = from_wheel(sys.executable, "-c", "import nested_reft; print(nested_reft.__file__)")
    assert Path(found.strip()).is_relative_to(installed)

    program = str(installed / "bin" / "nested-reft")
    listed = from_wheel(program, "configs")
    for path in (ROOT / "experiments" / "configs").glob("[!_]*.py"):
        assert path.stem in listed

    from_wheel(program, *TRAIN)
    (directory,) = (tmp_path / "runs").iterdir()
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps[-2:] == [1, 2] and (directory / "summary.json").is_file()


def test_the_wheel_holds_every_module(installed):
    """A package that setup.py forgets is missed only where there is no checkout."""
    modules = {path.relative_to(ROOT) for path in (ROOT / "nested_reft").rglob("*.py")}
    configs = {Path("nested_reft/configs") / path.name for path in (ROOT / "experiments" / "configs").glob("*.*")}
    assert {path for path in modules | configs if not (installed / path).is_file()} == set()
