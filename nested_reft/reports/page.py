"""The page of a report: one file of HTML that loads nothing, and in which nothing that a model wrote can run.

A Content-Security-Policy allows one script and one style sheet, by their hashes. Texts of a run reach the page escaped,
or as JSON in an element that no browser runs, from where the script makes text nodes of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from nested_reft.reports.charts import Chart
from nested_reft.reports.run_files import Line, RunFiles
from nested_reft.reports.run_metrics import report_text, summarize
from nested_reft.reports.samples import evenly_chosen, facts, heading, verdict, visible, worth_a_look
from nested_reft.reports.summary_words import comparison_warnings, differences, settings, summary_words, warnings
from nested_reft.reports.svg import figure, text
from nested_reft.untrusted import printable

MOST_SAMPLES = 1000  # on the page, of all runs together
MOST_TEXT = 3000  # characters of a prompt, an answer or a completion
# What JSON must not hold within a script element: the end of the element, comments, and line ends of JavaScript.
ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(runs: Sequence[RunFiles], charts: Sequence[Chart]) -> str:
    """The whole page.

    Args:
        runs: one or more.
        charts: of these runs.
    """
    style, script = (files("nested_reft.reports").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )
    chosen = {index: evenly_chosen(run.samples, MOST_SAMPLES // len(runs)) for index, run in enumerate(runs)}
    body = "".join(
        [
            f"<header><h1>{text(title)}</h1>{_navigation(runs, charts)}</header>",
            _summary(runs),
            f'<h2 id="curves">Curves</h2><div class="charts">{"".join(map(figure, charts))}</div>' if charts else "",
            _numbers(runs),
            _looks(runs),
            _samples(runs, chosen),
            _configuration(runs),
        ]
    )
    data = {
        "runs": [printable(run.name) for run in runs],
        "samples": [_entry(index, sample) for index, samples in chosen.items() for sample in _grouped(samples)],
    }
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}: report</title><style>{style}</style></head>\n<body>{body}\n"
        f'<script type="application/json" id="data">{embedded(data)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def embedded(data: Any) -> str:
    """JSON that cannot end the script element that it stands in.

    Args:
        data: JSON-able; texts in it are untrusted.
    """
    # Outside of its strings JSON has none of these characters, so the same data is read back.
    return json.dumps(data, ensure_ascii=False, allow_nan=False).translate(ESCAPES)


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _navigation(runs: Sequence[RunFiles], charts: Sequence[Chart]) -> str:
    has_samples = any(run.samples for run in runs)
    places = {
        "curves": "Curves" if charts else None,
        "look": "Look at these" if has_samples else None,
        "samples": "Samples" if has_samples else None,
        "configuration": "Configuration",
    }
    links = "".join(f'<a href="#{place}">{words}</a>' for place, words in places.items() if words)
    return f"<nav>{links}</nav>"


def _summary(runs: Sequence[RunFiles]) -> str:
    """The words on top: of all runs, then of each."""
    parts = [_warnings(comparison_warnings(runs))]
    for run in runs:
        parts.append(_name(run, runs))
        parts.append(_warnings([*run.faults, *warnings(run)]))
        parts.append(f'<ul class="words">{"".join(f"<li>{text(words)}</li>" for words in summary_words(run))}</ul>')
    return f'<section id="summary">{"".join(parts)}</section>'


def _warnings(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return f'<ul class="warnings">{"".join(f"<li>{text(words)}</li>" for words in sentences)}</ul>'


def _numbers(runs: Sequence[RunFiles]) -> str:
    """The tables that the command prints too."""
    parts = list[str]()
    for run in runs:
        if run.lines:
            parts.append(_name(run, runs))
            parts.append(f"<pre>{_lines(report_text(summarize(run.lines), run.lines))}</pre>")
    return f"<details><summary>The same in numbers</summary>{''.join(parts)}</details>" if parts else ""


def _name(run: RunFiles, runs: Sequence[RunFiles]) -> str:
    """A heading that says of which run something is; nothing where there is but one."""
    return f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else ""


def _lines(words: str) -> str:
    return "\n".join(map(text, words.split("\n")))


def _looks(runs: Sequence[RunFiles]) -> str:
    """Samples that are worth a look, of each run; they need no script."""
    parts = list[str]()
    for run in runs:
        found = worth_a_look(run.samples)
        parts.append(_name(run, runs) if found else "")
        for title, why, samples in found:
            cards = "".join(map(_card, samples))
            parts.append(f'<h3>{title}</h3><p class="note">{why}</p><div class="samples">{cards}</div>')
    return f'<h2 id="look">Look at these</h2>{"".join(parts)}' if any(parts) else ""


def _card(sample: Line) -> str:
    texts = "".join(f'<p class="what">{what}</p><pre>{_lines(words)}</pre>' for what, words in _texts(sample))
    values = text("; ".join(f"{name} {value}" for name, value in facts(sample)))
    return (
        f'<article class="sample {verdict(sample)}"><h4>{text(heading(sample))}</h4>{texts}'
        f'<p class="facts">{values}</p></article>'
    )


def _texts(sample: Line) -> list[tuple[str, str]]:
    """Prompt, answer and completion, each cut where it is long."""
    found = list[tuple[str, str]]()
    for name, what in (("prompt", "prompt"), ("answer", "right answer"), ("text", "sample")):
        words = str(sample.get(name, ""))
        more = len(words) - MOST_TEXT
        found.append((what, visible(words[:MOST_TEXT]) + (f" … and {more} more characters" if more > 0 else "")))
    return found


def _samples(runs: Sequence[RunFiles], chosen: dict[int, list[Line]]) -> str:
    """The place where the script shows samples, and its filters."""
    total, shown = sum(len(run.samples) for run in runs), sum(map(len, chosen.values()))
    if not total:
        return ""
    some = (
        f"This page holds {shown:,} of {total:,} logged samples, from steps that are spread over the run."
        " <code>nested-reft samples RUN --last 0</code> prints all."
        if shown < total
        else f"This page holds all {total:,} logged samples."
    )
    sources = sorted(
        {str(sample["source"]) for samples in chosen.values() for sample in samples if sample.get("source")}
    )
    verdicts = sorted({verdict(sample) for samples in chosen.values() for sample in samples})
    controls = [
        _choice("run", {str(index): run.name for index, run in enumerate(runs)}) if len(runs) > 1 else "",
        '<label>from step<input id="filter-from" type="number" min="0"></label>',
        '<label>to step<input id="filter-to" type="number" min="0"></label>',
        _choice("source", {printable(name): name for name in sources}),
        _choice("verdict", {name: name for name in verdicts}),
        '<label>text<input id="filter-text" type="search"></label>',
    ]
    return (
        f'<h2 id="samples">Samples</h2><p class="note">{some}</p>'
        "<noscript><p>The samples need JavaScript, which is turned off here.</p></noscript>"
        f'<div id="filters" class="filters" role="search" hidden>{"".join(controls)}</div>'
        '<p id="count" class="quiet" aria-live="polite"></p><div id="list"></div>'
        '<button id="more" type="button" hidden>Show more</button>'
    )


def _choice(name: str, options: dict[str, str]) -> str:
    entries = "".join(f'<option value="{text(value)}">{text(words)}</option>' for value, words in options.items())
    return f'<label>{name}<select id="filter-{name}"><option value="">all</option>{entries}</select></label>'


def _grouped(samples: Sequence[Line]) -> list[Line]:
    """Samples of one step and one version of the policy beside each other; replay mixes versions."""
    versions = [sample.get("version") for sample in samples]
    known = [version if type(version) is int else -1 for version in versions]
    order = sorted(range(len(samples)), key=lambda index: (samples[index]["step"], known[index]))
    return [samples[index] for index in order]


def _entry(run: int, sample: Line) -> dict[str, Any]:
    """A sample as the script reads it."""
    version, source = sample.get("version"), sample.get("source")
    return {
        "run": run,
        "step": sample["step"],
        "version": version if type(version) is int else None,
        "source": printable(source) if isinstance(source, str) else None,
        "verdict": verdict(sample),
        "texts": _texts(sample),
        "facts": facts(sample),
    }


def _configuration(runs: Sequence[RunFiles]) -> str:
    """All settings of one run, or those in which several runs differ."""
    if len(runs) == 1:
        rows = [(name, [value]) for name, value in settings(runs[0])]
        inside = f"<details><summary>All settings</summary>{_table(['field', 'value'], rows)}</details>"
        return f'<h2 id="configuration">Configuration</h2>{inside if rows else "<p>No setting is known.</p>"}'
    rows, left_out = differences(runs)
    words = "Fields in which these runs differ." if rows else "These runs do not differ in any field."
    words += f" {left_out} more are left out." if left_out else ""
    table = _table(["field", *(run.name for run in runs)], rows) if rows else ""
    return f'<h2 id="configuration">Configuration</h2><p class="note">{words}</p>{table}'


def _table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = "".join(
        f"<tr><th>{text(name)}</th>{''.join(f'<td>{text(value)}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    titles = "".join(f"<th>{text(title)}</th>" for title in header)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
