"""How many searchers does a learner need? A simulation of searching ahead, from the times of a batch and of an update.

    python -m experiments.async_sizing --sample-seconds 8 --update-seconds 2   (a second)
    python -m experiments.async_sizing --checkpoint-every 20   with checkpoints, which wait for all that is under way
    python -m experiments.async_sizing --check [CONFIG]   also runs it here, and compares   (a minute on two cores)

The rules are those of `training.orders`: in each step the learner orders batches until `lag` of them are under way
beside the one that it waits for, takes the oldest and updates. Searchers take the oldest order that waits. New weights
go out every k steps, and a searcher fetches them before its next order. Times of batches are log-normal; `--spread` is
the standard deviation of their logarithm. `--kept`, `--recent-share` and `--prefill` describe a store for replay, in
batches of the size of a search; the column "trained age" is that of what is trained on.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.arguments import add_json, add_steps, command, experiment_parser
from nested_reft.cli.arguments import keep_json, number, whole
from nested_reft.cli.bad_input import checking_input
from nested_reft.reports.tables import table
from nested_reft.run_directory import RunDirectory, versions
from nested_reft.training.config import Config, load_config
from nested_reft.training.record import StepRecord
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer

SEARCHERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SYNC_PERIODS = (1, 4)
STEPS = 1000
POSITIVE = number("more than 0, up to 1e6", lambda seconds: 0 < seconds <= 1e6)
SECONDS = number("0 to 1e6", lambda seconds: 0 <= seconds <= 1e6)
SHARE = number("0 to 1", lambda share: 0 <= share <= 1)
SPREAD = number("0 to 3", lambda spread: 0 <= spread <= 3)


@dataclass(frozen=True)
class Times:
    """What one step takes, in seconds.

    Attributes:
        sample_T: of sampling and scoring each batch, in the order of issue.
        update_T: of what the learner does in each step beside waiting.
        sync: until new weights have come to a searcher.
    """

    sample_T: Float[np.ndarray, " orders"]
    update_T: Float[np.ndarray, " steps"]
    sync: float = 0.0


@dataclass(frozen=True)
class Replay:
    """A store for replay, in batches of the size of a search; as it is made here, each is trained on once.

    Attributes:
        kept: batches that are stored, the newest ones.
        recent_share: m, the share of groups of the newest version.
        prefill: batches that the first update waits for.
    """

    kept: int = 1
    recent_share: float = 1.0
    prefill: int = 1


@dataclass(frozen=True)
class Prediction:
    """What the simulation says.

    Attributes:
        seconds: of all steps.
        waited: of them, seconds that the learner waited.
        searchers_busy: share of the searchers' time in which they worked.
        staleness_T: age in steps of the batch of each step.
        trained_age: mean age in steps of what is trained on.
    """

    seconds: float
    waited: float
    searchers_busy: float
    staleness_T: list[int]
    trained_age: float

    @property
    def learner_busy(self) -> float:
        """Share of the time in which the learner worked."""
        return 1 - self.waited / self.seconds


def simulate(
    times: Times, search: SearchConfig, checkpoint_every: int | None = None, replay: Replay | None = None
) -> Prediction:
    """Goes from event to event; nothing here depends on a clock.

    Args:
        times: of the batches and updates; there are `lag` more batches than updates, and those of a prefill.
        search: searchers, lag and sync period; `inline` samples in the learner's own time, as it orders.
        checkpoint_every: steps after which the learner waits for all that is under way, as a checkpoint does; None for
            no checkpoints.
        replay: what is stored; None trains on each batch as it comes.
    """
    replay = replay or Replay()
    now, waited, worked, taken = 0.0, 0.0, 0.0, 0
    # Of each searcher, when it is free and which weights it has.
    free = [(0.0, index, -1) for index in range(search.searchers)]
    ends, sent, staleness, trained = list[float](), list[int](), list[int](), list[float]()
    for step, update in enumerate(times.update_T):
        ordered, version = now, step - step % search.sync_every
        while taken < step + replay.prefill:
            while len(ends) <= taken + search.lag:
                is_free, index, held = heapq.heappop(free)
                took = times.sample_T[len(ends)] + (times.sync if held != version else 0.0)
                end = max(now, is_free) + took
                heapq.heappush(free, (end, index, version))
                ends.append(end)
                sent.append(version)
                worked += took
                if search.backend == "inline":
                    now = end
            now = max(now, ends[taken])
            taken += 1
        waited += now - ordered
        staleness.append(step - sent[taken - 1])
        stored = sent[max(taken - replay.kept, 0) : taken]
        trained.append(step - replay.recent_share * max(stored) - (1 - replay.recent_share) * float(np.mean(stored)))
        now += update
        if checkpoint_every is not None and (step + 1) % checkpoint_every == 0:
            drained = max(now, *ends)
            waited, now = waited + drained - now, drained
    # What searchers do after the last step helps nobody.
    late = sum(max(0.0, end - now) for end in ends)
    return Prediction(now, waited, (worked - late) / (search.searchers * now), staleness, float(np.mean(trained)))


def sizes(
    sample_seconds: float,
    update_seconds: float,
    sync_seconds: float,
    spread: float,
    checkpoint_every: int | None,
    replay: Replay,
) -> list[dict[str, float]]:
    """Utilisation and staleness for 1 to 256 searchers, a row for each.

    Args:
        sample_seconds: mean time of a batch at one searcher.
        update_seconds: of an update.
        sync_seconds: until new weights have come to a searcher.
        spread: standard deviation of the logarithm of a batch's time; 0 makes all batches alike.
        checkpoint_every, replay: as `simulate` takes them.
    """
    rows = list[dict[str, float]]()
    for searchers in SEARCHERS:
        # As many batches as searchers keep all of them at work while the learner updates. More of them make up for
        # batches that take long.
        for lag, sync_every in itertools.product((searchers, 2 * searchers), SYNC_PERIODS):
            search = SearchConfig(lag=lag, sync_every=sync_every, backend="thread", searchers=searchers)
            draws = np.random.default_rng(0).normal(-(spread**2) / 2, spread, STEPS + lag + replay.prefill - 1)
            times = Times(sample_seconds * np.exp(draws), np.full(STEPS, update_seconds), sync_seconds)
            found = simulate(times, search, checkpoint_every, replay)
            rows.append(
                {
                    "searchers": searchers,
                    "lag": search.lag,
                    "k": sync_every,
                    "steps per hour": round(3600 * STEPS / found.seconds),
                    "learner busy": round(found.learner_busy, 2),
                    "searchers busy": round(found.searchers_busy, 2),
                    "mean age": round(float(np.mean(found.staleness_T)), 1),
                    "oldest": max(found.staleness_T),
                    "trained age": round(found.trained_age, 1),
                }
            )
    return rows


def measured_and_predicted(name: str, steps: int, judge_seconds: float, search: SearchConfig) -> dict[str, float]:
    """A real run, and what the simulation makes of its own times; the first steps compile and are left out.

    Args:
        name: of the configuration.
        steps: how many are compared.
        judge_seconds: of a reward function that sleeps, as one does that waits for a judge elsewhere; 0 for none.
        search: who searches.
    """
    skipped = search.lag + 2
    config = load_config(name, train={"steps": skipped + steps}, evaluation={"samples_per_prompt": 0})
    config = dataclasses.replace(config, search=search, warm_start=dataclasses.replace(config.warm_start, steps=0))
    with tempfile.TemporaryDirectory() as directory:
        if judge_seconds:
            config = _with_judge(config, Path(directory) / "judge.py", judge_seconds)
        with Trainer(prepare(config), RunDirectory(Path(directory) / "run")).open() as run:
            records = [run.step(number) for number in range(skipped + steps)][skipped:]
    times = Times(
        # Batches beyond the last step were not measured, and nobody waits for them.
        np.array([_stats(record).seconds for record in records] + [0.0] * search.lag),
        np.array([record.seconds - record.search.waited_seconds for record in records]),
    )
    found, period = simulate(times, search), sum(record.search.period_seconds for record in records)
    return {
        "seconds": sum(record.seconds for record in records),
        "predicted seconds": found.seconds,
        "learner busy": 1 - sum(record.search.waited_seconds for record in records) / period,
        "predicted learner busy": found.learner_busy,
        "searchers busy": sum(_stats(record).seconds for record in records) / (search.searchers * period),
        "predicted searchers busy": found.searchers_busy,
    }


def _with_judge(config: Config, file: Path, seconds: float) -> Config:
    """Batches of eight completions, all judged at once, also those of three searchers."""
    file.write_text(f"import time\n\n\ndef judge(text, example):\n    time.sleep({seconds})\n    return 0.0\n")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, prompts_per_batch=2),
        rollout=dataclasses.replace(config.rollout, group_size=4),
        reward=dataclasses.replace(config.reward, function=f"{file}:judge", workers=24),
    )


def _stats(record: StepRecord) -> Any:
    return record.found[0].stats


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, and the comparison with runs.

    Args:
        arguments: of the command line; None takes those of the process.
    """
    parser = experiment_parser("async_sizing", __doc__)
    parser.add_argument("--sample-seconds", type=POSITIVE, default=8.0, help="of a batch at one searcher")
    parser.add_argument("--update-seconds", type=POSITIVE, default=1.0, help="of an update")
    parser.add_argument("--sync-seconds", type=SECONDS, default=0.0, help="until new weights have come to a searcher")
    parser.add_argument("--spread", type=SPREAD, default=0.3, help="of the logarithm of a batch's time")
    parser.add_argument("--checkpoint-every", type=whole(1), help="steps; left out, there are no checkpoints")
    parser.add_argument("--kept", type=whole(1), default=1, help="batches that a store for replay holds")
    parser.add_argument("--recent-share", type=SHARE, default=1.0, help="m, of groups of the newest version")
    parser.add_argument("--prefill", type=whole(1), default=1, help="batches that the first update waits for")
    parser.add_argument("--check", nargs="?", const="tiny", metavar="CONFIG", help="also runs a configuration here")
    parser.add_argument("--judge-seconds", type=SECONDS, default=0.5, help="of the slow judge, for each completion")
    add_steps(parser, 40)
    add_json(parser, "the tables")
    known = parser.parse_args(arguments)
    if known.check is not None:
        with checking_input():
            load_config(known.check)
    times = known.sample_seconds, known.update_seconds, known.sync_seconds, known.spread
    rows = sizes(*times, known.checkpoint_every, Replay(known.kept, known.recent_share, known.prefill))
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    found = {} if known.check is None else compared(known.check, known.steps, known.judge_seconds)
    if found:
        columns = list(next(iter(found.values())))
        cells = [[name, *(f"{row[column]:.2f}" for column in columns)] for name, row in found.items()]
        print(f"\n{table(['searchers', *columns], cells)}")
    keep_json(known.json, {"versions": versions(), "sizes": rows, "runs": found})


def compared(name: str, steps: int, judge_seconds: float) -> dict[str, dict[str, float]]:
    """Real runs beside what the simulation makes of their times, with and without a slow judge.

    Args:
        name: of the configuration.
        steps: of each run.
        judge_seconds: of the slow judge.
    """
    return {
        f"{words}, {judge}": measured_and_predicted(name, steps, seconds, search)
        for judge, seconds in {"no judge": 0.0, "slow judge": judge_seconds}.items()
        for words, search in {
            "inline": SearchConfig(),
            "one thread": SearchConfig(lag=1, backend="thread"),
            "three threads": SearchConfig(lag=3, backend="thread", searchers=3),
        }.items()
    }


if __name__ == "__main__":
    sys.exit(main())
