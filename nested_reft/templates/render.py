"""Rendering chat templates in a process of their own, with limits of time and memory."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nested_reft.templates import worker
from nested_reft.untrusted import BadFile

TIME_LIMIT_SECONDS = 5.0  # of computing; a real template takes less than a thousandth of it


def render(template: str, variables: Mapping[str, Any], time_limit_seconds: float = TIME_LIMIT_SECONDS) -> str:
    """The text that a template makes of its variables.

    Args:
        template: Jinja source; untrusted.
        variables: JSON-able values by name.
        time_limit_seconds: how long the worker may compute; more than 0.

    Raises:
        ValueError: the variables are not JSON-able.
        BadFile: the template fails, or takes more time or memory than a template may.
    """
    try:
        request = json.dumps({"template": template, "variables": variables, "time_limit_seconds": time_limit_seconds})
    except (TypeError, ValueError) as error:
        raise ValueError(f"messages and variables of a chat template must be JSON-able: {error}") from None
    reply = _process().ask(request.encode() + b"\n")
    if reply is None:
        raise BadFile(
            f"the chat template takes more than {time_limit_seconds:g} seconds for one prompt, or crashed the process"
            " that renders it"
        )
    if "error" in reply:
        raise BadFile(f"the chat template refuses these messages: {reply['error']}")
    return reply["text"]


class _Process:
    """The worker: started when it is first needed, and again after it was ended by a limit."""

    def __init__(self):
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str] | None:
        """Sends a request and gives its reply; None where the worker was ended."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None  # both are pipes
            try:
                process.stdin.write(request)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:  # it ended before it read the request
                reply = b""
            except BaseException:
                # After an interrupt the next request would get this one's reply.
                self.stop()
                raise
            if not reply.endswith(b"\n"):
                self.stop()
                return None
            return json.loads(reply)

    def stop(self) -> None:
        """Ends the worker; another request starts a new one."""
        process, self._worker = self._worker, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes too

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            self._worker = subprocess.Popen(
                # -P keeps the directory of this file, and any other, from being searched for modules.
                [sys.executable, "-P", str(Path(worker.__file__))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # An interrupt at the terminal is for this process alone. The worker ends with its input.
                start_new_session=True,
            )
        return self._worker


@functools.cache
def _process() -> _Process:
    """One worker serves all templates of this process."""
    process = _Process()
    atexit.register(process.stop)
    return process
