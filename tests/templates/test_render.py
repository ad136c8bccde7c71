"""Chat templates: what they may use, and what they cannot do to the process that trains."""

import os
import signal
import time

import pytest

from nested_reft.templates.render import render
from nested_reft.untrusted import BadFile

DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TWO_CALLS = "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NESTED, "takes more than 0.5 seconds for one prompt"),
        (TWO_CALLS, "takes more than 0.5 seconds for one prompt"),
        ("{{ 10 ** (10 ** 8) }}", "takes more than 0.5 seconds for one prompt"),  # a single operation
        (DOUBLING, "it needs more than 512 MB"),
        ("{{ 'a' * 10 ** 10 }}", "it needs more than 512 MB"),
        ("{{ '%10000000000d' % 1 }}", "it needs more than 512 MB"),
        ("{{ 'a' * 10 ** 7 }}a", "it gives 10000001 characters; allowed are 10000000"),
        ("{{ range(10 ** 9) }}", "OverflowError: Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{% include 'other' %}", "TypeError: no loader"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ " + "(" * 9999, "RecursionError"),
        ("{{ raise_exception('a\x1b[2J\nb' * 9999) }}", r"a\\x1b\[2J ba"),
    ],
    ids=range(17),
)
def test_what_a_template_does_wrong_is_one_line(template, message):
    with pytest.raises(BadFile, match=f"the chat template .*{message}") as refusal:
        # The others may take their time, because a machine that is short of memory takes long to give it.
        render(template, {}, time_limit_seconds=0.5 if "0.5 seconds" in message else 30.0)
    assert len(str(refusal.value)) < 2000 and str(refusal.value).isprintable()
    # The next template works, whether or not the process that renders was ended.
    assert render("{{ a }}", {"a": "b"}) == "b"


def test_the_date_is_the_same_every_day():
    # A run that is resumed tomorrow must ask what it asked today.
    assert render("{{ strftime_now('%d %b %Y, %H:%M:%S') }}", {}) == "26 Jul 2024, 00:00:00"


def test_variables_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="must be JSON-able: Object of type set is not JSON serializable"):
        render("", {"a": {1}})


def test_any_text_passes_unchanged():
    text = "ü 東京 🙂 \x00 \ud800 \r\n </s> {{ a }}"
    assert render("{{ a }}", {"a": text}) == text


def test_an_interrupted_rendering_does_not_answer_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render(NESTED, {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render("next", {}) == "next"


def test_the_working_directory_is_not_searched_for_modules(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadFile):  # ends the worker, so that the next one starts here
        render(NESTED, {}, time_limit_seconds=0.01)
    assert render("{{ 1 }}", {}) == "1"


def test_rendering_is_quick():
    render("{{ a }}", {"a": 1})
    begin = time.process_time() + sum(os.times()[2:4])
    for number in range(200):
        render("{% for m in messages %}{{ m.content }}{% endfor %}", {"messages": [{"content": str(number)}]})
    assert time.process_time() + sum(os.times()[2:4]) - begin < 1
