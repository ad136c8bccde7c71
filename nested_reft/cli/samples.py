"""`nested-reft samples`: the logged samples of a run as plain text, by step, source, verdict, reward or words."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from nested_reft import paths
from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json, number, whole
from nested_reft.cli.bad_input import BadInput, checking_input
from nested_reft.cli.output import complain, say
from nested_reft.reports.run_files import RunFiles, read_run
from nested_reft.reports.samples import SampleFilter, Verdict, sample_text
from nested_reft.untrusted import printable

SHOWN = 20  # samples where nothing else is asked for


def run(arguments: list[str]) -> None:
    """Prints the samples that fit, oldest first."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        files = read_run(_local(known.run))
    # What is missing of a run, but for what no sample comes from.
    for fault in files.faults:
        if "samples.jsonl" in fault:
            complain(f"warning: {fault}")
    wanted = _filter(known, files)
    found = [sample for sample in files.samples if wanted.takes(sample)]
    shown = found[-known.last :] if known.last else found
    for sample in shown:
        say(f"{sample_text(sample)}\n")
    say(f"{len(shown)} of {len(found)} samples that fit, of {len(files.samples)} that are logged")
    keep_json(known.json, shown)


def _local(source: str) -> Path:
    if not paths.is_remote(source):
        return paths.local_path(source)
    from nested_reft.run_mirror import local_run  # it brings JAX along, which a local run need not wait for

    return local_run(source)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("samples", "The logged samples of a run as plain text, the latest of those that fit.")
    parser.add_argument("run", help="a run directory; the run may still be going on")
    parser.add_argument("--step", type=_steps, metavar="N or N-M", help="of one step, or of the steps from N to M")
    parser.add_argument("--source", help="of the source of this name")
    verdicts = parser.add_mutually_exclusive_group()
    verdicts.add_argument("--right", action="store_true", help="whose answer is right")
    verdicts.add_argument("--wrong", action="store_true", help="whose answer is wrong")
    verdicts.add_argument("--unscored", action="store_true", help="whose answer could not be checked")
    reward = number("a number that is finite", math.isfinite)
    parser.add_argument("--least-reward", type=reward, metavar="R", help="with this reward or more")
    parser.add_argument("--most-reward", type=reward, metavar="R", help="with this reward or less")
    parser.add_argument("--text", help="with these words in prompt, answer or sample, in capitals or not")
    parser.add_argument(
        "--last", type=whole(0), default=SHOWN, metavar="N", help=f"at most so many, {SHOWN} by default; 0 for all"
    )
    add_json(parser, "these samples")
    return parser


def _steps(text: str) -> tuple[int, int]:
    """The first and the last step of `N` or `N-M`."""
    found = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise argparse.ArgumentTypeError(f"is '{text}'; allowed is a step, such as 10, or two, such as 10-20")
    return first, last


def _filter(known: argparse.Namespace, files: RunFiles) -> SampleFilter:
    """What was asked for.

    Raises:
        BadInput: the run has no such source, which may be a slip of the pen.
    """
    sources = {str(sample["source"]): None for sample in files.samples if "source" in sample}
    if known.source is not None and known.source not in sources:
        names = ", ".join(map(printable, sources)) or "none; the log of an earlier version may name none"
        raise BadInput(f"--source is '{known.source}'; the samples of this run have {names}")
    right, wrong, unscored = known.right, known.wrong, known.unscored
    verdict: Verdict | None = "right" if right else "wrong" if wrong else "unscored" if unscored else None
    return SampleFilter(known.step, known.source, verdict, (known.least_reward, known.most_reward), known.text)
