"""One run of a sweep: trained by the trainer, from the warm start that it shares with the others of its seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nested_reft.api import is_complete
from nested_reft.checkpoints import newest_checkpoint
from nested_reft.replay import GenerationLimitError
from nested_reft.rewards.limits import RewardError
from nested_reft.run_directory import RunDirectory
from nested_reft.sweeps.starts import shared_start
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config
from nested_reft.training.memory import check_memory
from nested_reft.training.reinforcement import EmptyUpdatesError
from nested_reft.training.search_pool import SearchError
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from nested_reft.training.warm_start import WarmStartConfig
from nested_reft.wandb_log import check_wandb

RUNS, STARTS = "runs", "starts"  # folders in that of a sweep
# What ends one run of a sweep and leaves the others to go on; a configuration may not be able to work.
FAILURES = (
    *(ValueError, ImportError, OSError, FloatingPointError),
    *(GenerationLimitError, EmptyUpdatesError, RewardError, SearchError),
)


def trained_run(config: Config, out: Path) -> Path:
    """The run directory of a finished run: trained here, or continued from its newest checkpoint.

    The run begins with the kept warm start of its seed, so its own configuration has none. With adapters each run
    makes its warm start itself, because only whole models are kept.

    Args:
        config: of the run, with the warm start.
        out: the folder of the sweep.

    Raises:
        ValueError: the configuration cannot work.
        KeyboardInterrupt: it was asked to stop; the next call continues.
    """
    check_start(config)
    check_wandb(config.train.wandb_project)
    shares = bool(config.warm_start.steps) and config.lora.rank == 0
    setup = shared_start(config, out / STARTS, config.warm_start) if shares else prepare(config)
    own = dataclasses.replace(setup.config, warm_start=WarmStartConfig()) if shares else setup.config
    setup = dataclasses.replace(setup, config=own)
    begun = begun_run(own, out / RUNS)
    if begun is not None and is_complete(begun, own):
        return begun
    check_memory(setup)
    directory = RunDirectory.create(out / RUNS, own.name, own.to_json()) if begun is None else RunDirectory(begun)
    trainer = Trainer(setup, directory)
    del setup  # so that training takes over the model's memory instead of copying it
    trainer.open(resume=begun is not None)
    # The model that the configuration names is not where the run began, so checkpoints hold all that was trained.
    trainer.state.trained_before |= shares
    trainer.run()
    return directory.path


def begun_run(config: Config, runs: Path) -> Path | None:
    """The newest run directory of a configuration that can be continued; None without one.

    Args:
        config: of the run.
        runs: the folder of run directories.
    """
    asked, found = config.to_json(), list[Path]()
    for path in runs.glob(f"{config.name}-*"):
        try:
            is_same = json.loads((path / "config.json").read_text(encoding="utf-8")) == asked
        except (OSError, ValueError):
            continue
        if is_same and newest_checkpoint(path / "checkpoints") is not None:
            found.append(path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
