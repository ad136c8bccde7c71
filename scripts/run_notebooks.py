"""Executes notebooks from top to bottom and keeps their outputs, without what differs from machine to machine.

`python scripts/run_notebooks.py [FILE ...]` runs all of `notebooks/`, or the files that are named, in a folder of their
own. `--set NAME=VALUE` replaces a value in the cell with the tag `parameters`. It needs the packages ipykernel and
nbclient.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
CELL_SECONDS = 3600


def with_parameters(notebook: NotebookNode, values: Mapping[str, str]) -> None:
    """Replaces values in the cell with the tag `parameters`.

    Args:
        notebook: changed in place.
        values: the Python expression of each name.

    Raises:
        ValueError: the cell does not set such a name.
    """
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        # A function, since a backslash in the value is no group of the pattern.
        cell.source, count = re.subn(rf"^{name} = .*$", lambda _: f"{name} = {value}", cell.source, flags=re.M)  # noqa: B023
        if count != 1:
            raise ValueError(f"the cell with the tag 'parameters' sets '{name}' {count} times; allowed is once")


def execute(notebook: NotebookNode, folder: Path, cell_seconds: int = CELL_SECONDS) -> None:
    """Runs all cells in a new kernel with this checkout's package; outputs go into the notebook.

    Args:
        notebook: changed in place.
        folder: where it runs, and leaves its files.
        cell_seconds: the most that a cell may take; a kernel that is stuck would be waited for without end.

    Raises:
        nbclient.exceptions.CellTimeoutError: a cell took longer; its kernel is ended.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    # Commands of the package, such as `!nested-reft`, are those of this Python and this checkout.
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


def clean(notebook: NotebookNode) -> None:
    """Leaves out progress bars and other messages on stderr, and what a kernel says about itself.

    Args:
        notebook: changed in place.
    """
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept: list[NotebookNode] = []
        for output in cell.outputs:
            if output.get("name") == "stderr":
                continue
            if output.output_type == "stream":
                # What a terminal would show of a line that was written several times.
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
                # Bars that stood between two texts are gone.
                if kept and kept[-1].output_type == "stream":
                    kept[-1].text += output.text
                    continue
            kept.append(output)
        cell.outputs = kept
    notebook.metadata["language_info"] = {"name": "python"}


def save(notebook: NotebookNode, path: Path) -> None:
    """Writes the notebook.

    Args:
        notebook: valid.
        path: of the file.
    """
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="values of the parameters")
    parser.add_argument("--cell-seconds", type=int, default=CELL_SECONDS, help="the most that a cell may take")
    known = parser.parse_args(None if arguments is None else list(arguments))
    if wrong := [each for each in known.set if "=" not in each]:
        parser.error(f"--set {wrong[0]}: allowed is NAME=VALUE")
    values = dict(each.split("=", 1) for each in known.set)
    for path in known.files or sorted(NOTEBOOKS.glob("*.ipynb")):
        try:
            notebook = nbformat.read(path, as_version=4)
            # The file keeps the parameters of its readers.
            sources = [cell.source for cell in notebook.cells]
            with_parameters(notebook, values)
        except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
            parser.error(f"{path}: {error}")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), known.cell_seconds)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        for cell, source in zip(notebook.cells, sources, strict=True):
            cell.source = source
        clean(notebook)
        save(notebook, path)
        print(f"{path.name}: {after.ru_utime - before.ru_utime:.0f} CPU seconds")


if __name__ == "__main__":
    main()
