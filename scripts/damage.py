"""Damages copies of a small run in more than 200 ways, resumes each, and says what came of it.

    python scripts/damage.py                # the table of all kinds
    python scripts/damage.py metrics        # kinds whose name holds a word
    python scripts/damage.py --page experiments/results/robustness.md    # and writes the table into that page

A run of a tiny model is stopped in its fourth step as a kill would stop it, with checkpoints 1, 2 and 3. Each copy of
it is damaged and resumed in this process. The verdicts are:

    same       the resumed run is the undamaged one, bit for bit, logs included
    older      it continues from an older checkpoint, and a line says so
    warned     it is the undamaged one, but a log has lost lines or the steps are more, and a line says so
    refused    one line names the file and what is wrong
    silent     something differs without a word
    unclear    a traceback, several lines, or a line that names no file

The exit code is 1 where a kind is silent or more than 2 % are unclear.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nested_reft.api import open_trainer  # noqa: E402
from nested_reft.checkpoints import checkpoint_numbers  # noqa: E402
from nested_reft.cli.output import quiet_libraries  # noqa: E402
from nested_reft.run_directory import read_log  # noqa: E402
from nested_reft.training.config import Config, load_config  # noqa: E402
from nested_reft.training.setup import run_config  # noqa: E402
from nested_reft.training.trainer import Trainer  # noqa: E402
from scripts.compare_runs import LOGS, whole_buffer  # noqa: E402

Act = Callable[[Path], object]
WORDS = ("same", "older", "warned", "refused", "silent", "unclear")


@dataclass(frozen=True)
class Verdict:
    """What became of one kind of damage: its name, one of the words above, and what was said."""

    kind: str
    word: str
    said: str


class Killed(Exception):
    """Stands for whatever ends a process."""


def small_config() -> Config:
    """Five steps with a checkpoint after each, of which three are kept; replay has files of its own."""
    return load_config(
        "tiny",
        data={"prompts_per_batch": 4, "sources": [_smaller(load_config("tiny").to_json()["data"]["sources"][0])]},
        rollout={"group_size": 4},
        optimizer={"warmup_steps": 0},
        evaluation={"samples_per_prompt": 0, "every_steps": 100},
        warm_start={"steps": 0},
        replay={"capacity": 64, "recent_share": 0.5},
        train={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 3},
    )


def _smaller(source: dict[str, Any]) -> dict[str, Any]:
    return source | {"train_size": 20, "heldout_size": 4}


def stopped_run(runs: Path) -> Path:
    """A run that was killed in its fourth step, when that was logged: checkpoints 1, 2 and 3.

    Args:
        runs: where its directory is made.
    """

    def kill(found: Any) -> None:
        if found.number == 4:
            raise Killed

    trainer = open_trainer(small_config(), str(runs), on_step=kill)
    try:
        trainer.run()
    except Killed:
        return trainer.run_directory.path
    raise AssertionError("the run was not killed")


def verdicts(run: Path, acts: dict[str, Act]) -> list[Verdict]:
    """Resumes a damaged copy of a run for each kind.

    Args:
        run: stays as it is.
        acts: what is done to a copy, by the name of the kind.
    """
    expected, _ = _resumed(run, lambda copy: None)
    found = []
    for kind, act in acts.items():
        try:
            result, said = _resumed(run, act)
        except (ValueError, OSError, ImportError) as error:  # what the command turns into one line
            text = str(error)
            is_clear = "\n" not in text and ("/" in text or "json" in text)
            found.append(Verdict(kind, "refused" if is_clear else "unclear", text))
            continue
        except Exception as error:  # it is the script's task to find these
            found.append(Verdict(kind, "unclear", f"{type(error).__name__}: {error}"))
            continue
        found.append(Verdict(kind, _word(result, expected, said), " | ".join(said)))
    return found


def _word(result: dict[str, Any], expected: dict[str, Any], said: list[str]) -> str:
    if any("\n" in line for line in said):
        return "unclear"
    if _same(result, expected):
        return "same"
    if any("the run is extended" in line for line in said):
        return "warned"
    if result["step"] < expected["step"]:
        return "older" if f"continuing after step {result['step']} of" in " ".join(said) else "silent"
    logs_differ_only = all(_same(result[name], expected[name]) for name in expected if name not in LOGS)
    return "warned" if logs_differ_only and any("is not what it was" in line for line in said) else "silent"


def _resumed(run: Path, act: Act) -> tuple[dict[str, Any], list[str]]:
    """What a damaged copy resumes with, and the warnings."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "run"
        shutil.copytree(run, copy)
        act(copy)
        said = _Heard()
        logging.getLogger().addHandler(said)
        try:
            with redirect_stdout(said), closing(open_trainer(run_config(copy), directory, resume=copy)) as trainer:
                return _everything(trainer, copy), said.lines
        finally:
            logging.getLogger().removeHandler(said)


class _Heard(logging.Handler):
    """Keeps warnings, and what is printed of where the run continues."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage() + ("\ntraceback" if record.exc_info else ""))

    def write(self, text: str) -> int:
        """As a stream that is printed to."""
        self.lines += [line for line in text.splitlines() if line.startswith("continuing after")]
        return len(text)


def _everything(trainer: Trainer, run: Path) -> dict[str, Any]:
    """All that decides how the run goes on, and its logs."""
    state = trainer.state
    return {
        "step": state.step,
        "arrays": jax.device_get(state.learner.arrays(True)),
        "stream": state.stream.get_state(),
        "curriculum": state.curriculum,
        "buffer": whole_buffer(state.buffer),
        "nesting": state.nesting,
        "before": state.before,
        "config": state.config,
        "newest": checkpoint_numbers(run / "checkpoints")[:1],
        **{name: read_log(run / name) for name in LOGS},
    }


def _same(one: Any, other: Any) -> bool:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in zip(leaves, others, strict=True)
    )


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def _change_lines(change: Callable[[list[bytes]], list[bytes]]) -> Act:
    return lambda path: path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def _edit(field: str, value: Any) -> Act:
    """Sets a field, named with dots, of a JSON file."""

    def act(path: Path) -> None:
        content = json.loads(path.read_text())
        *parents, name = field.split(".")
        part = content
        for parent in parents:
            part = part[parent]
        part[name] = value
        path.write_text(json.dumps(content, indent=2) + "\n")

    return act


# What can happen to any file.
OF_A_FILE: dict[str, Act] = {
    "one bit flipped": _flip,
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a directory in its place": _to_directory,
    "NUL bytes": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "junk behind it": lambda path: path.write_bytes(path.read_bytes() + b"junk"),
}
# The same goes on in each file of a kind, so the first stands for them.
FILES = (
    *("config.json", "versions.json", "metrics.jsonl", "samples.jsonl", "events.out.tfevents*"),
    *("checkpoints/3/checksums.json", "checkpoints/3/_CHECKPOINT_METADATA"),
    *("checkpoints/3/host/metadata", "checkpoints/3/host_arrays/ocdbt.process_0/d/*", "checkpoints/3/arrays/_METADATA"),
    *("checkpoints/3/arrays/_sharding", "checkpoints/3/arrays/manifest.ocdbt", "checkpoints/3/arrays/d/*"),
    *("checkpoints/3/arrays/ocdbt.process_0/d/*", "checkpoints/2/arrays/ocdbt.process_0/d/*"),
    *("checkpoints/3/arrays/ocdbt.process_0/manifest.ocdbt", "checkpoints/3/host_arrays/manifest.ocdbt"),
    # The first block is shared by all checkpoints, and the third only the newest one has.
    *("checkpoints/blocks/replay-3.safetensors", "checkpoints/blocks/replay-1.safetensors"),
)
OF_A_LOG: dict[str, Act] = {
    "NUL bytes at the end": lambda path: path.write_bytes(path.read_bytes() + bytes(50)),
    "half a line at the end": lambda path: path.write_bytes(path.read_bytes() + b'{"step": 4, "rew'),
    "a line of NUL bytes": _change_lines(lambda lines: [lines[0], bytes(50) + b"\n", *lines[2:]]),
    "an extra line of junk": _change_lines(lambda lines: [lines[0], b"junk\n", *lines[1:]]),
    "half a line within": _change_lines(lambda lines: [lines[0], lines[1][:20] + b"\n", *lines[2:]]),
    "a line missing": _change_lines(lambda lines: [*lines[:1], *lines[2:]]),
    "a line doubled": _change_lines(lambda lines: [*lines[:2], *lines[1:]]),
    "two lines swapped": _change_lines(lambda lines: [lines[-1], *lines[1:-1], lines[0]]),
    "a value edited": lambda path: path.write_bytes(path.read_bytes().replace(b'"reward": 0', b'"reward": 1', 1)),
    "not UTF-8": _change_lines(lambda lines: [lines[0], b"\xff\xfe\n", *lines[1:]]),
    "a number of 5000 digits": _change_lines(lambda lines: [b'{"step": ' + b"9" * 5000 + b"}\n", *lines]),
    "100,000 brackets": _change_lines(lambda lines: [b"[" * 100_000 + b"\n", *lines]),
    "ends of lines of another system": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "a mark of byte order": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
}
OF_THE_CONFIGURATION: dict[str, Act] = {
    "another rate": _edit("optimizer.learning_rate", 1e-3),
    "another seed": _edit("train.seed", 7),
    "another number of steps": _edit("train.steps", 50),
    "another group size": _edit("rollout.group_size", 8),
    "another width": _edit("model.shape.width", 32),
    "another name": _edit("name", "other"),
    "an unknown field": _edit("train.stepz", 1),
    "a word for a number": _edit("train.steps", "five"),
    "null for a part": _edit("rollout", None),
    "a list for a part": _edit("rollout", []),
    "NaN": _edit("optimizer.learning_rate", float("nan")),
}


# A run that was extended has the summary of its earlier, shorter end.
OF_THE_SUMMARY: dict[str, Act] = {
    "of an earlier end": lambda path: path.write_text('{"steps": 2}\n'),
    "empty": lambda path: path.write_text(""),
    "half of one": lambda path: path.write_text('{"steps": 5, "bef'),
    "NUL bytes": lambda path: path.write_bytes(bytes(100)),
    "a list": lambda path: path.write_text("[]"),
    "a directory in its place": lambda path: path.mkdir(),
    "half written under another name": lambda path: path.with_name("summary.json.4711.partial").write_text('{"st'),
}
OF_THE_BLOCKS: dict[str, Act] = {
    "all gone": lambda path: shutil.rmtree(path),
    "a file in the directory's place": lambda path: _to_file(path),
    "an extra block": lambda path: shutil.copy(path / "replay-1.safetensors", path / "replay-9.safetensors"),
    "half written under another name": lambda path: (path / "replay-4.safetensors.partial").write_bytes(b"x"),
    "the second under the third's name": lambda path: shutil.copy(
        path / "replay-2.safetensors", path / "replay-3.safetensors"
    ),
    "all flipped": lambda path: [_flip(file) for file in path.iterdir()],
}
# An array may lie in several files.
OF_THE_DATA_FILES: dict[str, Act] = {
    "all flipped": lambda path: [_flip(file) for file in path.iterdir()],
    "the smallest flipped": lambda path: _flip(_by_size(path)[0]),
    "the smallest removed": lambda path: _by_size(path)[0].unlink(),
    "all gone": lambda path: shutil.rmtree(path),
    "the largest under another name": lambda path: _by_size(path)[-1].rename(path / "other"),
    "the largest doubled": lambda path: shutil.copy(_by_size(path)[-1], path / "other"),
    "the smallest as the largest": lambda path: shutil.copy(_by_size(path)[0], _by_size(path)[-1]),
}
OF_THE_EVENTS: dict[str, Act] = {
    "a second file with junk": lambda run: (run / "events.out.tfevents.1.junk").write_bytes(b"junk" * 50),
    "a link to nowhere": lambda run: (run / "events.out.tfevents.1.link").symlink_to("nowhere"),
}


def _by_size(directory: Path) -> list[Path]:
    return sorted(directory.iterdir(), key=lambda path: (path.stat().st_size, path.name))


def _new_directory(name: str) -> Act:
    return lambda checkpoints: (checkpoints / name).mkdir()


OF_THE_CHECKPOINTS: dict[str, Act] = {
    **{
        f"an empty directory '{name}'": _new_directory(name)
        for name in ("999", "²", "007", "-1", "1e3", "junk", "4.orbax-checkpoint-tmp", "3_copy", "9" * 30)
    },
    "a file '999'": lambda path: (path / "999").write_text("x"),
    "a broken link '999'": lambda path: (path / "999").symlink_to("nowhere"),
    "a directory '999' with junk": lambda path: ((path / "999").mkdir(), (path / "999" / "x").write_text("x")),
    "checkpoint 2 under the name 3": lambda path: (shutil.rmtree(path / "3"), shutil.copytree(path / "2", path / "3")),
    "checkpoint 3 under the name 9": lambda path: (path / "3").rename(path / "9"),
    "host of 2 in 3": lambda path: (shutil.rmtree(path / "3/host"), shutil.copytree(path / "2/host", path / "3/host")),
    "arrays of 2 in 3": lambda path: (
        shutil.rmtree(path / "3/arrays"),
        shutil.copytree(path / "2/arrays", path / "3/arrays"),
    ),
    "the newest empty": lambda path: (shutil.rmtree(path / "3"), (path / "3").mkdir()),
    "the newest gone": lambda path: shutil.rmtree(path / "3"),
    "a file in the newest one's place": lambda path: _to_file(path / "3"),
    "the two newest damaged": lambda path: [_flip(path / n / "host/metadata") for n in "32"],
    "all damaged": lambda path: [_flip(path / n / "host/metadata") for n in "321"],
    "all without checksums": lambda path: [(path / n / "checksums.json").unlink() for n in "321"],
    "all gone": lambda path: [shutil.rmtree(path / n) for n in "321"],
    "the directory gone": lambda path: shutil.rmtree(path),
    "a file in the directory's place": _to_file,
    **{
        f"no {part} in the newest": lambda path, part=part: shutil.rmtree(path / "3" / part)
        for part in ("arrays", "host", "host_arrays")
    },
    "a file in the place of arrays": lambda path: _to_file(path / "3/arrays"),
    "an extra file in arrays": lambda path: (path / "3/arrays/extra").write_text("x"),
    "a checksum edited": lambda path: _edit("host/metadata", [1, 2])(path / "3/checksums.json"),
}


def kinds() -> dict[str, Act]:
    """Every kind of damage by its name; each acts on the directory of a run."""
    acts: dict[str, Act] = {}
    for pattern in FILES:
        for what, act in OF_A_FILE.items():
            acts[f"{pattern}: {what}"] = lambda run, pattern=pattern, act=act: act(_first(run, pattern))
    groups = (
        *((name, OF_A_LOG) for name in LOGS),
        ("config.json", OF_THE_CONFIGURATION),
        ("summary.json", OF_THE_SUMMARY),
        (".", OF_THE_EVENTS),
        ("checkpoints", OF_THE_CHECKPOINTS),
        ("checkpoints/blocks", OF_THE_BLOCKS),
        ("checkpoints/3/arrays/ocdbt.process_0/d", OF_THE_DATA_FILES),
    )
    for name, group in groups:
        for what, act in group.items():
            acts[f"{name}: {what}"] = lambda run, name=name, act=act: act(run / name)
    return acts


def _first(run: Path, pattern: str) -> Path:
    """The largest file that a pattern names: where there are several, it holds what the others point to."""
    return max(run.glob(pattern), key=lambda path: path.stat().st_size)


TABLE_BEGINS, TABLE_ENDS = "<!-- kinds of damage -->", "<!-- end of kinds -->"


def markdown(found: list[Verdict]) -> str:
    """The table of kinds and outcomes: a line for each place and outcome, with all that was done there.

    Args:
        found: one verdict for each kind.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for verdict in found:
        where, _, what = verdict.kind.partition(": ")
        lines.setdefault((where, verdict.word), []).append(what)
    rows = [f"| `{where}` | {'; '.join(whats)} | {word} |" for (where, word), whats in lines.items()]
    return "\n".join(["| where | what was done | outcome |", "|---|---|---|", *rows])


def kinds_in(page: str) -> dict[str, str]:
    """The outcome of each kind in the table of a page, by the kind's name.

    Args:
        page: its text.
    """
    rows = re.findall(r"^\| `(.*)` \| (.*) \| (\w+) \|$", page.split(TABLE_BEGINS)[1], re.MULTILINE)
    return {f"{where}: {what}": word for where, whats, word in rows for what in whats.split("; ")}


def main(arguments: list[str] | None = None) -> int:
    """Prints the table and its sum; the exit code is 1 where something is silent or too much unclear."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="kinds whose name holds all of them")
    parser.add_argument("--page", type=Path, help="a Markdown page whose table of kinds is replaced")
    known = parser.parse_args(arguments)
    if known.page is not None and not known.page.is_file():
        parser.error(f"--page is {str(known.page)!r}; allowed is a Markdown page that is there")
    quiet_libraries()
    logging.getLogger().addHandler(logging.NullHandler())
    chosen = {kind: act for kind, act in kinds().items() if all(word in kind for word in known.words)}
    if not chosen:  # no kind would be silent
        parser.error(f"words are '{' '.join(known.words)}', and no kind of damage has all of them")
    with tempfile.TemporaryDirectory() as directory:
        found = verdicts(stopped_run(Path(directory)), chosen)
    for verdict in found:
        print(f"{verdict.word:8} {verdict.kind:70} {verdict.said[:160]!r}")
    counts = collections.Counter(verdict.word for verdict in found)
    print(f"{len(found)} kinds: " + ", ".join(f"{number} {word}" for word, number in counts.most_common()))
    if known.page is not None:
        page = known.page.read_text(encoding="utf-8")
        before, rest = page.split(TABLE_BEGINS)
        after = rest.split(TABLE_ENDS)[1]
        table = f"{TABLE_BEGINS}\n{markdown(found)}\n{TABLE_ENDS}"
        known.page.write_text(f"{before}{table}{after}", encoding="utf-8")
    return int(counts["silent"] > 0 or counts["unclear"] > 0.02 * len(found))


if __name__ == "__main__":
    sys.exit(main())
