"""Prints the figures that say how easy a checkout is to maintain: lengths, imports, comments, docstrings, tests.

    python scripts/maintainer_figures.py [--root DIR] [--json FILE]

Files are read, never imported, so any checkout will do. What is counted:

- A function's length runs from its `def` to its last line, methods and inner functions too; once with its docstring
  and once without.
- A room is a module or package right under `nested_reft`. Two rooms import each other where each names the other in an
  import, inside functions too.
- Comments are counted per 100 lines of the files, and per 100 lines of code: those that hold neither a docstring nor a
  comment alone, and are not blank. A comment that only speaks to a tool (`noqa`, `type: ignore`, `pyright:`, `fmt:`,
  `pragma:`) does not count. A comment of three lines counts as three.
- A function is public where neither its own name nor that of its class or module begins with an underscore. `self` and
  `cls` are no arguments.
- A test reaches a private name where its body reads or patches `x._name`, or uses a `_name` that its file imports. What
  a test's own class keeps in `self._name` is not counted, nor are the methods of named tuples.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import re
import statistics
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGE = "nested_reft"
NAMED = 5  # how many of the longest are named
TOOL_COMMENT = re.compile(r"#\s*(noqa|type:\s*ignore|pyright:|fmt:|pragma:|ruff:|!)")
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_field_defaults", "_make"}  # public, despite their names
PATCHES = {"setattr", "getattr", "delattr", "hasattr"}
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef
Defined = Function | ast.ClassDef | ast.Module


@dataclass(frozen=True)
class Lengths:
    """Lengths in lines, and what the longest are called, longest first."""

    count: int
    median: float
    p90: int
    max: int
    longest: list[tuple[str, int]]


@dataclass(frozen=True)
class Documented:
    """How many public functions have an `Args:` section in their docstring."""

    public: int
    public_with_args: int
    several_arguments: int
    several_arguments_with_args: int


@dataclass(frozen=True)
class PrivateReach:
    """How many tests reach private names, and how many places in all of `tests/` do, helpers included."""

    tests: int
    reaching_tests: int
    places: int
    names: list[tuple[str, int]]


@dataclass(frozen=True)
class Figures:
    """All figures of one checkout."""

    functions: Lengths
    functions_without_docstrings: Lengths
    modules: Lengths
    two_way_imports: list[tuple[str, str]]
    lines: int
    code_lines: int
    comments: int
    comments_per_100_lines: float
    comments_per_100_code_lines: float
    documented: Documented
    private_reach: PrivateReach


def main(arguments: list[str] | None = None) -> None:
    """Prints the figures of `--root`, and writes them to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], metavar="DIR", help="the checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    known = parser.parse_args(arguments)
    if not (known.root / PACKAGE).is_dir():
        parser.error(f"--root is {str(known.root)!r}; allowed is a directory that holds {PACKAGE}/")
    if known.json and (known.json.is_dir() or not known.json.absolute().parent.is_dir()):
        parser.error(f"--json is {str(known.json)!r}; allowed is a file in a directory that is there")
    figures = figures_of(known.root)
    print(report(figures))
    if known.json:
        known.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")


def figures_of(root: Path) -> Figures:
    """Counts everything under `root`."""
    package = read(root, PACKAGE)
    trees = {name: ast.parse(text) for name, text in package.items()}
    functions = [
        (f"{name}:{function.name}", function) for name, tree in trees.items() for function in functions_in(tree)
    ]
    lines = sum(len(text.splitlines()) for text in package.values())
    code_lines = sum(count_code_lines(text) for text in package.values())
    comments = sum(count_comments(text) for text in package.values())
    return Figures(
        functions=lengths((name, length(function)) for name, function in functions),
        functions_without_docstrings=lengths(
            (name, length(function) - docstring_length(function)) for name, function in functions
        ),
        modules=lengths((name, len(text.splitlines())) for name, text in package.items()),
        two_way_imports=two_way_imports(trees),
        lines=lines,
        code_lines=code_lines,
        comments=comments,
        comments_per_100_lines=per_100(comments, lines),
        comments_per_100_code_lines=per_100(comments, code_lines),
        documented=documented(trees),
        private_reach=private_reach({name: ast.parse(text) for name, text in read(root, "tests").items()}),
    )


def read(root: Path, folder: str) -> dict[str, str]:
    """Path below `root` -> text, for every Python file in a folder of it."""
    return {str(path.relative_to(root)): path.read_text() for path in sorted((root / folder).rglob("*.py"))}


# Lengths.


def functions_in(tree: ast.AST) -> Iterator[Function]:
    """Every function of a tree, methods and inner functions too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(node: ast.stmt) -> int:
    """Lines from a statement's first to its last; decorators stand above the first."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def docstring_length(node: Defined) -> int:
    """Lines of a docstring, 0 without one."""
    return 0 if ast.get_docstring(node, clean=False) is None else length(node.body[0])


def lengths(named: Iterable[tuple[str, int]]) -> Lengths:
    """Median, 90th percentile (nearest rank) and maximum of named lengths."""
    longest_first = sorted(named, key=lambda item: (-item[1], item[0]))
    if not longest_first:
        return Lengths(0, 0.0, 0, 0, [])
    ascending = [lines for _, lines in reversed(longest_first)]
    p90 = ascending[math.ceil(0.9 * len(ascending)) - 1]
    return Lengths(len(ascending), statistics.median(ascending), p90, ascending[-1], longest_first[:NAMED])


# Imports.


def two_way_imports(trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    """Pairs of rooms that import each other."""
    edges = {(room_of(name), target) for name, tree in trees.items() for target in imported_rooms(name, tree)}
    return sorted((room, target) for room, target in edges if room < target and (target, room) in edges)


def room_of(name: str) -> str:
    """The module or package right under the package that a file belongs to; `__init__` for its own."""
    return Path(name).with_suffix("").parts[1]


def imported_rooms(name: str, tree: ast.Module) -> set[str]:
    """Rooms that a file imports, other than its own."""
    package = Path(name).parent.parts
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            modules += [f"{base}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == PACKAGE and len(part) > 1} - {room_of(name)}


# Comments.


def tokens_of(text: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a file."""
    return tokenize.generate_tokens(io.StringIO(text).readline)


def count_comments(text: str) -> int:
    """Comments that speak to a reader."""
    return sum(token.type == tokenize.COMMENT and not TOOL_COMMENT.match(token.string) for token in tokens_of(text))


def count_code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments alone or docstrings."""
    code: set[int] = set()
    for token in tokens_of(text):
        if token.type not in NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, Defined) and docstring_length(node):
            code.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(code)


def per_100(part: int, whole: int) -> float:
    """How many there are for each hundred, with two digits; 0 of nothing."""
    return round(100 * part / whole, 2) if whole else 0.0


# Docstrings.


def documented(trees: dict[str, ast.Module]) -> Documented:
    """Counts public functions with and without an `Args:` section."""
    public = [function for name, tree in trees.items() for function in public_functions(name, tree)]
    several = [function for function in public if argument_count(function) >= 2]
    return Documented(len(public), sum(map(has_args, public)), len(several), sum(map(has_args, several)))


def public_functions(name: str, tree: ast.Module) -> Iterator[Function]:
    """Public functions of a module, and public methods of its public classes."""
    if any(part.startswith("_") and part != "__init__" for part in Path(name).with_suffix("").parts):
        return
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for body in (tree.body, *(node.body for node in classes)):
        yield from (node for node in body if isinstance(node, Function) and not node.name.startswith("_"))


def argument_count(function: Function) -> int:
    """Arguments that a caller may give; `*rest` and `**options` count as one each."""
    signature = function.args
    named = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs, signature.vararg, signature.kwarg]
    return sum(argument is not None and argument.arg not in ("self", "cls") for argument in named)


def has_args(function: Function) -> bool:
    """Whether the docstring has a line `Args:`."""
    return any(line.strip() == "Args:" for line in (ast.get_docstring(function) or "").splitlines())


# Tests.


def private_reach(trees: dict[str, ast.Module]) -> PrivateReach:
    """Counts the tests that reach private names."""
    tests = reaching = 0
    names: list[str] = []
    for tree in trees.values():
        imported = imported_private_names(tree)
        found = [function for function in functions_in(tree) if function.name.startswith("test_")]
        tests += len(found)
        reaching += sum(bool(private_names(function, imported)) for function in found)
        names += private_names(tree, imported)
    counted = sorted(((name, names.count(name)) for name in set(names)), key=lambda item: (-item[1], item[0]))
    return PrivateReach(tests, reaching, len(names), counted)


def is_private(name: str) -> bool:
    """One leading underscore, and not of a named tuple."""
    return name.startswith("_") and not name.startswith("__") and len(name) > 1 and name not in NAMED_TUPLE


def imported_private_names(tree: ast.Module) -> set[str]:
    """Private names that a file imports, as it calls them."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name for node in imports for alias in node.names if is_private(alias.name)}


def private_names(tree: ast.AST, imported: set[str]) -> list[str]:
    """Every private name that code reaches, as often as it does."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found.append(node.attr)
        elif isinstance(node, ast.Name) and node.id in imported:
            found.append(node.id)
        elif isinstance(node, ast.Call):
            found += patched_names(node)
    return found


def is_own(value: ast.expr) -> bool:
    """Whether an attribute is read from `self` or `cls`."""
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def patched_names(call: ast.Call) -> list[str]:
    """Private names that stand as text in `setattr(x, "_name", ...)`, of pytest's `monkeypatch` too."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called not in PATCHES:
        return []
    texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return [name for text in texts if isinstance(text, str) and is_private(name := text.rpartition(".")[2])]


# The report.


def report(figures: Figures) -> str:
    """The figures as lines of text."""
    args, reach = figures.documented, figures.private_reach
    pairs = ", ".join(f"{room} and {target}" for room, target in figures.two_way_imports)
    rows: list[tuple[str, Any]] = [
        ("functions, lines", length_text(figures.functions)),
        ("functions without docstrings, lines", length_text(figures.functions_without_docstrings)),
        ("modules, lines", length_text(figures.modules)),
        ("longest functions", longest_text(figures.functions)),
        ("longest modules", longest_text(figures.modules)),
        ("rooms that import each other", f"{len(figures.two_way_imports)} pairs {pairs}".strip()),
        ("comments", f"{figures.comments} in {figures.lines} lines, {figures.code_lines} of them code"),
        ("comments per 100 lines", figures.comments_per_100_lines),
        ("comments per 100 lines of code", figures.comments_per_100_code_lines),
        ("Args: of two or more arguments", share(args.several_arguments_with_args, args.several_arguments)),
        ("Args: of all public functions", share(args.public_with_args, args.public)),
        ("tests that reach private names", share(reach.reaching_tests, reach.tests)),
        ("places in tests that do", f"{reach.places}: {', '.join(f'{name} {n}' for name, n in reach.names[:NAMED])}"),
    ]
    return "\n".join(f"{name:<38}{value}" for name, value in rows)


def length_text(found: Lengths) -> str:
    """The summary of lengths."""
    return f"median {found.median:g}, p90 {found.p90}, max {found.max} ({found.count} in all)"


def longest_text(found: Lengths) -> str:
    """The longest by name."""
    return ", ".join(f"{name} {lines}" for name, lines in found.longest)


def share(part: int, whole: int) -> str:
    """A count with its percentage."""
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f}%)" if whole else "")


if __name__ == "__main__":
    main()
