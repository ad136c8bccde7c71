"""The command line: `nested-reft COMMAND ...`.

    train CONFIG [--FIELD VALUE ...]   train; every field of the configuration can be overridden
    train --resume RUN                 continue a run from its newest checkpoint
    sft CONFIG                         supervised fine-tuning on a configuration's answers, without rollouts
    reward-model CONFIG                train a reward model on preference pairs, for reward.model
    dpo CONFIG                         train on preference pairs directly, without rollouts
    sweep CONFIG ... [--FIELD A B]     train a grid of configurations, values and seeds, and compare the runs
    compare RUN [RUN ...]              finished runs, or those of a sweep, in one table with intervals over seeds
    configs                            the configurations that ship, and how long each takes
    eval POLICY                        held-out accuracy of a run or a model; of a reward model, its pairs
    sample POLICY PROMPT               full and nested completions side by side
    report RUN [RUN ...]               a page of HTML on a run, in RUN/report, or on several side by side
    samples RUN                        the logged samples of a run as plain text, by step, source or verdict
    measure-layers POLICY              each layer's divergence, for measured plans
    fit-bridges POLICY --out FILE      bridges for the layers that a configuration leaves out
    replay-batch RUN                   repeats the update for which a run ended as not finite
    export RUN DIRECTORY               a Hugging Face directory of a run's trained model
    compile CONFIG --topology NAME     what rollouts and updates cost on a TPU that is not here
    verify-estimators                  exact bias and variance of every estimator, by enumeration

Compiled programs are kept in the user's cache directory; --no-compilation-cache turns that off.
Exit codes: 0 done, 1 a check or an update failed, 2 bad input (refused before training), 75 pre-empted by SIGTERM
(resume it), 76 stalled (nothing went on for train.stall_seconds; resume it), 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
from contextlib import nullcontext

from nested_reft import __version__
from nested_reft.cli.bad_input import BadInput
from nested_reft.cli.joining import join, take_flags
from nested_reft.cli.output import complain, say
from nested_reft.exit_codes import BAD_INPUT, BROKEN_PIPE, DONE, FAILED, INTERRUPTED, PREEMPTED
from nested_reft.training.interrupts import Preempted, interruption, stop_requests
from nested_reft.untrusted import printable

# Each command and the module here that has its `run`. A module is imported when its command is called: most of them
# bring JAX along, which takes seconds that `--help` and a mistyped name need not wait for.
COMMANDS = {
    "train": "train",
    "sft": "sft",
    "reward-model": "reward_model",
    "dpo": "dpo",
    "sweep": "sweep",
    "compare": "compare",
    "configs": "configs",
    "eval": "evaluate",
    "sample": "sample",
    "report": "report",
    "samples": "samples",
    "measure-layers": "measure_layers",
    "fit-bridges": "fit_bridges",
    "replay-batch": "replay_batch",
    "export": "export",
    "compile": "compile",
    "verify-estimators": "verify_estimators",
}


TRAINING = ("train", "sft", "reward-model", "dpo")  # what several processes may do together
STOPPABLE = (*TRAINING, "sweep")  # what ends with a checkpoint when it is told to stop


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    try:
        code = _exit_code(sys.argv[1:] if arguments is None else arguments)
        _leave_others(code)
        # What is still buffered would otherwise be written, and fail, after the last line of Python.
        sys.stdout.flush()
        return code
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What is still buffered has nowhere to go, and would fail again when Python ends.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # whoever read the output went away, as `| head` does
            return BROKEN_PIPE
        return _refusal(error, FAILED)


def _leave_others(code: int) -> None:
    """Ends one of several processes that failed or was stopped; JAX would wait at its end for those that still work."""
    if code != DONE and _is_one_of_several():
        sys.modules["nested_reft.processes"].end_together(code)


def _is_one_of_several() -> bool:
    """Whether other processes belong to this run. It imports nothing, since JAX takes a second."""
    processes = sys.modules.get("nested_reft.processes")
    return processes is not None and processes.count() > 1


def _exit_code(arguments: list[str]) -> int:
    """Runs a command and turns what users can mend or have caused into one line and a code.

    Any other exception is a bug, so its traceback is shown.
    """
    try:
        _run(arguments)
    except BadInput as error:
        return _refusal(error, BAD_INPUT)
    except FloatingPointError as error:  # updates or parameters were not finite
        return _refusal(error, FAILED)
    except Preempted:
        complain("pre-empted")
        return PREEMPTED
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # help was printed, or a command says itself how it ends
        return stop.code if isinstance(stop.code, int) else DONE
    except Exception:
        # After a bug none of several processes may wait for the others, as Python's end would.
        if _is_one_of_several():
            traceback.print_exc()
            return FAILED
        raise
    return DONE


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        say(str(__doc__))
        return
    command, *rest = arguments
    if command == "--version":
        say(__version__)
        return
    if command not in COMMANDS:
        raise BadInput(f"command '{command}' is unknown; known are {', '.join(COMMANDS)}")
    # Warnings of the preparations go to the user; the package itself sets up no logging.
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax and JAX report their progress through absl
    if command in TRAINING:
        rest, flags = take_flags(rest, os.environ)
        join(flags)
    # A run is told to stop rather than broken off, also while its modules are imported: an interrupt that is raised
    # in there may get lost.
    with stop_requests(_leave) if command in STOPPABLE else nullcontext():
        importlib.import_module(f"nested_reft.cli.{COMMANDS[command]}").run(rest)


class PrintableFormatter(logging.Formatter):
    """Warnings name sources and tokens that somebody else wrote."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record; a traceback after it keeps its lines."""
        return printable(super().formatMessage(record))


def _refusal(error: Exception, code: int) -> int:
    # Messages of libraries have several lines, and names in them may hold what a terminal would obey.
    complain(f"error: {' '.join(str(error).split())}")
    return code


def _leave() -> None:
    """What a second signal does while nothing is written: an exception could get lost in an import or a callback."""
    is_preemption = isinstance(interruption(), Preempted)
    os.write(2, b"pre-empted\n" if is_preemption else b"interrupted\n")
    os._exit(PREEMPTED if is_preemption else INTERRUPTED)
