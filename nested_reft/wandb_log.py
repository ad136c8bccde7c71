"""A run's metrics on Weights & Biases while it trains: the values that TensorBoard gets, under the same steps.

W&B is a view of the logs and no part of the run. A thread of its own talks to it, so a training step neither waits for
it nor ends with it. Where the service cannot be reached, W&B's files in the run's directory keep the values.

W&B's steps only ever go up, so it cannot be told to forget what came after a checkpoint. A run that is continued hands
over all of its log again, whose values are the same. W&B ignores the steps that it has, and gets those that were lost
with a killed process. An offline run begins a new file, which is whole for the same reason.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from nested_reft.heartbeat import beat
from nested_reft.json_files import write_json
from nested_reft.run_logs import points
from nested_reft.untrusted import printable, shown

logger = logging.getLogger(__name__)

FOLDER = "wandb"  # in the run's directory; W&B names it
IDENTITY = "wandb.json"  # beside it: by which name W&B knows the run
INIT_SECONDS = 15.0  # that the service has to answer at the start
FINISH_SECONDS = 10.0  # that W&B has at the end to upload what is left
_SPARE_SECONDS = 10.0  # by which W&B may be late for either limit
MOST_WAITING = 10_000  # steps, each of some kilobytes; so many wait only where W&B is stuck
MOST_BINS = 512  # of W&B's histograms


def check_wandb(project: str | None) -> None:
    """Refuses a run that is to be logged on W&B where its package is missing or too old.

    Args:
        project: `train.wandb_project`.

    Raises:
        ImportError: says how to install it.
    """
    if project is None:
        return
    try:
        # Without this limit, a run whose network is down would not come to its end.
        fits = "finish_timeout" in _package().Settings.model_fields
    # A folder `wandb` in the working directory is a package without contents.
    except (ImportError, AttributeError):
        fits = False
    if not fits:
        raise ImportError(
            f"train.wandb_project is {shown(project)}, and wandb 0.27 or newer is not installed:"
            " pip install 'nested_reft[wandb]'"
        )


def wandb_log(run: Path) -> WandbLog | None:
    """What logs a run on W&B; None for a run whose configuration names no project.

    Args:
        run: its directory.
    """
    file = run / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    project = config.get("train", {}).get("wandb_project")
    return None if project is None else WandbLog(run, project, config)


class WandbLog:
    """Hands the metrics of a run to W&B, from a thread that nobody waits for while the run goes on."""

    def __init__(self, run: Path, project: str, config: dict[str, Any]):
        """Args:
        run: its directory.
        project: where the run appears.
        config: of the run, as JSON-able values.
        """
        self._run, self._project, self._config = run, project, config
        self._waiting: SimpleQueue[tuple[int, dict[str, Any]] | None] = SimpleQueue()
        self._is_over, self._ended, self._started = False, False, time.monotonic()
        # A daemon, because W&B must not keep a process that has nothing else to do.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Leaves the values of a step to the thread, and returns at once.

        Args:
            step: which `metrics.jsonl` has by now.
            metrics: of the step, as they are logged there.
        """
        if self._is_over:
            return
        if self._waiting.qsize() >= MOST_WAITING:
            self._give_up(f"it has taken none of the last {MOST_WAITING} steps")
            return
        self._waiting.put((step, metrics))

    def close(self, ended: bool) -> None:
        """Ends the run on W&B, and leaves W&B behind where that takes too long.

        Args:
            ended: the run came to its last step; otherwise W&B shows it as failed until it is continued.
        """
        self._ended = ended
        self._waiting.put(None)
        # A run that was shorter than W&B's start waits for that, too.
        begun = max(time.monotonic(), self._started + INIT_SECONDS + _SPARE_SECONDS)
        end = begun + FINISH_SECONDS + _SPARE_SECONDS
        while self._thread.is_alive() and time.monotonic() < end:
            beat()  # the watchdog would take a long wait for a stall
            self._thread.join(0.2)
        if self._thread.is_alive():
            self._give_up("it was not done in time at the end")

    def _work(self) -> None:
        try:
            wandb = _package()
            run = self._open(wandb)
            print(f"Weights & Biases: {run.url or 'offline'}, files in {printable(str(self._run / FOLDER))}")
            for step, metrics in self._lines():
                values, histograms = points(metrics)
                shapes = {name: _histogram(wandb, count_A) for name, count_A in histograms.items()}
                # With `commit` the step is complete at once, and not when the next one begins.
                run.log({**values, **shapes}, step=step, commit=True)
            run.finish(exit_code=0 if self._ended else 1)
        # Whatever it is, the run goes on.
        except (Exception, SystemExit) as error:
            self._give_up(_in_words(error))

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Steps and their metrics until the run is closed, those of earlier processes first."""
        first = self._waiting.get()
        if first is None:
            return
        with (self._run / "metrics.jsonl").open(encoding="utf-8") as log:
            for line in log:
                metrics = json.loads(line)
                step = metrics.pop("step")
                if step >= first[0]:
                    break
                yield step, metrics
        yield first
        while (waiting := self._waiting.get()) is not None:
            yield waiting

    def _open(self, wandb: Any) -> Any:
        """The run on W&B. It is an offline one where the service does not answer, or knows no account."""
        try:
            return self._init(wandb, None)
        except Exception as error:
            # What follows would end a run of the user's own in the same session.
            if self._is_over or wandb.run is not None:
                raise
            logger.warning(
                "Weights & Biases cannot be reached (%s); the run is logged offline in '%s'",
                _in_words(error),
                self._run / FOLDER,
            )
            wandb.teardown()  # W&B's process still knows the run that failed, and would refuse another of its name
            return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str | None) -> Any:
        # Silent W&B asks nobody for a key, which would wait for an answer, and keeps the progress bar whole.
        wandb.setup(wandb.Settings(silent=True))
        settings = wandb.Settings(
            # Metrics and configuration go there, and no code, output, list of packages or load of the machine.
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            symlink=False,  # a run's directory can be copied anywhere
            silent=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        return wandb.init(
            project=self._project,
            name=self._run.name,
            id=_identity(self._run),
            resume="allow",
            config=self._config,
            dir=str(self._run.absolute()),
            mode=mode,  # None leaves it to WANDB_MODE
            reinit="create_new",  # a run of the user's own in the same session stays as it is
            settings=settings,
        )

    def _give_up(self, reason: str) -> None:
        if self._is_over:  # it was left behind, and whatever it says now is no news
            return
        self._is_over = True
        logger.warning(
            "Weights & Biases gets nothing more of this run: %s. The run and its own logs are not affected. What"
            " W&B has so far lies in '%s', and `wandb sync` uploads it",
            reason,
            self._run / FOLDER,
        )


def _package() -> Any:
    # W&B would report its own errors to a service, also offline. It reads this when it is imported.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb


def _in_words(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def _identity(run: Path) -> str:
    """The name by which W&B knows a run, made once. The directory keeps it, so it may be moved or renamed."""
    file = run / IDENTITY
    if not file.is_file():
        # Names of directories may come twice: two machines can begin runs in the same second.
        write_json(file, {"id": secrets.token_hex(8)})
    return str(json.loads(file.read_text(encoding="utf-8"))["id"])


def _histogram(wandb: Any, count_A: list[int]) -> Any:
    """A bin for each age; where W&B has no room for so many, the last one holds the rest."""
    count_A = [*count_A[: MOST_BINS - 1], sum(count_A[MOST_BINS - 1 :])] if len(count_A) > MOST_BINS else count_A
    return wandb.Histogram(np_histogram=(count_A, [age - 0.5 for age in range(len(count_A) + 1)]))
