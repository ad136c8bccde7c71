"""The maintainer's figures, on a made-up checkout whose values are counted by hand."""

import json

import pytest

from scripts.maintainer_figures import figures_of, main

FILES = {
    "nested_reft/__init__.py": "",
    # 20 lines; 10 hold code: 1, 3, 4, 5, 7, 10, 11, 13, 19 and 20.
    "nested_reft/rewards.py": '''\
from nested_reft.data import source  # two-way: data imports this room inside a function

def score(texts, weight, *, scale=1):
    value = weight
    """Not a docstring: it is not the first statement."""
    # One comment, with an inline one above and a tool's below.
    return value  # noqa: F821


class Checker:
    def check(self, text):
        """One argument besides self."""
        return text  # type: ignore


# Two comments
# in two lines.

def _private(a, b):
    return a, b
''',
    # 17 lines; 6 hold code: 1, 9, 12, 13, 15 and 17.
    "nested_reft/data/source.py": '''\
def load(path, size):
    """Loads.

    Args:
        path: the file.
        size: how many.
    """

    def inner(a, b):
        """A function inside another is not public."""

        from nested_reft import rewards
        return rewards

    return inner

URL = "a # that is no comment"
''',
    "nested_reft/data/__init__.py": "from ..models import nothing\n",
    "nested_reft/models.py": "import nested_reft.models\n",
    "tests/test_a.py": """\
from nested_reft.rewards import _private


def helper(x):
    return x._helped


def test_import():
    assert _private(1, 2)


def test_attribute(x):
    assert x._name and x.__class__


def test_patch(monkeypatch, x):
    monkeypatch.setattr(x, "_name", 1)


def test_public(x):
    assert x.name and helper(x) and x._replace(a=1)


class Fake:
    def test_own(self):
        return self._kept
""",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_lengths_by_hand(root):
    """score 5, check 3, _private 2, load 15, inner 5; without docstrings check 2, load 9, inner 4."""
    found = figures_of(root)
    assert (found.functions.count, found.functions.median, found.functions.max) == (5, 5, 15)
    assert found.functions.p90 == 15  # the 4.5th of five, rounded up
    assert found.functions.longest[0] == ("nested_reft/data/source.py:load", 15)
    assert (found.functions_without_docstrings.median, found.functions_without_docstrings.max) == (4, 9)
    assert found.modules.longest[:2] == [("nested_reft/rewards.py", 20), ("nested_reft/data/source.py", 17)]


def test_two_way_imports(root):
    """data and rewards; `data` imports `models` one way, and a room that imports itself is no pair."""
    assert figures_of(root).two_way_imports == [("data", "rewards")]


def test_comments_by_hand(root):
    """One inline, one alone and two in two lines; neither a tool's nor a `#` in a string."""
    found = figures_of(root)
    assert found.comments == 4
    assert (found.lines, found.code_lines) == (20 + 17 + 1 + 1, 10 + 6 + 1 + 1)
    assert (found.comments_per_100_lines, found.comments_per_100_code_lines) == (10.26, 22.22)  # 4 / 39 and 4 / 18


def test_documented_by_hand(root):
    """Public: score (three arguments), check (one), load (two, with Args); not _private, not inner."""
    found = figures_of(root).documented
    assert (found.public, found.public_with_args) == (3, 1)
    assert (found.several_arguments, found.several_arguments_with_args) == (2, 1)


def test_private_names_by_hand(root):
    """Three of five tests; the helper is one more place, and what `self` keeps is its own."""
    found = figures_of(root).private_reach
    assert (found.tests, found.reaching_tests, found.places) == (5, 3, 4)
    assert found.names == [("_name", 2), ("_helped", 1), ("_private", 1)]


def test_report_and_json(root, tmp_path, capsys):
    main(["--root", str(root), "--json", str(tmp_path / "figures.json")])
    assert "1 of 2 (50%)" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["comments"] == 4


def test_a_root_without_the_package_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--root", str(tmp_path)])
    assert "allowed is a directory that holds nested_reft/" in capsys.readouterr().err
