"""The commands that ship and those that README gives: they do what they promise."""

import re
from pathlib import Path

import pytest

from nested_reft.cli.overrides import override
from nested_reft.config_files import shipped_configs
from nested_reft.losses.registry import OfflineConfig
from nested_reft.models.registry import HUB_SHAPES
from nested_reft.training.config import Config, load_config
from nested_reft.training.offline import OfflineKind, as_offline

# The depth of each model that a command names and that is no download of its shape.
LAYERS = {"smollm2-135m": 30} | {name: shape.num_layers for name, shape in HUB_SHAPES.items()}
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
