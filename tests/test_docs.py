"""The documentation: links lead somewhere, names and fields exist, recipes run, quoted messages are said."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import posixpath
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nested_reft
from nested_reft.cli.arguments import Parser
from nested_reft.cli.main import COMMANDS, main
from nested_reft.cli.overrides import override
from nested_reft.config_files import shipped_configs
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config, load_config
from nested_reft.training.offline import as_offline
from nested_reft.training.record import METRICS
from nested_reft.training.run_state import RunState
from scripts.docs_site import is_relative, links, pages_of_the_checkout, turned
from tests.doc_pages import ROOT, blocks, commands, fragments, pages, read, unsaid, without_blocks

SYSTEMS = sorted(path.name for path in (ROOT / "docs" / "systems").glob("*.md"))
RECIPES = sorted(path.name for path in (ROOT / "docs" / "how_to").glob("*.md"))


def anchors(place: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", without_blocks(read(place)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("place", pages())
def test_every_link_leads_to_a_file_and_a_heading(place):
    for target in filter(is_relative, links(read(place))):
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        assert (ROOT / there).exists(), target
        assert not anchor or anchor in anchors(there), target
    for target in links(read(place)):
        assert not target.startswith("#") or target[1:] in anchors(place), target


def test_links_are_pointed_at_the_site():
    pages = {"docs/choices.md": "choices.md", "README.md": "start.md", "experiments/results/a.md": "results/a.md"}
    text = "[a](../../docs/choices.md#x) [b](../../nested_reft/api.py) ![c](d.png)\n```\n[e](../../README.md)\n```\n"
    there = turned(text, "experiments/results/a.md", pages | {"experiments/results/d.png": "results/d.png"})
    assert there == "[a](../choices.md#x) b ![c](d.png)\n```\n[e](../../README.md)\n```\n"
    assert turned("[r](experiments/results/a.md)", "README.md", pages) == "[r](results/a.md)"


def test_links_in_code_are_none():
    assert links("`[a](b.md)` [`c`](d.md)\n```\n[e](f.md)\n```\n[g](#h)") == ["d.md", "#h"]


def test_the_site_has_every_page():
    """Each page is in the navigation, and the navigation names no other."""
    named = set(re.findall(r"([\w/]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    there = {page for page in pages_of_the_checkout().values() if page.endswith(".md")}
    assert named == {page for page in there if not page.startswith("results/")} | {"results/index.md"}


def test_every_top_level_part_of_the_python_api_is_on_its_page():
    asked = re.findall(r"^::: (\S+)$", "\n".join(read(page) for page in pages() if "/api/" in page), re.MULTILINE)
    for name in asked:
        assert code_value(name.removeprefix("nested_reft.")) is not MISSING, name
    for name in set(nested_reft.__all__) - {"__version__"}:
        module = nested_reft._PUBLIC[name]
        assert module in asked or f"{module}.{name}" in asked, name


MISSING = object()


def code_value(name: str) -> Any:
    """What a dotted name below `nested_reft` stands for, or MISSING; fields of classes count."""
    words = name.split(".")
    for end in range(len(words), 0, -1):
        path = ROOT.joinpath("nested_reft", *words[:end])
        if not (path.with_suffix(".py").is_file() or path.is_dir()):
            continue
        value: Any = importlib.import_module(".".join(["nested_reft", *words[:end]]))
        for word in words[end:]:
            if dataclasses.is_dataclass(value) and word in {entry.name for entry in dataclasses.fields(value)}:
                return None  # a field, which has no parts here
            value = getattr(value, word, MISSING)
        return value
    return MISSING


def members(hint: Any) -> list[Any]:
    """The members of a union, also inside a tuple; a type alone is its own only one."""
    parts = [part for part in typing.get_args(hint) if part is not Ellipsis and not isinstance(part, str)]
    return [member for part in parts for member in members(part)] if parts else [hint]


def config_types(owner: Any = Config) -> list[type]:
    """The dataclasses that a configuration is made of."""
    found = [owner]
    for hint in typing.get_type_hints(owner).values():
        for kind in members(hint):
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                found += config_types(kind)
    return found


def is_field(name: str, owner: Any = Config) -> bool:
    """Whether a dotted name is a field of a configuration."""
    first, _, rest = name.partition(".")
    hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
    return first in hints and (not rest or any(is_field(rest, kind) for kind in members(hints[first])))


def literal_values(hint: Any) -> set[str]:
    """The words of every `Literal` in a type."""
    if typing.get_origin(hint) is typing.Literal:
        return {value for value in typing.get_args(hint) if isinstance(value, str)}
    return {value for part in typing.get_args(hint) for value in literal_values(part)}


def values_of_fields() -> set[str]:
    """Every word that some field of a configuration takes."""
    return {
        value
        for kind in config_types()
        for hint in typing.get_type_hints(kind).values()
        for value in literal_values(hint)
    }


def names_on(page: str) -> list[str]:
    """What stands in backticks on a page, outside of blocks."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def is_known(name: str) -> bool:
    """Whether what stands in backticks is a field, a value, code, a file, a configuration, a metric or a command."""
    return (
        is_field(name)
        or code_value(name) is not MISSING
        or any((ROOT / place / name).exists() for place in ("", "nested_reft"))
        or name in values_of_fields()
        or name in shipped_configs()
        or name in COMMANDS
        or any(name == metric.name for metric in METRICS)
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_name_on_a_page_of_a_system_exists(name):
    found = names_on(read(f"docs/systems/{name}"))
    assert len(found) > 20 and not [word for word in found if not is_known(word)]


@pytest.mark.parametrize("place", [page for page in pages() if page == "README.md" or page.startswith("docs/")])
def test_every_field_that_a_page_names_exists(place):
    """`reset.share`, and `loss.bias_mitigation base` with its value; what is a module of that name passes too."""
    parts = {entry.name for entry in dataclasses.fields(Config)}
    dotted = [name.split()[0] for name in names_on(read(place)) if re.match(r"[a-z_]+\.[a-z_.]+( |$)", name)]
    unknown = [name for name in dotted if name.split(".")[0] in parts and not is_known(name)]
    assert not unknown


def test_a_name_that_does_not_exist_is_found():
    for name in ("loss.levle", "losses.presets.dappo", "types.Rollouts.forced", "tiny_dapoo", "curriculum.nothing"):
        assert not is_known(name)


def test_there_is_a_page_for_each_system():
    assert SYSTEMS == ["dapo.md", "drpo.md", "dump.md", "nested_reft.md", "tba.md"]


@pytest.fixture(scope="module", params=[f"systems/{name}" for name in SYSTEMS] + [f"how_to/{name}" for name in RECIPES])
def recipe(request, tmp_path_factory):
    """A page, and a directory that holds the files it shows."""
    text, directory = read(f"docs/{request.param}"), tmp_path_factory.mktemp("recipe")
    for opening, block in blocks(text):
        if title := re.search(r'title="([^"]+)"', opening):
            (directory / title[1]).parent.mkdir(parents=True, exist_ok=True)
            (directory / title[1]).write_text(block, encoding="utf-8")
    return text, directory


class Parsed(Exception):
    """An experiment has taken the words of its command; what follows would compute."""


def experiment_commands() -> list[str]:
    """Every command of an experiment or a benchmark that a page gives."""
    found = {command for page in pages() for command in commands(read(page))}
    return sorted(command for command in found if command.startswith("python -m experiments."))


@pytest.mark.parametrize("command", experiment_commands())
def test_every_command_of_an_experiment_can_be_given(command, monkeypatch):
    parse = Parser.parse_args

    def parsed(parser: Parser, words: list[str] | None = None):
        parse(parser, words)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parsed)
    _, _, module, *words = shlex.split(command)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(words)


def test_every_command_of_a_recipe_can_be_given(recipe, monkeypatch):
    text, directory = recipe
    monkeypatch.chdir(directory)
    for command in commands(text):
        program, *words = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{words[0]}:", read("Makefile"), re.MULTILINE), command
        elif program == "nested-reft":
            check_command(words)
        else:
            assert command in experiment_commands()


def check_command(words: list[str]) -> None:
    """Raises where `nested-reft` would refuse the words, as far as a configuration tells."""
    name, *words = words
    assert name in COMMANDS
    if name == "sweep":
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = main([name, *words, "--report-only"])
        # Every run was understood, and none has been computed here.
        assert code == 2 and "no run of the sweep" in said.getvalue(), said.getvalue()
    if name not in ("train", "sft", "reward-model", "dpo") or words[0] == "--resume":
        return
    kinds: dict[str, Any] = {"sft": "sft", "reward-model": "bradley_terry", "dpo": "dpo"}
    config = load_config(words[0])
    check_start(override(as_offline(config, kinds[name]) if name in kinds else config, words[1:]))


def test_the_python_of_a_recipe_runs(recipe, monkeypatch):
    """Blocks of one page share their names; those with a title are files that the others use."""
    text, directory = recipe
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(os.fspath(directory))
    names: dict[str, Any] = {}
    for opening, block in blocks(text):
        if opening.split()[:1] == ["python"]:
            exec(compile(block, opening, "exec"), names)


def test_an_advantage_of_ones_own_has_the_values_of_its_formula():
    text = read("docs/how_to/own_estimator.md")
    names: dict[str, Any] = {}
    for opening, block in blocks(text):
        if opening.startswith("python"):
            exec(compile(block, opening, "exec"), names)
    # The medians of the others are 2, 2, 1 and 1. Their means would be 4, 11 / 3, 10 / 3 and 1.
    reward_BG, scored_BG = np.array([[0.0, 1.0, 2.0, 9.0]], np.float32), np.ones((1, 4), bool)
    assert np.allclose(names["median_advantages"](reward_BG, scored_BG), [[-2.0, -1.0, 1.0, 8.0]])


def test_troubleshooting_quotes_what_is_said():
    """The first column of each table quotes a message; its words stand in the code, whatever is filled in."""
    rows = re.findall(r"^\| (`.*?) \|", read("docs/troubleshooting.md"), re.MULTILINE)
    quoted = [text for row in rows for text in re.findall("`(.*?)`", row)]
    for text in quoted:
        pieces = fragments([text], r"\.\.\.")
        assert pieces and not unsaid(pieces), text
    assert len(quoted) >= 25


def test_the_page_about_one_resume_shows_the_resume():
    """The excerpt stands in `RunState.load`, and each step of the list names a file and what it has."""
    page = read("docs/one_resume.md")
    shown = [line.strip() for line in page.split("```python\n")[1].split("```")[0].splitlines()]
    source = [line.strip() for line in inspect.getsource(RunState.load).splitlines()]
    assert len(shown) > 8 and [line for line in source if line in shown] == shown
    rows = re.findall(r"^\|[^|]+\|([^|]+)\|", page, re.MULTILINE)
    for place in [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]:
        assert (ROOT / "nested_reft" / place).is_file(), place
    steps = re.findall(r"^\d\. `([\w/]+\.py)`: (.*)$", page, re.MULTILINE)
    assert len(steps) == 8
    for place, words in steps:
        text = (ROOT / "nested_reft" / place).read_text(encoding="utf-8")
        for name in re.findall(r"`(?:\w+\.)?(\w+)`", words):
            assert re.search(rf"(def|class) {name}\b", text), f"{place}: {name}"


def test_the_picture_of_the_readme_is_drawing_alone():
    """It shows no text in a font that must be loaded, and it carries a title for those who cannot see it."""
    picture = Path(ROOT / "docs" / "images" / "nested_rollout.svg").read_text(encoding="utf-8")
    assert "<title>" in picture and "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    assert "](docs/images/nested_rollout.svg)" in read("README.md").split("## ")[0]
