"""A worker process of the reward pool: reads requests as lines of JSON, answers in lines of JSON.

`pool.py` starts it. The first line of its input sets it up; each further
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
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from nested_reft.config_files import load_module
from nested_reft.rewards.limits import LARGEST_REWARD
from nested_reft.rewards.math_answer import verify_math


def main() -> None:
    """Serves until its input ends."""
    # Some supervisors send SIGTERM to every process. The run goes on for a step, and needs its rewards. Programs that a
    # reward function starts do not get a handler, and would get a signal that is ignored.
    signal.signal(signal.SIGTERM, lambda *_: None)
    requests, replies = _private_streams()
    setup = json.loads(requests.readline())
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
    except BaseException as error:  # whatever a verifier or a user's function raises, `sys.exit()` as well
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
    return _finite(load_function(setup["function"])(text, request["example"]))


def _finite(value: Any) -> float:
    """A number of any kind that `float` takes: also NumPy's, JAX's and torch's, fractions and decimals.

    Raises:
        ValueError: it is no number, or none that training can compute with.
    """
    try:
        # `float` reads texts too, but a function that returns one has a mistake in it.
        number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError is how torch refuses a vector
        number = math.nan
    if abs(number) <= LARGEST_REWARD:
        return number
    raise ValueError(
        f"the function returned {_short(value)}; allowed is a finite number from -{LARGEST_REWARD:g} to"
        f" {LARGEST_REWARD:g}, because training computes its square in float32"
    )


def _short(value: Any) -> str:
    try:
        return f"{value!r:.100}"
    except Exception:  # such as an integer of thousands of digits
        return f"a value of type {type(value).__name__}"


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
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    found: Any = getattr(module, function)
    if not callable(found):
        raise TypeError(f"'{name}' is of type {type(found).__name__}, not a function")
    # A function of other arguments fails now and not at the first completion.
    inspect.signature(found).bind("text", {})
    return cast("Callable[[str, dict[str, Any]], float]", found)


def _load_file(path: Path) -> ModuleType:
    """The module of a file. Processes that it starts can import it by its name, if no other module has that name."""
    name = path.stem
    if importlib.util.find_spec(name) is not None:
        return load_module(path, f"nested_reft_reward_{name}")
    # It comes last, so that nothing in the file's directory takes the place of another module.
    sys.path.append(str(path.absolute().parent))
    return load_module(path, name)
