"""The scripts that the Makefile sets environments up with."""

import fnmatch
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import oldest_constraints, pycosat_placeholder

ROOT = Path(__file__).parents[1]
SETUP = """
from setuptools import find_packages, setup

MORE = ["e>=5"]
setup(name="x", packages=find_packages(), install_requires=["b>=1.2.3", "A>=0.5"], extras_require={
    "test": [*MORE, "c==2.0"], "tpu": ["jax[tpu]"]})
"""


def test_the_lowest_of_every_range(tmp_path, capsys):
    (tmp_path / "setup.py").write_text(SETUP)
    oldest_constraints.main(["--setup", str(tmp_path / "setup.py")])
    assert capsys.readouterr().out.split() == ["A==0.5", "b==1.2.3", "c==2.0", "e==5"]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (["tset"], "extra is 'tset'; known are test, tpu"),
        (["tpu"], r"requirement is 'jax\[tpu\]'; allowed is 'name>=version' or 'name==version'"),
    ],
)
def test_what_has_no_lowest_is_refused(extras, message, tmp_path):
    (tmp_path / "setup.py").write_text(SETUP)
    setup = oldest_constraints.setup_arguments(tmp_path / "setup.py")
    with pytest.raises(ValueError, match=message):
        oldest_constraints.oldest_constraints(setup, extras)


def test_every_pin_lies_in_its_range():
    """constraints.txt pins at or above the lower bounds of setup.py."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {normal(name): version for name, version in pins.items()}
    setup = oldest_constraints.setup_arguments(ROOT / "setup.py")
    lowest = oldest_constraints.oldest_constraints(setup, ["test", "docs"])
    for name, version in (line.split("==") for line in lowest):
        if normal(name) in pins:
            assert numbers(pins[normal(name)]) >= numbers(version), name


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def test_the_tpu_compiler_is_the_one_that_jax_asks_for():
    """Of a later one, XLA cannot read every program back."""
    pinned = re.findall(r"^jax==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if [importlib.metadata.version("jax")] != pinned:
        pytest.skip("another JAX than the pinned one asks for another compiler")
    asked = re.findall(r"^libtpu==([\w.*]+)", "\n".join(importlib.metadata.requires("jax") or []), re.MULTILINE)
    taken = re.findall(r"^LIBTPU \?= libtpu==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(asked) == len(taken) == 1 and fnmatch.fnmatch(taken[0], asked[0])


def test_make_runs_the_placeholder_script():
    """`make -n` shows commands and runs none; an environment that is not there has to be set up."""
    # Under `make test`, the inner make would name the directories that it enters and leaves.
    command = ["make", "-n", "--no-print-directory", "run", "VENV=.venv-absent"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    lines = shown.splitlines()
    placed = lines.index(".venv-absent/bin/python scripts/pycosat_placeholder.py")
    assert "install -c constraints.txt -e" in lines[placed + 1]  # before reasoning-gym asks for pycosat
    assert lines[-1] == ".venv-absent/bin/nested-reft train smollm2_step_sum"


def test_the_placeholder_counts_as_pycosat_and_says_what_is_missing(tmp_path):
    version = pycosat_placeholder.pinned_version("jax==1\npycosat==0.6.6\n")
    pycosat_placeholder.install_placeholder(tmp_path, version)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == ("pycosat", "0.6.6+placeholder")
    assert {str(file) for file in found.files or ()} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    }  # what pip uninstalls
    code = "import pycosat\ntry: pycosat.itersolve([])\nexcept ImportError as error: print(error)"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert "install a C compiler" in printed.stdout


@pytest.mark.parametrize(
    ("installed", "compiler", "needed"),
    [(True, False, False), (False, True, False), (False, False, True)],
)
def test_the_placeholder_is_for_machines_that_cannot_build(installed, compiler, needed, monkeypatch, tmp_path):
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(pycosat_placeholder.importlib.util, "find_spec", lambda _: object() if installed else None)
    monkeypatch.setattr(pycosat_placeholder.shutil, "which", lambda _: "/bin/cc" if compiler else None)
    monkeypatch.setattr(pycosat_placeholder.sysconfig, "get_path", lambda _: str(tmp_path))
    assert pycosat_placeholder.placeholder_needed() is needed


def test_constraints_without_pycosat_are_refused():
    with pytest.raises(ValueError, match="no line 'pycosat==VERSION'"):
        pycosat_placeholder.pinned_version("jax==1\n")
