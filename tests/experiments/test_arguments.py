"""What every experiment's command does with its options: it refuses in one line what cannot be, before any compute."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import experiments
import experiments.benchmarks
from experiments.arguments import Distinct, add_runs, folder, new_file
from nested_reft.cli.arguments import Parser
from nested_reft.cli.bad_input import BadInput

PACKAGES = (experiments, experiments.benchmarks)
NAMES = sorted(
    f"{package.__name__}.{path.stem}"
    for package in PACKAGES
    for path in Path(package.__path__[0]).glob("*.py")
    if "@command\n" in path.read_text(encoding="utf-8")
)
# Names and texts that need no form; whether there is such a thing is asked before any compute.
FREE = {"config", "folder", "data", "only", "check"}


class Parsed(Exception):
    """The command's options are complete; what follows would compute."""


def command_of(name: str) -> ModuleType:
    return importlib.import_module(name)


def options_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[argparse.Action]:
    found = list[argparse.Action]()

    def caught(self: Parser, *_: Any) -> None:
        found.extend(action for action in self._actions if action.dest != "help")
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", caught)
        with pytest.raises(Parsed):
            module.main([])
    return found


def needed(options: list[argparse.Action]) -> list[str]:
    """The words without which no command line is complete."""
    words = [next(iter(option.choices or [])) for option in options if not option.option_strings]
    return words + [
        word
        for option in options
        if option.required and option.option_strings
        for word in (option.option_strings[0], ".")
    ]


def test_every_module_with_a_main_is_a_command():
    for package in PACKAGES:
        for path in Path(package.__path__[0]).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert ("\ndef main(" in text) == ("@command\ndef main(" in text) == ("sys.exit(main())" in text), path.name
            # A parser of its own would accept what the shared one refuses.
            assert "ArgumentParser(" not in text and (" Parser(" not in text or path.name == "arguments.py"), path.name
    assert len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_every_command_keeps_its_table_as_json(name, monkeypatch):
    assert "json" in {option.dest for option in options_of(command_of(name), monkeypatch)}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_has_a_form(name, monkeypatch):
    for option in options_of(command_of(name), monkeypatch):
        if isinstance(option, argparse._StoreTrueAction) or option.dest in FREE:
            continue
        assert option.choices is not None or option.type not in (None, int, float, str, Path), option.dest
        if option.nargs in ("+", "*") and not isinstance(option, argparse._AppendAction):
            assert isinstance(option, Distinct), option.dest
        if option.dest in ("json", "out"):
            assert option.type is (new_file if option.dest == "json" else folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_refuses_what_cannot_be_in_one_line(name, monkeypatch, tmp_path, capsys):
    module = command_of(name)
    options = options_of(module, monkeypatch)
    words, file = needed(options), tmp_path / "file"
    file.write_text("")
    bad = {("--unknown", "1"): "unrecognized arguments: --unknown 1"}
    for option in options:
        flag = next(iter(option.option_strings), "")
        if option.type is new_file:
            bad[flag, str(tmp_path / "none" / "x")] = f"{flag}: cannot write"
        elif option.dest == "out":
            bad |= {(flag, path): "--out: cannot write to" for path in (str(file), f"{file}/x", "/proc/x", "")}
        elif isinstance(option, Distinct):
            twice = [str(next(iter(option.choices or option.default)))] * 2
            bad[flag, *twice] = f"{flag} is {' '.join(twice)}, which names {twice[0]} twice; allowed is each once"
        elif option.dest == "steps":
            bad |= {(flag, steps): f"--steps is {steps}; allowed is a" for steps in ("0", "-1", str(10**9))}
        elif flag and option.type is not None and option.nargs is None and option.dest not in FREE:
            bad[flag, "-1"] = f"{flag} is -1"
        if option.dest == "seeds":
            bad[flag, "-1"] = "--seeds is -1; allowed is a whole number"
    for arguments, message in bad.items():
        assert module.main([*words, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("name", ["experiments.plan_divergence", "experiments.bridges", "experiments.precision_depth"])
def test_an_unknown_configuration_is_refused(name, capsys):
    words = ["sums"] if name.endswith("bridges") else []
    assert command_of(name).main([*words, "--config", "nope"]) == 2
    assert "error: configuration 'nope' is unknown; known are " in capsys.readouterr().err


def test_plans_are_compared_where_they_are_measured(capsys):
    main = command_of("experiments.plan_divergence").main
    assert main(["--config", "tiny"]) == 2
    assert "whose nesting.choice is 'uniform'; allowed are those with 'measured' plans" in capsys.readouterr().err
    assert main(["--only", "nothing"]) == 2
    assert "--only is 'nothing'; allowed is a part of uniform, 2, " in capsys.readouterr().err


def test_too_few_steps_for_a_fit_are_refused_before_the_first_run(tmp_path, capsys):
    main = command_of("experiments.equal_time").main
    assert main(["tiny", "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    assert "nesting.bridge.tokens is 2048, and train.steps 1: the run samples at most" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_of_runs_have_the_defaults_of_their_command():
    parser = Parser()
    add_runs(parser, "some", steps=20, seeds=2, least=20, multiple=10)
    assert vars(parser.parse_args([])) == {"seeds": [0, 1], "steps": 20, "out": Path("runs/some")}
    for steps in ("10", "25"):
        with pytest.raises(BadInput, match=f"--steps is {steps}; allowed is a multiple of 10, 20 or more"):
            parser.parse_args(["--steps", steps])


def test_a_folder_that_is_there_or_can_be_made_is_fine(tmp_path):
    assert folder(str(tmp_path)) == tmp_path and folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
