"""The process that renders chat templates, which come with downloaded models: a line of JSON in, a line of JSON out.

A template is a program. The sandbox keeps it from files and attributes, but not from endless loops or from texts that
double; the limits of this process do. It imports nothing of this package, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT_BYTES = 512 << 20
MAX_CHARACTERS = 10_000_000
MAX_MESSAGE_CHARACTERS = 500
# Templates that write the date get this one. Prompts then depend on the configuration alone, and a run that is resumed
# another day asks what it asked before. Llama 3's own template writes this date where it has no clock.
TODAY = datetime(2024, 7, 26)


def main() -> None:
    """Serves until its input ends."""
    with contextlib.suppress(ValueError, OSError):  # where the system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The signal's own action ends the process, also in the middle of one long operation. It counts the time that
        # this process computes, so that a busy machine changes nothing.
        signal.setitimer(signal.ITIMER_PROF, request["time_limit_seconds"])
        reply = _reply(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()


def _reply(request: dict[str, Any]) -> bytes:
    try:
        text = _compiled(request["template"]).render(request["variables"])
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"it gives {len(text)} characters; allowed are {MAX_CHARACTERS}")
        return json.dumps({"text": text}).encode()
    except MemoryError:
        message = f"it needs more than {MEMORY_LIMIT_BYTES >> 20} MB"
    except jinja2.TemplateError as error:  # also what a template raises on purpose; the text is a sentence
        message = str(error)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    # Syntax errors have several lines.
    return json.dumps({"error": " ".join(message.split())[:MAX_MESSAGE_CHARACTERS]}).encode()


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    # Compiling a template takes longer than rendering it, so it happens once.
    return _environment().from_string(template)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words in some templates; here it only renders them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it, and declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        # The tag itself is left out, and what it encloses is rendered like any other part.
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment that Hugging Face documents for chat templates."""
    # The settings for white space are those that templates are written for: other ones would add line breaks.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML, which models never saw.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


if __name__ == "__main__":
    main()
