"""A worker process of the reward pool: reads requests as lines of JSON, answers in lines of JSON.

Run as `python -m nested_reft.rewards.worker`. The first line of its input sets it up; each further
one asks it to get something ready (`prepare`) or to score one completion. Nothing is ever
unpickled, and what a reward function prints cannot get into the answers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from nested_reft.rewards.math_answer import verify_math


def main() -> None:
    """Serves until its input ends."""
    requests, replies = _private_streams()
    setup = json.loads(requests.readline())
    # The list is changed in place, because the import system keeps the list itself.
    sys.path[:] = setup["path"]
    if setup["memory_bytes"]:
        with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
            resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], resource.getrlimit(resource.RLIMIT_AS)[1]))
    with open(os.devnull, "w") as nowhere:
        for line in requests:
            # Whoever asked kills what takes too long; should they be gone themselves, this ends it.
            faulthandler.dump_traceback_later(setup["last_resort_seconds"], exit=True, file=nowhere)
            reply = _answer(json.loads(line), setup)
            faulthandler.cancel_dump_traceback_later()
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """The pipes to the pool; reward functions find nothing to read and print into nothing."""
    # Copies of the pipes are kept, and then nothing takes the place of standard input and output.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "r+b") as nowhere:
        os.dup2(nowhere.fileno(), 0)
        os.dup2(nowhere.fileno(), 1)
    return requests, replies


def _answer(request: dict[str, Any], setup: dict[str, Any]) -> dict[str, Any]:
    try:
        if "prepare" in request:
            _prepare(request["prepare"], setup)
            return {"value": 0.0}
        return {"value": _score(request, setup)}
    except Exception as error:  # whatever a verifier or a user's function raises
        # A long message of a user's function should not fill the log.
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def _prepare(kind: str, setup: dict[str, Any]) -> None:
    """Imports what a kind of request needs, so that no completion's time goes into it."""
    if kind == "math":
        # One comparison imports math-verify and SymPy, and warms their parsers.
        verify_math(r"\frac{1}{2}", "0.5")
    elif kind == "task":
        import reasoning_gym  # noqa: F401
    else:
        load_function(setup["function"])


def _score(request: dict[str, Any], setup: dict[str, Any]) -> float:
    text = request["text"]
    if request["kind"] == "math":
        return verify_math(text, request["answer"])
    if request["kind"] == "task":
        metadata = request["metadata"]
        # Parameters travel as JSON text, because a cache needs keys that can be hashed.
        score = _task_scorer(metadata["source_dataset"], json.dumps(metadata["source_parameters"]))
        value = score(text, {"question": "", "answer": request["answer"], "metadata": metadata})
        return float(value >= 1.0)  # several give partial credit for garbage
    value = load_function(setup["function"])(text, request["example"])
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"the function returned {value!r:.100}; allowed is a finite number")


@functools.cache
def _task_scorer(task: str, parameters: str) -> Callable[..., float]:
    import reasoning_gym

    # A verifier belongs to a dataset; one entry is enough to have it.
    return reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(parameters)).score_answer


@functools.cache
def load_function(name: str) -> Callable[[str, dict[str, Any]], float]:
    """The function of `package.module:function` or `path/file.py:function`.

    Args:
        name: the value of `reward.function`.

    Raises:
        TypeError: it is not a function of a text and an example.
    """
    module_name, _, function = name.rpartition(":")
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None:
            raise ImportError(f"'{module_name}' cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    found: Any = getattr(module, function)
    if not callable(found):
        raise TypeError(f"'{name}' is of type {type(found).__name__}, not a function")
    # A function of other arguments fails now and not at the first completion.
    inspect.signature(found).bind("text", {})
    return cast("Callable[[str, dict[str, Any]], float]", found)


if __name__ == "__main__":
    main()
