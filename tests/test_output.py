"""What commands print is text, and never what a terminal obeys."""

import ast
import json
import logging
import os
import re
from pathlib import Path

import pytest

from nested_reft.cli.output import complain, quiet_libraries, say
from nested_reft.json_files import check_writable, write_json
from nested_reft.reports.tables import table

CLI = Path(__file__).parents[1] / "nested_reft" / "cli"


def test_lines_stay_and_control_characters_do_not(capsys):
    say("one\x1b[2J\ntwo\r")
    complain("three\x07")
    printed = capsys.readouterr()
    assert printed.out == "one\\x1b[2J\ntwo\\r\n" and printed.err == "three\\x07\n"


def test_cells_of_tables_are_one_line_each():
    assert "a\\nb\\x1b" in table(["name"], [["a\nb\x1b"]])


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.name)
def test_commands_print_through_one_place(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printed = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert bool(printed) == (path.name == "output.py")


def test_a_users_own_partial_file_stays(tmp_path):
    own = tmp_path / "r.json.partial"
    own.write_text("mine")
    check_writable(tmp_path / "r.json")
    write_json(tmp_path / "r.json", {"a": 1})
    assert own.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["r.json", own.name]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    check_writable(tmp_path / "link.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert json.loads(os.read(reader, 100)) == {"a": 1} and not pipe.is_file()
    os.close(reader)


def test_only_commands_change_how_libraries_log():
    """Whoever imports the package keeps the settings of their own program."""
    package = Path(__file__).parents[1] / "nested_reft"
    changes = re.compile(r"\.(addFilter|setLevel|addHandler)\(|logging\.(basicConfig|disable)\(")
    found = [str(path.relative_to(package)) for path in package.rglob("*.py") if changes.search(path.read_text())]
    assert sorted(found) == ["cli/joining.py", "cli/main.py", "cli/output.py"]


def test_what_libraries_log_is_kept_to_lines(caplog):
    for _ in range(2):
        quiet_libraries()
    absl = logging.getLogger("absl")
    assert len(absl.filters) == 1
    absl.warning("progress")
    absl.error("a line")
    absl.error("a traceback", exc_info=ValueError())
    assert [record.message for record in caplog.records] == ["a line"]
