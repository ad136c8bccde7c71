"""The command line: `nested-reft COMMAND ...`.

    train CONFIG [--FIELD VALUE ...]   train; every field of the configuration can be overridden
    train --resume RUN                 continue a run from its newest checkpoint
    configs                            the configurations that ship, and how long each takes
    eval POLICY                        held-out accuracy of a run or a model
    sample POLICY PROMPT               full and nested completions side by side
    report RUN                         figures and tables of a run, written into RUN/report
    measure-layers POLICY              each layer's divergence, for measured plans
    export RUN DIRECTORY               a Hugging Face directory of a run's trained model
    compile CONFIG --topology NAME     what a decode step and an update cost on a TPU that is not here
    verify-estimators                  exact bias and variance of every estimator, by enumeration

Exit codes: 0 done, 1 a check or an update failed, 2 bad input (refused before training), 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from contextlib import nullcontext

from nested_reft import __version__
from nested_reft.cli.bad_input import BadInput
from nested_reft.training.interrupts import stop_requests

# Each command and the module here that has its `run`. A module is imported when its command is called: most of them
# bring JAX along, which takes seconds that `--help` and a mistyped name need not wait for.
COMMANDS = {
    "train": "train",
    "configs": "configs",
    "eval": "evaluate",
    "sample": "sample",
    "report": "report",
    "measure-layers": "measure_layers",
    "export": "export",
    "compile": "compile",
    "verify-estimators": "verify_estimators",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"error: command '{command}' is unknown; known are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Warnings of the preparations go to the user; the package itself sets up no logging.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and JAX report their progress through absl
    return _exit_code(command, rest)


def _exit_code(command: str, arguments: list[str]) -> int:
    """Runs a command and turns what users can mend or have caused into one line and a code.

    Any other exception is a bug, so its traceback is shown.
    """
    try:
        # A run is told to stop rather than broken off, also while its modules are imported: an interrupt that is raised
        # in there may get lost.
        with stop_requests(_leave) if command == "train" else nullcontext():
            importlib.import_module(f"nested_reft.cli.{COMMANDS[command]}").run(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # an update was not finite
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as a shell reports a program that SIGINT ended
    return 0


def _leave() -> None:
    """What a second signal does while nothing is written: an exception could get lost in an import or a callback."""
    os.write(2, b"interrupted\n")
    os._exit(130)
