"""The Python API: what a notebook cell needs is one call."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax

from nested_reft import processes
from nested_reft.checkpoints import check_directory, newest_checkpoint
from nested_reft.evaluation import Evaluation
from nested_reft.json_files import check_can_write, differences, write_json
from nested_reft.layer_plan import LayerPlan
from nested_reft.layer_skip import NestingConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, SilentRunDirectory, read_log, versions
from nested_reft.run_mirror import address_of, local_run
from nested_reft.sharding import MeshConfig
from nested_reft.training.compatibility import check_start
from nested_reft.training.config import Config, load_config
from nested_reft.training.failed_update import kept_number, load_failed_update
from nested_reft.training.heldout import heldout_results
from nested_reft.training.keys import RunKeys
from nested_reft.training.memory import check_memory
from nested_reft.training.mesh_choice import with_chosen_mesh
from nested_reft.training.phases import last_checkpoint
from nested_reft.training.record import StepRecord
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import Setup, check_bridges, prepare, run_config
from nested_reft.training.step import UpdateResult
from nested_reft.training.trainer import Trainer
from nested_reft.types import TrainBatch
from nested_reft.untrusted import printable, shown
from nested_reft.wandb_log import check_wandb


def train(config: Config | Run | str, on_step: Callable[[StepRecord], None] | None = None, runs: str = "runs") -> Run:
    """Trains, and returns the finished run.

    Examples:
        >>> small = {"steps": 2, "checkpoint_every": 1}
        >>> config = load_config("tiny", train=small, warm_start={"steps": 5}, evaluation={"samples_per_prompt": 0})
        >>> rewards = []
        >>> run = train(config, on_step=lambda step: rewards.append(step.reward))  # doctest: +ELLIPSIS
        run directory: runs/tiny-...
        >>> len(rewards), run.summary()["steps"]
        (2, 2)

    Ctrl-C (in a notebook, the stop button) ends the run after its current step, with a checkpoint.

    Args:
        config: a configuration, the name of one, or a run to continue from its newest checkpoint. A run
            that is complete comes back as it is.
        on_step: called with the record of each training step.
        runs: where the run directory is made, also on `gs://`.

    Raises:
        ValueError: the configuration cannot work; names the field, its value and what is allowed.
        KeyboardInterrupt: the run was asked to stop; continue it with `train(Run(directory))`.
        FloatingPointError: too many updates in a row, or a parameter, were not finite.
    """
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r}; allowed is a function that takes a StepRecord, or None")
    # The answer is kept, because `config` becomes the configuration of the run below.
    if isinstance(config, Run):
        if is_complete(config.path, config.config()):
            return config
        trainer = open_trainer(config.config(), runs, resume=config.path, on_step=on_step)
    else:
        trainer = open_trainer(load_config(config) if isinstance(config, str) else config, runs, on_step=on_step)
    trainer.run()
    return Run(trainer.run_directory.path)


def evaluate(
    policy: Policy | Run, config: Config | str | None = None, plan: LayerPlan | None = None, samples: bool = True
) -> dict[str, Evaluation]:
    """Held-out accuracy of a policy on every source of a configuration.

    Examples:
        >>> policy = Policy.load(run)
        >>> results = evaluate(policy, run.config(), samples=False)
        >>> list(results), results["three_to_six_digits"].prompts
        (['three_to_six_digits'], 128)

    Args:
        policy: what answers; a run stands for its newest checkpoint.
        config: whose held-out prompts to use; None for a run, which has its own.
        plan: the layers that act; None is the full model.
        samples: also measure pass@k, by sampling.

    Raises:
        ValueError: no configuration is given for a policy that is no run, or the two do not go together.
    """
    if isinstance(policy, Run):
        # A configuration that is given wins, so that a run can be measured on the prompts of another.
        config, policy = config or policy.config(), policy.policy()
    if config is None:
        raise ValueError("evaluate got no configuration; give the one whose held-out prompts to use")
    config = load_config(config) if isinstance(config, str) else config
    # A plan is an argument here, so the way in which the configuration draws plans must not stop the call.
    return evaluate_sources(prepare(without_plans(config), policy), plan, samples)


class Run:
    """A run directory, of a run that is finished or still going on.

    Examples:
        >>> run.metrics()["step"]
        [0, 1, 2]
        >>> sorted(run.samples()[0])[:3]
        ['accuracy', 'advantage', 'answer']
        >>> run.config().name
        'tiny'

    Attributes:
        path: the directory; that of a run on `gs://` is a local copy.
    """

    def __init__(self, path: str | Path):
        """Args:
        path: a run directory, also on `gs://`.

        Raises:
            ValueError: it is none.
        """
        self.path = local_run(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(f"'{self.path}' is not a run directory: it has no config.json")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def metrics(self) -> dict[str, list[Any]]:
        """The metrics of every step as columns of equal length, with None where a step did not log one.

        `nested_reft.training.record.METRICS` says what each of them means. Step 0 is before training.
        """
        lines = read_log(self.path / "metrics.jsonl")
        # A dictionary keeps the order in which the names were first logged, which a set would not.
        names = dict.fromkeys(name for line in lines for name in line)
        return {name: [line.get(name) for line in lines] for name in names}

    def samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """Logged completions; their texts are untrusted.

        Args:
            step: counted from 1; None takes all steps.
        """
        lines = read_log(self.path / "samples.jsonl")
        return [line for line in lines if step is None or line["step"] == step]

    def summary(self) -> dict[str, Any]:
        """What the run ended with.

        Raises:
            ValueError: it has not ended yet.
        """
        file = self.path / "summary.json"
        if not file.is_file():
            raise ValueError(f"run '{self.path}' has no summary yet: it is going on or was stopped")
        return json.loads(file.read_text(encoding="utf-8"))

    def config(self) -> Config:
        """The configuration that it was made with."""
        return run_config(self.path)

    def policy(self) -> Policy:
        """The trained policy of its newest checkpoint."""
        return Policy.load(self.path)


def evaluate_sources(
    setup: Setup, plan: LayerPlan | None, samples: bool, completions: list[dict[str, Any]] | None = None
) -> dict[str, Evaluation]:
    """Held-out results of every source, by name; the seed is the configuration's, so that they can be repeated.

    Args:
        setup: policy and prompts.
        plan: the layers that act; None is the full model.
        samples: also measure pass@k.
        completions: every completion is added to it, with what it was scored.

    Returns:
        One result for each source of the configuration.
    """
    keys = RunKeys(jax.random.key(setup.config.train.seed))
    return heldout_results(
        setup.policy, setup.data, setup.config, keys.evaluation, plan, samples, completions=completions
    )


def without_plans(config: Config) -> Config:
    """The configuration of what draws no plans and runs on one device, so that neither can stop it."""
    return dataclasses.replace(
        config, nesting=NestingConfig(), nesting_control=NestingControlConfig(), mesh=MeshConfig()
    )


def is_complete(path: Path | None, config: Config) -> bool:
    """Whether a run has its last checkpoint and its summary; one that was stopped between them still has to finish.

    Of several processes the first one looks, and all get its answer.

    Args:
        path: the run directory; None of a run that has not begun.
        config: of the run.
    """
    return bool(processes.broadcast_text("yes" if processes.is_writer() and _is_complete(path, config) else ""))


def _is_complete(path: Path | None, config: Config) -> bool:
    if path is None or newest_checkpoint(path / "checkpoints") != last_checkpoint(config):
        return False
    # A summary that cannot be read is measured and written once more.
    try:
        return json.loads((path / "summary.json").read_text(encoding="utf-8"))["steps"] == config.train.steps
    except (OSError, ValueError, TypeError, KeyError):
        return False


def open_trainer(
    config: Config,
    runs: str,
    resume: Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_stall: Callable[[str], None] | None = None,
) -> Trainer:
    """The trainer of a new run, or of one to continue, ready for its next step.

    Everything is checked before a directory is made or a log is opened.

    Args:
        config: of the run.
        runs: where a new run's directory is made.
        resume: the run directory to continue.
        on_step: called with the record of each training step.
        on_stall: called where nothing goes on any more; see `Trainer`.

    Raises:
        ValueError: the configuration cannot work, or the run cannot be continued.
    """
    chooses = config.mesh.data == "auto"
    # Each process asks its own devices for their memory, so the choice is made before they are compared.
    config = processes.agreed(lambda: with_chosen_mesh(config))
    _check_same_run(config, resume)
    with ExitStack() as on_failure:
        directory = None
        if resume is not None:
            # A run that somebody else works on is refused before the model is loaded.
            directory = on_failure.enter_context(closing(processes.agreed(lambda: _taken(resume))))

        def prepared() -> Setup:
            """What every process needs."""
            if processes.is_writer():
                check_wandb(config.train.wandb_project)
            if resume is None:
                check_start(config)
            setup = prepare(config, resumes=resume is not None)
            check_memory(setup)
            return setup

        # What fails on one process would leave the others waiting for it.
        setup = processes.agreed(prepared)
        if processes.count() > 1:
            check_bridges(setup)
        if directory is None:
            # A new run's is made once all of them are prepared.
            name, whole = config.name, setup.config.to_json()
            made = processes.by_writer(lambda: RunDirectory.create(runs, name, whole))
            address = processes.broadcast_text(None if made is None else made.address)
            directory = made or SilentRunDirectory.at(address)
        on_failure.pop_all()
    if processes.is_writer():
        print(f"run directory: {printable(directory.address)}")
        if directory.address != str(directory.path):
            print(f"local copy: {printable(str(directory.path))}")
        if not chooses:  # the choice has said it with its reason
            _say_idle_devices(setup.config)
    trainer = Trainer(setup, directory, on_step, on_stall)
    del setup  # so that training takes over the model's memory instead of copying it
    trainer.open(resume=resume is not None)
    if resume is not None:
        processes.by_writer(lambda: _begin_to_continue(trainer, resume, config))
    return trainer


def check_resumable(run: Path) -> None:
    """Refuses a run that has nothing to continue from.

    Args:
        run: its directory.

    Raises:
        ValueError: it has no complete checkpoint, or a file is in the place of its checkpoints.
    """
    check_directory(run / "checkpoints")
    if newest_checkpoint(run / "checkpoints") is None:
        raise ValueError(f"run '{address_of(run)}' has no complete checkpoint to resume from")


def _taken(run: Path) -> RunDirectory:
    """The directory of a run that is to be continued, for this process."""
    check_resumable(run)
    # Each process writes its share of a checkpoint. Said before the lock and the logs, whose errors name single files.
    for place in (run, run / "checkpoints"):
        check_can_write(place, "run directory", "copy the whole run to a place that can be written and resume the copy")
    return RunDirectory(run) if processes.is_writer() else SilentRunDirectory(run)


def _begin_to_continue(trainer: Trainer, run: Path, config: Config) -> None:
    # Said always: it shows also where a checkpoint has gone without a trace.
    state, phase = trainer.state, trainer.phases[trainer.state.phase]
    print(f"continuing after step {state.step} of {phase.steps} ({phase.name})")
    # A run that is extended has another configuration from here on, but only once its checkpoint has been read.
    if run_config(run) != config:
        write_json(run / "config.json", config.to_json())


@dataclasses.dataclass(frozen=True)
class RepeatedUpdate:
    """An update that a run has kept, done once more.

    Attributes:
        batch: what it read.
        result: what it found; on the host.
        not_finite: a parameter that was not finite before it, by name; None where all were.
    """

    batch: TrainBatch
    result: UpdateResult
    not_finite: str | None


def repeat_failed_update(run: str | Path) -> RepeatedUpdate:
    """Repeats the update for which a run ended, because loss or gradient was not finite. The run stays as it is.

    Args:
        run: a run directory.

    Raises:
        ValueError: it is none, it is in use, or it has kept no update.
    """
    path = local_run(run)
    # Whoever searches has nothing to do here.
    config = dataclasses.replace(run_config(path), search=SearchConfig())
    kept_number(path)  # before a model is loaded
    # The directory is taken first, as for a run that goes on, and closed also where the model cannot be loaded.
    with closing(RunDirectory(path)) as directory, Trainer(prepare(config, resumes=True), directory).open() as trainer:
        learner = trainer.state.learner
        batch = load_failed_update(path, trainer.state, trainer.phases)
        not_finite = learner.not_finite()
        return RepeatedUpdate(batch.arrays, learner.update_once(batch), not_finite)


def _check_same_run(config: Config, resume: Path | None) -> None:
    """Refuses processes that would not run the same.

    Raises:
        ValueError: names the first process that differs, the field and both values.
    """
    if processes.count() == 1:
        return
    mine = {
        "config": config.to_json(),
        "versions": versions(),
        "devices of this process": jax.local_device_count(),
        "resume": None if resume is None else address_of(resume),
    }
    texts = processes.gather_text(json.dumps(mine))
    first = json.loads(texts[0])
    for process, text in enumerate(texts):
        for name, theirs, other in differences(first, json.loads(text)):
            raise ValueError(
                f"process {process} has {shown(other)} for {name.removeprefix('config.')}, and process 0 has"
                f" {shown(theirs)};"
                " start all processes with the same command, configuration and versions"
            )


def _say_idle_devices(config: Config) -> None:
    """Says so where a run leaves devices of this machine without work."""
    used, here = config.mesh.size, jax.device_count()
    if used < here:
        print(f"devices: {used} of {here} are used; --mesh.data shares prompts and --mesh.tensor layers among more")
