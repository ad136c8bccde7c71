"""Five claims of five papers, each in a miniature that two cores can check: one command, one table of verdicts.

    python -m experiments.claims
    python -m experiments.claims --only dump dapo
    python -m experiments.claims --report-only             # of the runs that are there

`nested`: nested rollouts with an importance weight keep the accuracy, and sample faster (Nested-ReFT). `dapo`: each of
DAPO's four parts raises the accuracy. `tba`: trajectory balance loses less to old completions than GRPO with a clip.
`dump`: DUMP learns faster than uniform sampling. `drpo`: resets have more gold reward than PPO at an equal KL.

Each claim is an experiment of its own here, in fewer or shorter runs. Results are kept where that experiment keeps its
own, in the folders of `--out`, so neither computes again what the other has. A run that was stopped is begun anew, but
for those of `nested`, which continue.

A claim holds where the 95 % interval (bootstrap over seeds, runs paired by seed) lies on its side of the bound. It does
not hold here where the interval lies on the other side. Else, and with fewer than five seeds, it stays open. At its end
the command prints a table and draws a figure.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments import corrections, dapo, drpo, dump, skip_ratio, tba
from experiments.arguments import add_json, add_list, add_out, add_seeds, command, experiment_parser
from experiments.runs import compile_once
from nested_reft.cli.arguments import keep_json
from nested_reft.json_files import write_json
from nested_reft.reports.figures import figure_maker
from nested_reft.reports.tables import table
from nested_reft.run_directory import versions
from nested_reft.sweeps.comparison import summarise
from nested_reft.sweeps.intervals import mean_over_seeds

LEAST_SEEDS = 5
MARGIN = 0.02  # accuracy that nested rollouts may cost and still count as keeping it
# Steps of each experiment's runs.
STEPS = {"nested": 100, "dapo": 60, "tba": 100, "dump": 100, "drpo": 120}
LAG = 48  # batches
CLIP, BALANCE = "GRPO, clip to the sampler", "trajectory balance"
RESETS = 0.5  # share of the rollouts
KL = 1.0  # nats
REWARD_STEPS = 100  # of the reward models of `drpo`


@dataclass(frozen=True)
class Finding:
    """One measured part of a claim.

    Attributes:
        claim: one of `CLAIMS`.
        what: was compared.
        seeds: how many.
        value: the mean over seeds.
        interval: of it, 95 %.
        bound: what the interval is compared with.
        above: whether the claim is that the value lies above the bound; else below.
    """

    claim: str
    what: str
    seeds: int
    value: float
    interval: tuple[float, float]
    bound: float
    above: bool = True

    @property
    def verdict(self) -> str:
        """What the interval says; an interval over a few seeds says nothing."""
        if self.seeds < LEAST_SEEDS:
            return "open here"
        low, high = self.interval
        if not self.above:
            low, high = -high, -low
        bound = self.bound if self.above else -self.bound
        return "holds" if low > bound else "does not hold here" if high < bound else "open here"


def _finding(claim: str, what: str, found: dict[str, Any], bound: float, above: bool = True) -> Finding:
    """A finding of what `mean_over_seeds` or `ratio_over_seeds` returned."""
    value = found["mean"] if "mean" in found else found["ratio"]
    return Finding(claim, what, len(found["values"]), value, tuple(found["interval"]), bound, above)


def nested(seeds: Sequence[int], out: Path, only_kept: bool) -> list[Finding]:
    """Accuracy and speed of the runs with the weight `base`, beside those of the full model.

    Args:
        seeds: of the runs.
        out: the folder of the experiment.
        only_kept: compute nothing.
    """
    preset = skip_ratio.tiny()
    preset = dataclasses.replace(preset, ratios=preset.ratios[:1], variants=("base",))
    results, _ = skip_ratio.runs_of(preset, seeds, STEPS["nested"], out / "tiny", only_kept)
    if not any(each["label"] == skip_ratio.FULL for each in results):
        return []
    variants = summarise(results, "sampled_accuracy")["variants"]
    found = list[Finding]()
    for name, each in variants.items():
        if each["difference"] is not None:
            what = f"{name}: accuracy less that of full rollouts"
            found.append(_finding("nested", what, each["difference"], -MARGIN))
            found.append(_finding("nested", f"{name}: tokens/s of rollouts, over full ones", each["speed"], 1.0))
    return found


def parts_of_dapo(seeds: Sequence[int], out: Path, only_kept: bool) -> list[Finding]:
    """What each part adds to the accuracy of the runs that have all parts before it.

    Args:
        seeds: of the runs.
        out: the folder of the experiment.
        only_kept: compute nothing.
    """
    runs = dapo.runs_of(dapo.VARIANTS, seeds, STEPS["dapo"], out, only_kept)
    final = {(run["variant"], run["seed"]): float(np.mean(run["accuracy"][-1])) for run in runs}
    found = list[Finding]()
    for before, part in itertools.pairwise(dapo.VARIANTS):
        added = [final[part, seed] - final[before, seed] for seed in _paired(final, part, before)]
        if added:
            found.append(_finding("dapo", f"{part}: accuracy that it adds", mean_over_seeds(added), 0.0))
    return found


def robustness(seeds: Sequence[int], out: Path, only_kept: bool) -> list[Finding]:
    """How much less of its mean gain trajectory balance loses to a lag than GRPO with a clip.

    Args:
        seeds: of the runs.
        out: the folder of the experiment.
        only_kept: compute nothing.
    """
    runs = tba.runs_of((0, LAG), (CLIP, BALANCE), seeds, STEPS["tba"], out, only_kept=only_kept)
    gain = {((run["correction"], run["mismatch"]), run["seed"]): corrections.mean_gain(run) for run in runs}

    def lost(loss: str) -> dict[int, float]:
        old, fresh = (loss, f"lag {LAG}"), (loss, "lag 0")
        return {seed: gain[fresh, seed] - gain[old, seed] for seed in _paired(gain, old, fresh)}

    clip, balance = lost(CLIP), lost(BALANCE)
    saved = [clip[seed] - balance[seed] for seed in clip if seed in balance]
    what = f"lag {LAG}: mean gain that it loses less than {CLIP}"
    return [_finding("tba", what, mean_over_seeds(saved), 0.0)] if saved else []


def faster_learning(seeds: Sequence[int], out: Path, only_kept: bool) -> list[Finding]:
    """DUMP's steps to the final accuracy of uniform sampling, and its accuracy at the end.

    Args:
        seeds: of the runs.
        out: the folder of the experiment.
        only_kept: compute nothing.
    """
    runs = dump.runs_of(("uniform", "dump"), seeds, STEPS["dump"], out, only_kept)
    rows = [row for row in dump.compare(runs) if row["kind"] == "dump"]
    found = list[Finding]()
    for row in rows:
        share = {"values": row["seeds"], "mean": row["share_of_time"], "interval": row["share_of_time_interval"]}
        gain = {"values": row["seeds"], "mean": row["final_gain"], "interval": row["final_gain_interval"]}
        found.append(_finding("dump", "share of uniform's steps to its final accuracy", share, 1.0, above=False))
        found.append(_finding("dump", "final accuracy less uniform's", gain, 0.0))
    return found


def gold_at_equal_kl(seeds: Sequence[int], out: Path, only_kept: bool) -> list[Finding]:
    """Gold reward of resets less that of PPO, where both first reach a KL.

    Args:
        seeds: of the runs.
        out: the folder of the experiment.
        only_kept: compute nothing.
    """
    runs = drpo.runs_of((0.0, RESETS), seeds, STEPS["drpo"], out, REWARD_STEPS, only_kept=only_kept)
    found = drpo.gold_at_kl(runs, [KL])
    shares = [run["share"] for run in runs]
    ppo, resets = (found[f"{share:g}"][0] if share in shares else None for share in (0.0, RESETS))
    # Values are in the order of the seeds; a seed that lacks one of the two runs would shift them.
    if ppo is None or resets is None or len(ppo["values"]) != len(resets["values"]):
        return []
    more = [a - b for a, b in zip(resets["values"], ppo["values"], strict=True)]
    return [_finding("drpo", f"gold at a KL of {KL:g} less PPO's, {RESETS:g} reset", mean_over_seeds(more), 0.0)]


def _paired(values: dict[tuple[Any, int], float], one: Any, other: Any) -> list[int]:
    """The seeds that have both runs."""
    return sorted(seed for name, seed in values if name == one and (other, seed) in values)


# What is claimed, the folder of its experiment, and what checks it.
CLAIMS: dict[str, tuple[str, str, Callable[[Sequence[int], Path, bool], list[Finding]]]] = {
    "nested": ("nested rollouts keep the accuracy and are faster", "experiment-skip-ratio", nested),
    "dapo": ("each part of DAPO helps", "experiment-dapo", parts_of_dapo),
    "tba": ("trajectory balance bears old completions better", "experiment-tba", robustness),
    "dump": ("DUMP learns faster than uniform sampling", "experiment-dump", faster_learning),
    "drpo": ("DR-PO is above PPO at an equal KL", "experiment-drpo", gold_at_equal_kl),
}


def verdict_of(findings: Sequence[Finding]) -> str:
    """The verdict on a claim: it holds where all of its findings do.

    Args:
        findings: of one claim; none where it was not run.
    """
    verdicts = {each.verdict for each in findings}
    if not verdicts:
        return "not run"
    return verdicts.pop() if len(verdicts) == 1 else "partly" if "holds" in verdicts else "does not hold here"


def findings_table(findings: Sequence[Finding]) -> str:
    """All findings as text.

    Args:
        findings: of all claims.
    """
    rows = [
        [
            each.claim,
            each.what,
            each.seeds,
            f"{each.value:+.3f}",
            "{:+.3f}..{:+.3f}".format(*each.interval),
            f"{'>' if each.above else '<'} {each.bound:g}",
            each.verdict,
        ]
        for each in findings
    ]
    return table(["claim", "measure", "seeds", "value", "95 %", "claimed", "verdict"], rows, left=2)


def draw(findings: Sequence[Finding], path: Path) -> None:
    """Each finding with its interval and its bound.

    Args:
        findings: of all claims, at least one.
        path: the PNG file.
    """
    shown = sorted(findings, key=lambda each: list(CLAIMS).index(each.claim))
    figure = figure_maker()(figsize=(10, 0.75 * len(shown) + 0.8), layout="constrained")
    # Differences and ratios have nothing to do with one another, so each finding has a scale of its own.
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    colours = {"holds": "C2", "does not hold here": "C3", "open here": "C7"}
    last = None
    for axis, each in zip(axes, shown, strict=True):
        axis.plot(each.interval, [0, 0], color=colours[each.verdict], linewidth=2)
        axis.plot(each.value, 0, "o", color=colours[each.verdict])
        axis.axvline(each.bound, color="black", linestyle="--", linewidth=1)
        axis.set(yticks=[0], yticklabels=[each.what], ylim=(-1, 1))
        axis.margins(x=0.1)
        axis.grid(axis="x", alpha=0.3)
        if each.claim != last:
            own = [other for other in shown if other.claim == each.claim]
            axis.set_title(f"{CLAIMS[each.claim][0]}: {verdict_of(own)}", loc="left", fontsize="medium")
        last = each.claim
    figure.suptitle("Mean and 95 % interval over seeds; dashed: the bound of the claim", fontsize="medium")
    figure.savefig(path, dpi=90)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is not finished yet, prints the verdicts and draws the figure.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("claims", __doc__)
    add_list(parser, "--only", CLAIMS, choices=CLAIMS, help="these claims and no other")
    add_seeds(parser)
    add_out(parser, "runs")
    parser.add_argument("--report-only", action="store_true", help="verdicts by the runs that are there")
    add_json(parser, "the findings")
    known = parser.parse_args(arguments)
    compile_once(known.out / "experiment-claims")
    findings, seconds = list[Finding](), dict[str, float]()
    for name in known.only:
        claim, folder, check = CLAIMS[name]
        started = time.monotonic()
        own = check(known.seeds, known.out / folder, known.report_only)
        seconds[name] = time.monotonic() - started
        print(f"{claim}: {verdict_of(own)} ({seconds[name]:.0f} s)", flush=True)
        findings += own
    if not findings:
        print("no claim has its runs yet")
        return
    print(f"\n{findings_table(findings)}")
    place = known.out / "experiment-claims"
    place.mkdir(parents=True, exist_ok=True)
    plain = [dataclasses.asdict(each) | {"verdict": each.verdict} for each in findings]
    summary = {"versions": versions(), "steps": STEPS, "seconds": seconds, "findings": plain}
    write_json(place / "results.json", summary)
    draw(findings, place / "claims.png")
    keep_json(known.json, summary)
    print(f"written: {place / 'results.json'}, {place / 'claims.png'}")


if __name__ == "__main__":
    sys.exit(main())
