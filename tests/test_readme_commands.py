"""The commands that ship and those that README and the guide for TPUs give: they do what they promise."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nested_reft.cli.joining import take_flags
from nested_reft.cli.overrides import override
from nested_reft.config_files import shipped_configs
from nested_reft.losses.registry import OfflineConfig
from nested_reft.models.registry import HUB_SHAPES
from nested_reft.training.config import Config, load_config
from nested_reft.training.offline import OfflineKind, as_offline
from tests.doc_pages import ROOT, fragments, unsaid

# The depth of each model that a command names and that is no download of its shape.
LAYERS = {"smollm2-135m": 30} | {name: shape.num_layers for name, shape in HUB_SHAPES.items()}
README = (ROOT / "README.md").read_text(encoding="utf-8")
TPU_GUIDE = (ROOT / "docs" / "tpu.md").read_text(encoding="utf-8")
OBJECTIVES: dict[str, OfflineKind | None] = {"train": None, "sft": "sft", "reward-model": "bradley_terry", "dpo": "dpo"}


def train_commands() -> list[str]:
    """What follows `nested-reft train` in README's code blocks, where it names a configuration."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0].removeprefix("nested-reft train ") for line in lines if "nested-reft train " in line]
    return [command.strip() for command in commands if command.split()[0] in shipped_configs()]


def check_nesting(config: Config) -> None:
    """Raises where the rollouts would not be nested, or skip more layers than they may."""
    shape = config.model.shape
    num_layers = LAYERS[config.model.name] if shape is None else shape.num_layers
    config.nesting.validate_for(num_layers)
    # A budget chooses the number of layers itself, from none on. These compare curricula, losses and starts alone, and
    # an offline objective samples nothing.
    compares = config.name in ("tiny_dump", "tiny_dapo", "tiny_reset", "tiny_preferences")
    may_start_full = config.nesting_control.hold is not None or compares or isinstance(config.loss, OfflineConfig)
    assert config.nesting.num_skipped(num_layers) > 0 or may_start_full


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_nests(name):
    check_nesting(load_config(name))


@pytest.mark.parametrize("command", train_commands())
def test_every_training_command_of_the_readme_nests(command):
    name, *overrides = command.split()
    check_nesting(override(load_config(name), overrides))


def test_the_readme_has_training_commands():
    assert len(train_commands()) >= 3 and any("qwen" in command for command in train_commands())


def header_commands() -> list[str]:
    """The training commands that the headers of configurations give, with the values of their shell variables."""
    found = []
    for path in shipped_configs().values():
        values = dict[str, str]()
        for line in re.findall(r"^    (\S.*)$", path.read_text(encoding="utf-8").split('"""')[1], re.MULTILINE):
            for name, value in values.items():
                line = line.replace(f"${name}", value)
            if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
                values[assigned[1]] = assigned[2]
            # What a command makes stands behind it, some spaces apart.
            elif line.split()[0] == "nested-reft" and line.split()[1] in OBJECTIVES:
                found.append(re.split(r" {3,}", line)[0].removeprefix("nested-reft "))
    return found


@pytest.mark.parametrize("command", header_commands())
def test_every_training_command_of_a_header_is_a_configuration(command):
    kind, name, *overrides = command.split()
    objective, config = OBJECTIVES[kind], load_config(name)
    changed = override(config if objective is None else as_offline(config, objective), overrides)
    assert changed.loss.kind == (objective or config.loss.kind)


def test_headers_have_training_commands():
    assert {"train", "sft", "reward-model", "dpo"} <= {command.split()[0] for command in header_commands()}


def guide_sections() -> dict[str, str]:
    """The commands of each section of the guide for TPUs, by its title."""
    sections = {}
    for text in re.split(r"^## ", TPU_GUIDE, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if blocks:
            sections[text.splitlines()[0]] = "".join(blocks)
    return sections


# What the guide calls and a test cannot. Each shows its arguments; sbatch goes on with the script that it is given.
CALLED = {name: f'echo {name} "$@"' for name in ("gcloud", "git", "kubectl", "nested-reft", "ssh", "xpk")}
CALLED["docker"] = 'cat > /dev/null; echo docker "$@"'
CALLED["sbatch"] = 'while [[ $1 == --* ]]; do shift; done; SLURM_SUBMIT_DIR=$PWD exec "$@"'


def run_section(commands: str, directory: Path) -> list[str]:
    """What the commands of a section show, line by line; scripts only say what they would do."""
    (directory / "bin").mkdir()
    for name, text in CALLED.items():
        program = directory / "bin" / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    # Commands on one's own machine begin in the checkout, and those on a host beside it.
    host = directory / "nested_reft"
    (host / ".venv").mkdir(parents=True)
    (host / ".venv" / "bin").symlink_to(directory / "bin")
    for checkout in (directory, host):
        (checkout / "scripts").symlink_to(ROOT / "scripts")
    environment = {"PATH": f"{directory}/bin:/usr/bin:/bin", "HOME": str(directory), "DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{commands}\nwait"],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("title", guide_sections())
def test_every_command_of_the_tpu_guide_can_be_pasted(title, tmp_path):
    """Scripts take their variables and arguments, and each training command is a configuration."""
    commands = guide_sections()[title]
    shown = run_section(commands, tmp_path)
    starts = [
        found
        for line in shown
        for found in re.findall(r"(?:nested-reft|restart_loop\.sh|start\.sh) (train [^>'&]*)", line)
    ]
    # Every training command of the guide has come out of the script that it was given to.
    assert len(starts) >= len(re.findall(r" train ", commands)) > 0
    for start in starts:
        _, *words = shlex.split(start)
        overrides, _ = take_flags(words, os.environ)
        for flag in ("--runs", "--resume"):
            if flag in overrides:
                place = overrides.index(flag)
                del overrides[place : place + 2]
        if overrides:  # else the run has them
            check_nesting(override(load_config(overrides[0]), overrides[1:]))


def test_the_tpu_guide_has_a_section_for_each_place():
    assert len(guide_sections()) == 7
    for script in (ROOT / "scripts" / "tpu").glob("*"):
        if script.suffix == ".sh" and script.name not in ("common.sh", "start.sh"):
            assert script.name in TPU_GUIDE


# What JAX, the kernel and libtpu say.
OTHERS_SAY = ("RESOURCE_EXHAUSTED", "No space left", "Gloo context", "The TPU is already in use")


def test_the_tpu_guide_quotes_what_is_said():
    """The words of each message in its table of failures stand in the code; what a message fills in is left out."""
    rows = TPU_GUIDE.split("| what you see | what it means | what to do |")[1].split("\n\n")[0].splitlines()
    quoted = [text for row in rows[2:] for text in re.findall("`(.*?)`", row.split("|")[1])]
    filled_in = r"\.\.\.|'[^']*'|[\d ]*key/value heads|\d+|\b[A-Z]\b|mesh\.tensor|process \d"
    pieces = fragments([text for text in quoted if not text.startswith((*OTHERS_SAY, "--"))], filled_in)
    assert len(pieces) > 10 and not unsaid(pieces)
