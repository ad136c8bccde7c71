"""Configuration files of the user's own: what may stand in them, where their paths lead, and how they fail."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from nested_reft.cli.main import main
from nested_reft.config_files import CONFIG_DIRECTORIES
from nested_reft.rewards.reward import RewardConfig
from nested_reft.run_directory import RunDirectory
from nested_reft.training.config import Config, load_config, with_absolute_paths
from nested_reft.training.setup import prepare, run_config
from tests.training.runs import nano

HEAD = """
from __future__ import annotations
import dataclasses, sys
from pathlib import Path
import numpy as np
import nested_reft as nr
from nested_reft.data.sources import DatasetSource, JsonlSource
from nested_reft.prompt_format import PromptFormat
from nested_reft.replay_store import ReplayConfig
tiny = nr.load_config("tiny")


def put(part, **values):
    # A copy with values of other types. Tests check types when a part is made, and users do not.
    copy = dataclasses.replace(part)
    for name, value in values.items():
        object.__setattr__(copy, name, value)
    return copy


"""
PATHS = """
def get_config():
    own = JsonlSource("own", "-", None, 1, 0, heldout_file="../held.jsonl", prompt=tiny.data.prompt)
    sources = (
        put(own, file=Path("data/own.jsonl")),
        DatasetSource("sums", "gsm8k", None, 1, 0, folder="gsm8k"),
    )
    return dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, sources=sources),
        replay=ReplayConfig(capacity=1000, recent_share=0.5),
        reward=dataclasses.replace(tiny.reward, function="mine.py:reward", safety="mine.py:safety"),
        nesting=dataclasses.replace(tiny.nesting, divergence_file="smollm2_chain_sum_layers.json"),
    )
"""


@pytest.fixture
def load(tmp_path):
    """The configuration of a file that begins as all of them do."""

    def load(text: str, **overrides) -> Config:
        (tmp_path / "there").mkdir(exist_ok=True)
        (tmp_path / "there" / "mine_config.py").write_text(HEAD + text)
        return load_config(str(tmp_path / "there" / "mine_config.py"), **overrides)

    return load


def field(config: Config, name: str, source: int = 0) -> str:
    return getattr(config.data.sources[source], name)


def test_a_file_may_define_dataclasses_and_postpone_annotations(load):
    config = load("""
@dataclasses.dataclass
class Size:
    steps: int = 7


def get_config():
    return dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=Size().steps))
""")
    assert config.train.steps == 7


def test_numbers_of_numpy_and_lists_are_plain_values_afterwards(load):
    config = load("""
def get_config():
    source = put(tiny.data.sources[0], seed=np.int64(3), parameters={"min_terms": np.int32(2)})
    return put(
        tiny,
        name=np.str_("mine"),
        data=put(tiny.data, sources=[source]),
        train=put(tiny.train, steps=np.int64(5), remat=np.str_("dots")),
        reset=put(tiny.reset, only_right=np.bool_(True)),
        nesting=put(tiny.nesting, skip_ratio=np.float64(0.25), choice=np.array("fixed"), layers=np.array([1, 2])),
    )
""")
    source = config.data.sources[0]
    values = (config.name, config.train.steps, config.reset.only_right, config.nesting.skip_ratio, source.seed)
    assert values == ("mine", 5, True, 0.25, 3) and [type(value) for value in values] == [str, int, bool, float, int]
    assert type(config.data.sources) is tuple and source.parameters == {"min_terms": 2}
    assert config.nesting.layers == (1, 2)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sys.exit(0)", "mine_config.py' fails: SystemExit: 0"),
        ("def get_config():\n    sys.exit()", "mine_config.py' fails: SystemExit: "),
        ("1 / 0", "mine_config.py' fails: ZeroDivisionError: division by zero"),
        ("get_config = 3", "mine_config.py' fails: TypeError"),
        (
            "def get_config():\n    return put(tiny, name=object())",
            "mine_config.py': name is <object object at .*of type object; JSON cannot keep",
        ),
        (
            "def get_config():\n    return put(tiny, train=put(tiny.train, steps=2.5))",
            "mine_config.py': train.steps is 2.5; allowed is a whole number",
        ),
        (
            "def get_config():\n    return put(tiny, data=None)",
            "mine_config.py': data is None; allowed is an object with its fields by name",
        ),
        (
            "def get_config():\n    return put(tiny, data=put(tiny.data, sources=3))",
            "mine_config.py': data.sources is 3",
        ),
        (
            "def get_config():\n    source = put(tiny.data.sources[0], parameters={'a': {1, 2}})\n"
            "    return put(tiny, data=put(tiny.data, sources=(source,)))",
            r"mine_config.py': data.sources.0.parameters.a is \{1, 2\}, of type set; JSON cannot keep",
        ),
    ],
)
def test_a_file_that_cannot_work_is_one_line_with_its_name(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


@pytest.mark.parametrize(("before", "now"), [(False, "none"), (True, "full")])
def test_a_run_of_an_earlier_version_computes_again_what_it_did(before, now):
    stored = load_config("tiny").to_json()
    stored["train"]["remat"] = before
    assert Config.from_json(stored).train.remat == now


def test_paths_lead_from_the_file_and_are_absolute(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    config = load(PATHS)
    assert field(config, "file") == str(there / "data" / "own.jsonl")
    assert field(config, "heldout_file") == str(tmp_path / "held.jsonl")
    assert field(config, "folder", source=1) == str(there / "gsm8k")
    assert config.reward.function == f"{there / 'mine.py'}:reward"
    assert config.reward.safety == f"{there / 'mine.py'}:safety"
    # A file that ships is found by its name, unless the user has one of that name.
    shipped = next(d for d in CONFIG_DIRECTORIES if (d / "smollm2_chain_sum_layers.json").exists())
    assert config.nesting.divergence_file == str(shipped / "smollm2_chain_sum_layers.json")
    (there / "smollm2_chain_sum_layers.json").write_text("{}")
    assert load(PATHS).nesting.divergence_file == str(there / "smollm2_chain_sum_layers.json")


def test_paths_of_overrides_lead_from_the_working_directory(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(PATHS, reward={"function": "here.py:reward"})
    assert config.reward.function == f"{tmp_path / 'here.py'}:reward"
    assert field(config, "folder", source=1) == str(tmp_path / "there" / "gsm8k")
    config = load(PATHS, reward={"function": "~/here.py:reward"})
    assert config.reward.function == f"{Path.home() / 'here.py'}:reward"
    config = load(PATHS, reward={"function": "~nobody_of_this_name/here.py:reward"})
    assert config.reward.function == f"{tmp_path / '~nobody_of_this_name' / 'here.py'}:reward"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", "{directory}/model"),
        ("./model.gguf", "{directory}/model.gguf"),
        ("smollm2-135m", "smollm2-135m"),  # known names come before files
        ("org/name", "org/name"),  # a hub id
        ("scratch", "scratch"),
    ],
)
def test_the_name_of_a_model_is_a_path_where_there_is_one(tmp_path, name, expected):
    for directory in ("model", "smollm2-135m", "scratch"):
        (tmp_path / directory).mkdir()
    (tmp_path / "model.gguf").touch()
    config = nano()
    if name != "scratch":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name, shape=None))
    found = with_absolute_paths(config, tmp_path)
    assert found.model.name == expected.format(directory=tmp_path)
    assert with_absolute_paths(found, tmp_path / "model") == found


def test_a_module_is_no_path(tmp_path):
    config = nano(reward=RewardConfig(function="package.module:function"))
    assert with_absolute_paths(config, tmp_path) == config


def test_a_run_is_continued_from_elsewhere(tmp_path, monkeypatch, capsys):
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for directory in (there, elsewhere):
        directory.mkdir()
    rows = [f'{{"question": "{n}+{n} =", "answer": {2 * n}}}\n' for n in range(30)]
    (there / "own.jsonl").write_text("".join(rows))
    shutil.copy(Path(__file__).parents[1] / "rewards" / "reward_functions.py", there / "mine.py")
    (there / "mine_config.py").write_text(
        HEAD + "def get_config():\n"
        "    own = JsonlSource('own', 'own.jsonl', None, 2, 0, prompt=PromptFormat('{question}', chat=False))\n"
        "    return dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sources=(own,)),\n"
        "        reward=dataclasses.replace(tiny.reward, function='mine.py:length'))\n"
    )
    monkeypatch.chdir(tmp_path)
    setup = prepare(load_config(os.path.join("there", "mine_config.py")))
    run = RunDirectory.create(tmp_path / "runs", "mine", setup.config.to_json())
    run.close()
    monkeypatch.chdir(elsewhere)
    config = run_config(run.path)
    assert field(config, "file") == str(there / "own.jsonl")
    assert config.reward.function == f"{there / 'mine.py'}:length"
    assert prepare(config).data.source_names == ("own",)
    # Words that change nothing are no error, from wherever they are given. The missing checkpoint is looked for later.
    monkeypatch.chdir(there)
    assert main(["train", "--resume", str(run.path), "--reward.function", "mine.py:length"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    monkeypatch.chdir(elsewhere)
    assert main(["train", "--resume", str(run.path), "--reward.function", "mine.py:length"]) == 2
    assert "reward.function is '" in capsys.readouterr().err


def test_a_configuration_made_in_python_gets_absolute_paths_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parents[1] / "rewards" / "reward_functions.py", tmp_path / "mine.py")
    setup = prepare(nano(reward=RewardConfig(function="mine.py:length")))
    assert setup.config.reward.function == f"{tmp_path / 'mine.py'}:length"
