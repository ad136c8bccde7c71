"""Flags and environment by which a command joins the other processes of its run, before JAX looks for devices."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping

from nested_reft.cli.bad_input import BadInput
from nested_reft.untrusted import shown

CONNECT_SECONDS = 300  # how long a process waits for the others at the start
# Each flag with the variable of the environment that stands for it, the form of its value, and what it says.
FLAGS = {
    "--coordinator": (
        "NESTED_REFT_COORDINATOR",
        "HOST:PORT",
        "of several processes, where process 0 can be reached; 'auto' lets JAX detect Cloud TPU, GKE or Slurm",
    ),
    "--processes": ("NESTED_REFT_PROCESSES", "N", "how many processes there are"),
    "--process": ("NESTED_REFT_PROCESS", "I", "which of them this is, from 0"),
    "--heartbeat-seconds": (
        "NESTED_REFT_HEARTBEAT_SECONDS",
        "S",
        "a process that was silent for so long counts as dead, and the others end; 100 unless given",
    ),
    "--local-devices": ("NESTED_REFT_LOCAL_DEVICES", "I,J", "the GPUs of this host that it uses; all unless given"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Shows the flags in the help of a command; `take_flags` has taken them before it reads its arguments.

    Args:
        parser: of the command.
    """
    for flag, (variable, form, words) in FLAGS.items():
        parser.add_argument(flag, metavar=form, help=f"{words} ({variable})")


def take_flags(arguments: list[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Parts the flags of joining from the other arguments.

    Args:
        arguments: of a command.
        environment: gives what no flag does.

    Returns:
        The other arguments, and the values by flag.

    Raises:
        BadInput: a flag has no value.
    """
    values = {flag: environment[name] for flag, (name, *_) in FLAGS.items() if environment.get(name)}
    rest, words = [], iter(arguments)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag not in FLAGS:
            rest.append(word)
            continue
        found = value if has_value else next(words, None)
        if not found:
            raise BadInput(f"{flag} needs a value")
        values[flag] = found
    return rest, values


def join(values: Mapping[str, str]) -> None:
    """Joins the other processes; nothing without flags. All but the first process show errors only.

    Args:
        values: what `take_flags` returned.

    Raises:
        BadInput: the values do not go together.
        LateError: process 0 cannot be reached.
    """
    if not values:
        return
    others = [flag for flag in values if flag not in ("--coordinator", "--heartbeat-seconds")]
    if values.get("--coordinator") == "auto" and others:
        raise BadInput(f"{others[0]} is given, but --coordinator is 'auto', which detects it; leave one out")
    # Only now: JAX takes a second to import, and most commands have one process.
    from nested_reft import processes

    try:
        heartbeat = _whole("--heartbeat-seconds", values.get("--heartbeat-seconds", "100"), least=1)
        if values.get("--coordinator") == "auto":
            processes.start_detected(CONNECT_SECONDS, heartbeat)
        else:
            count = _whole("--processes", values.get("--processes", "1"), least=1)
            number = _whole("--process", values.get("--process", "0"))
            place = processes.ProcessConfig(
                values.get("--coordinator"),
                count,
                # One process alone needs no number, and is refused below with what it was given.
                number if count > 1 else 0,
                _devices(values.get("--local-devices")),
                connect_seconds=CONNECT_SECONDS,
                heartbeat_seconds=heartbeat,
            )
            if count == 1:
                raise BadInput(f"{next(iter(values))} is given, but --processes is 1; give --processes N above 1")
            # Where all took themselves for the first, each would wait for the others to join it.
            if "--process" not in values:
                raise BadInput(
                    f"--process is not given, and --processes is {count}; give each process its own number,"
                    f" 0 to {count - 1}, and 0 to the one at --coordinator"
                )
            processes.start(place)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not processes.is_writer():
        # Results and progress are the same everywhere, and one process shows them. tqdm reads its variable when it is
        # imported.
        os.environ["TQDM_DISABLE"] = "1"
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it is used to the end)


def _whole(flag: str, text: str, least: int = 0) -> int:
    if not (re.fullmatch("[0-9]{1,10}", text) and int(text) >= least):
        raise BadInput(f"{flag} is {shown(text)}; allowed is a whole number, {least} or more")
    return int(text)


def _devices(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(_whole("--local-devices", number) for number in text.split(","))
