"""`nested-reft train`: trains a configuration, or continues a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nested_reft import paths, processes, remote_files
from nested_reft.api import Run, check_resumable, is_complete, open_trainer
from nested_reft.checkpoints import newest_checkpoint
from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import MachineError, checking_input
from nested_reft.cli.joining import add_flags
from nested_reft.cli.output import complain, say
from nested_reft.cli.overrides import HELP, override
from nested_reft.exit_codes import FAILED, STALLED, LateError
from nested_reft.json_files import check_can_write
from nested_reft.replay import GenerationLimitError
from nested_reft.reports.report import write_report
from nested_reft.reports.tables import summary_table
from nested_reft.rewards.limits import RewardError
from nested_reft.run_mirror import address_of, local_run
from nested_reft.training.agreement import DivergedError
from nested_reft.training.config import Config, forbidden_changes, load_config, with_absolute_paths
from nested_reft.training.offline import OfflineKind, as_offline
from nested_reft.training.reinforcement import EmptyUpdatesError
from nested_reft.training.search_pool import SearchError
from nested_reft.training.setup import run_config
from nested_reft.untrusted import printable, shown

RUNS = "runs"


def run(arguments: list[str], command: str = "train", kind: OfflineKind | None = None) -> None:
    """Trains to the last step, prints the summary and writes the report.

    Args:
        arguments: of the command.
        command: its name; `sft`, `reward-model` and `dpo` are `train` with an objective of their own.
        kind: that objective; None keeps the configuration's.
    """
    # Taken off first: argparse would take the value of an override that follows for it.
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = _parser(command)
    known, overrides = parser.parse_known_args(arguments[1:] if name else arguments)
    if not set(HELP).isdisjoint(overrides):
        parser.print_help()
        if name is None:
            return
        say()  # the help of the fields follows, and ends the program, where the overrides are read
    _train(known, name, overrides, command, kind)


def _train(
    known: argparse.Namespace, name: str | None, overrides: list[str], command: str, kind: OfflineKind | None
) -> None:
    """A run that does not come to its end says how to continue."""
    path: Path | None = None
    try:
        with checking_input():
            # A run on gs:// works in a local copy, which each machine has.
            path = known.resume = processes.agreed(lambda: None if known.resume is None else local_run(known.resume))
            config = processes.agreed(lambda: _checked_config(known, name, overrides, command, kind))
            # A run that is complete loads no model. All processes ask: they may not all continue one.
            if is_complete(path, config):
                assert path is not None
                say(f"run '{address_of(path)}' is complete: {path / 'summary.json'}{_without_effect(known, overrides)}")
                if processes.is_writer():
                    keep_json(known.json, Run(path).summary())
                return
            trainer = open_trainer(config, _runs(known), known.resume, on_stall=_end_stalled)
        path = trainer.run_directory.path
        summary = trainer.run()
        # Of several processes one has read the log, so its summary alone is whole.
        if not processes.is_writer():
            return
        say(f"\n{summary_table(summary)}")
        keep_json(known.json, summary)
        _report(path)
    except KeyboardInterrupt:
        complain(f"\n{_how_to_continue(path)}")
        raise  # for `main`, which has the exit code
    except LateError:
        complain(f"\n{_how_to_continue(path)}")
        raise  # for `main`, which has the exit code
    # A checkpoint, a log or a result could not be written, or there are no searchers any more.
    except (OSError, MachineError, SearchError) as error:
        complain(f"\nerror: {error}\n{_how_to_continue(path)}")
        raise SystemExit(FAILED) from None
    except (GenerationLimitError, EmptyUpdatesError, RewardError, DivergedError) as error:
        complain(f"\nerror: {error}")
        raise SystemExit(FAILED) from None


def _without_effect(known: argparse.Namespace, overrides: list[str]) -> str:
    """What was asked for in vain, of a run that is complete; as the end of a line."""
    # Two forms of a name are one option, and each is named once.
    options = dict.fromkeys(word.partition("=")[0] for word in overrides if word.startswith("--"))
    given = [*options, *(["--runs"] if known.runs is not None else [])]
    if not given:
        return ""
    verb = "has" if len(given) == 1 else "have"
    return f"; {', '.join(given)} {verb} no effect, because there is nothing left to compute (--train.steps extends it)"


def _end_stalled(words: str) -> None:
    """Ends the process at once: what stalls would hold up every orderly way to end."""
    os.write(2, f"\nerror: {printable(words)}; to continue, start the run again with --resume\n".encode())
    os._exit(STALLED)


def _how_to_continue(path: Path | None) -> str:
    if path is None or newest_checkpoint(path / "checkpoints") is None:
        return "the run ended before its first checkpoint; there is nothing to continue"
    return f"to continue: nested-reft train --resume {address_of(path)}"


def _parser(command: str) -> argparse.ArgumentParser:
    parser = command_parser(
        f"{command} CONFIG",
        f"Overrides follow as --FIELD VALUE; `{command} CONFIG --help` lists the fields.",
        compiles=True,
        has_help=False,  # that of the fields comes with it, so both are printed here
    )
    parser.add_argument("--resume", metavar="RUN", help="continue this run directory instead of CONFIG")
    parser.add_argument("--runs", help=f"where the run directory is made, {RUNS} by default; also gs://BUCKET/NAME")
    add_json(parser, "the summary")
    add_flags(parser)
    return parser


def _checked_config(
    known: argparse.Namespace, name: str | None, overrides: list[str], command: str, kind: OfflineKind | None
) -> Config:
    """The configuration, and that the places are there which the command names: all that needs no other process."""
    config = _resolve_config(name, known.resume, overrides, command, kind)
    _check_places(known)
    return config


def _resolve_config(
    name: str | None, resume: Path | None, overrides: list[str], command: str, kind: OfflineKind | None
) -> Config:
    """The configuration of a name or a run, with overrides; a resumed run keeps its own, but it may take more steps."""

    def named(name: str) -> Config:
        return load_config(name) if kind is None else as_offline(load_config(name), kind)

    if resume is None:
        if name is None:
            raise ValueError(f"{command} needs the name of a configuration as its first word, or --resume RUN")
        return _of_kind(override(named(name), overrides), command, kind)
    stored = with_absolute_paths(run_config(resume), Path.cwd())
    if kind is not None and stored.loss.kind != kind:
        raise ValueError(
            f"run '{address_of(resume)}' trains loss.kind '{stored.loss.kind}', and `nested-reft {command}` continues"
            f" runs of '{kind}' alone; to continue it: nested-reft train --resume {address_of(resume)}"
        )
    # A name or overrides may be given once more, as long as they say what the run has.
    asked = with_absolute_paths(override(stored if name is None else named(name), overrides), Path.cwd())
    # Overrides are compared by their values, so words that change nothing are no error.
    changed = forbidden_changes(stored.to_json(), asked.to_json())
    if not changed:
        return asked
    listed = "; ".join(f"{field} is {shown(new)}, the run has {shown(old)}" for field, old, new in changed)
    begin = f"leave out '{name}'" if name is not None else "leave the overrides out"
    raise ValueError(
        f"run '{address_of(resume)}' holds another configuration: {listed}. To continue it, {begin}; only --train.steps"
        " may be raised, and --mesh, --train.save-seconds, --train.stall-seconds and --train.wandb-project changed. To"
        " start another run, leave out --resume"
    )


def _of_kind(config: Config, command: str, kind: OfflineKind | None) -> Config:
    """The configuration, if the command trains its objective; `train` continues and trains any.

    Raises:
        ValueError: it is another one.
    """
    if kind is not None and config.loss.kind != kind:
        raise ValueError(
            f"loss.kind is '{config.loss.kind}', and `nested-reft {command}` trains '{kind}'; leave --loss.kind and"
            " --loss.preset out, or use `nested-reft train`"
        )
    return config


def _check_places(known: argparse.Namespace) -> None:
    """Refuses files and directories that could not be written or resumed from, before data and model are loaded."""
    check_json(known.json)
    _check_runs_directory(_runs(known))
    if known.resume is not None:
        check_resumable(known.resume)
    # A resumed run stays where it is, and `open_trainer` looks at that.
    elif not paths.is_remote(_runs(known)):
        check_can_write(Path(_runs(known)), "--runs", "name another directory by --runs")


def _runs(known: argparse.Namespace) -> str:
    return RUNS if known.runs is None else known.runs


def _check_runs_directory(runs: str) -> None:
    if paths.is_remote(runs):
        remote_files.check(paths.address(runs))
        return
    # Directories are made with their parents, so a file anywhere on the way would fail later, when the model is loaded.
    taken = [path for path in (Path(runs), *Path(runs).absolute().parents) if path.exists() and not path.is_dir()]
    if not runs or taken:
        raise ValueError(
            f"--runs is '{runs}'; allowed is a directory, or one that can be made"
            + (f": '{taken[0]}' is a file" if taken else "")
        )


def _report(run: Path) -> None:
    """Writes the report and says where it is, as the last line."""
    result = write_report([run])
    # The page needs no extra. Without it there are no PNG files beside the page, and the run is as good.
    if result["no_figures"] is not None:
        say(f"no PNG files: {result['no_figures']}")
    say(f"report: {result['report']}")
