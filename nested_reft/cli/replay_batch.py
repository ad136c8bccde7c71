"""`nested-reft replay-batch`: repeats the update for which a run ended, and shows what it read and found."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np

from nested_reft.api import RepeatedUpdate, repeat_failed_update
from nested_reft.cli.arguments import add_json, check_json, command_parser, keep_json
from nested_reft.cli.bad_input import checking_input
from nested_reft.cli.output import say
from nested_reft.reports.tables import table


def run(arguments: list[str]) -> None:
    """Prints a table of the batch's arrays, and what the update found."""
    known = _parser().parse_args(arguments)
    with checking_input():
        check_json(known.json)
        repeated = repeat_failed_update(known.run)
    found = _report(repeated)
    rows = [[a["name"], a["shape"], a["not_finite"], a["least"], a["most"]] for a in found["arrays"]]
    say(table(["array of the batch", "shape", "not finite", "least", "most"], rows))
    say()
    say(table(["update", "value"], [[name, value] for name, value in found["update"].items()]))
    say(f"\nin Python: nested_reft.api.repeat_failed_update({str(known.run)!r})")
    keep_json(known.json, found)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "replay-batch",
        "Repeats the update for which a run ended, because loss or gradient was not finite. The run stays as it is.",
        compiles=True,
    )
    parser.add_argument("run", help="a run directory with a failed_update")
    add_json(parser, "the tables")
    return parser


def _report(repeated: RepeatedUpdate) -> dict[str, Any]:
    """What the tables show, JSON-able."""
    batch, result = repeated.batch, repeated.result
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    update = {"loss": str(result.loss), "gradient_norm": str(result.gradient_norm)}
    update |= {name: str(value) for name, value in result.parts.items()}
    update["weights that are not finite"] = str(int((~np.isfinite(result.weight_BGC)).sum()))
    update["parameter that is not finite"] = repeated.not_finite or "none"
    return {
        "update": update,
        "arrays": [_array(name, np.asarray(array)) for name, array in arrays.items() if array is not None],
    }


def _array(name: str, array: np.ndarray) -> dict[str, Any]:
    is_finite = np.isfinite(array)
    finite = array[is_finite]
    return {
        "name": name,
        "shape": list(array.shape),
        "not_finite": int((~is_finite).sum()),
        "least": f"{finite.min():.6g}" if finite.size else "-",
        "most": f"{finite.max():.6g}" if finite.size else "-",
    }
