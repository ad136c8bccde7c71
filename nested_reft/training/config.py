"""The configuration of a run: the parts of every room, composed."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nested_reft.config_files import CONFIG_DIRECTORIES, load_module, shipped_configs
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.config import DataConfig
from nested_reft.data.sources import DatasetSource, JsonlSource, SourceConfig, TaskSource
from nested_reft.dataset_reset import ResetConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.fields import UnknownField, read
from nested_reft.json_files import differences
from nested_reft.layer_skip import NestingConfig
from nested_reft.literals import check_choice, check_whole
from nested_reft.losses import presets
from nested_reft.losses.registry import OBJECTIVE_CONFIGS, ObjectiveConfig
from nested_reft.mix_control import MixControlConfig
from nested_reft.models.layer_loop import Remat
from nested_reft.models.lora import LoraConfig
from nested_reft.models.registry import known_models
from nested_reft.models.source import ModelSource
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.paths import address, is_remote, local_only
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.sharding import MeshConfig
from nested_reft.training.compatibility import RULES
from nested_reft.training.optimizer import OptimizerConfig
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.warm_start import WarmStartConfig
from nested_reft.untrusted import MAX_WHOLE, shown

MAX_STEPS = 10**8  # a second each, these are three years
MAX_SAVE_SECONDS = 86_400.0  # a day
# What a continued run may have otherwise, beside more steps: nothing that was computed so far depends on it.
CHANGEABLE = ("train.save_seconds", "train.stall_seconds", "train.wandb_project", "mesh.")
ComputeDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: rollout batches.
        updates_per_batch: updates that each batch gets: passes over it, times `mini_batches`. From the second on the
            target has moved, and the log-probabilities of the full model at rollout time are scored first.
        mini_batches: disjoint parts of a batch, which get an update each (PPO). Every pass deals the batch's groups to
            them anew, at random, and groups stay whole. Advantages are made once, of the whole batch.
        micro_batches: parts that an update is computed in, to save memory; the gradient is the same.
        remat: what the backward pass computes again instead of keeping it: nothing (`none`); all but products with
            weights and the output of long attention (`dots`); or everything but each layer's input (`full`), which
            takes the least memory and about a third more time.
        compute_dtype: of the inputs of matrix products in updates, scoring passes and least-squares fits. Parameters,
            sums and all else are float32. bfloat16 is faster on devices that multiply it in hardware: TPUs, GPUs, and
            CPUs with AMX.
        seed: decides everything random in the run.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: newest ones kept; with 2, a run goes on even if the newest one is damaged.
        ess_warning: effective sample size, or share of tokens that a mask keeps, under which a step logs a warning and
            a remedy.
        save_seconds: time that a run has from a SIGTERM (a pre-emption) on to end its step and write a checkpoint. When
            it is over, the run ends without, and the checkpoint before holds. Machines that are taken away often give
            30 seconds.
        stop_after_empty_updates: a run stops after so many steps in a row all of whose updates changed nothing, because
            no token counted or all were rejected; None goes on.
        stop_after_nonfinite_updates: an update whose loss or gradient is not finite is left out and changes nothing.
            After so many of them in a row a run stops, and keeps the last one's batch in `failed_update`.
        stall_seconds: the longest time that may pass without a sign of progress, compiling not counted. Then the
            stacks of all threads are written into the run's directory, and the command ends with exit code 76. None
            watches nothing.
        wandb_project: the project on Weights & Biases where the run's metrics and configuration are logged as well;
            None logs them in the run's directory alone.
    """

    steps: int
    updates_per_batch: int = 1
    mini_batches: int = 1
    micro_batches: int = 1
    remat: Remat = "none"
    compute_dtype: ComputeDtype = "float32"
    seed: int = 0
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    ess_warning: float = 0.1
    stop_after_empty_updates: int | None = None
    stop_after_nonfinite_updates: int = 3
    stall_seconds: float | None = 1800.0
    save_seconds: float = 25.0
    wandb_project: str | None = None

    def __post_init__(self):
        whole = ("steps", "updates_per_batch", "mini_batches", "micro_batches", "checkpoint_every", "keep_checkpoints")
        for name in whole:
            check_whole(f"train.{name}", getattr(self, name), 1, MAX_STEPS)
        # The optimizer counts updates in 32 bits.
        if self.steps * self.updates_per_batch > MAX_STEPS:
            raise ValueError(
                f"train.steps is {self.steps} and train.updates_per_batch {self.updates_per_batch}; allowed are at"
                f" most {MAX_STEPS} updates in all"
            )
        if self.updates_per_batch % self.mini_batches:
            raise ValueError(
                f"train.updates_per_batch is {self.updates_per_batch}; allowed are multiples of train.mini_batches,"
                f" which is {self.mini_batches}, since each pass over a batch is one update on every mini-batch"
            )
        check_choice("train.remat", self.remat, Remat)
        check_choice("train.compute_dtype", self.compute_dtype, ComputeDtype)
        if not 0 < self.ess_warning < 1:
            raise ValueError(f"train.ess_warning is {self.ess_warning}; allowed is 0 < ess_warning < 1")
        if not 0 < self.save_seconds <= MAX_SAVE_SECONDS:
            raise ValueError(
                f"train.save_seconds is {self.save_seconds}; allowed is more than 0, up to {MAX_SAVE_SECONDS:.0f}"
            )
        if self.stop_after_empty_updates is not None:
            check_whole("train.stop_after_empty_updates", self.stop_after_empty_updates, 1, MAX_STEPS)
        check_whole("train.stop_after_nonfinite_updates", self.stop_after_nonfinite_updates, 1, MAX_STEPS)
        if self.stall_seconds is not None and not 0 < self.stall_seconds <= 1e6:
            raise ValueError(f"train.stall_seconds is {self.stall_seconds}; allowed is more than 0, up to 1e6, or None")
        check_whole("train.seed", self.seed, 0, MAX_WHOLE)
        # What W&B itself says of the names of its projects.
        if self.wandb_project is not None and not re.fullmatch(r"[^/\\#?%:\s][^/\\#?%:]{0,127}", self.wandb_project):
            raise ValueError(
                f"train.wandb_project is {shown(self.wandb_project)}; allowed is a name of up to 128 characters, none"
                " of them / \\ # ? % or :, or None"
            )


@dataclass(frozen=True)
class Config:
    """A whole run. `experiments/configs/*.py` compose one each in `get_config()`."""

    name: str
    model: ModelSource
    data: DataConfig
    rollout: RolloutConfig
    nesting: NestingConfig
    reward: RewardConfig
    loss: ObjectiveConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    curriculum: CurriculumConfig
    nesting_control: NestingControlConfig = field(default_factory=NestingControlConfig)
    mix_control: MixControlConfig = field(default_factory=MixControlConfig)
    reset: ResetConfig = field(default_factory=ResetConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        # Each part has checked itself when it was made, so the rules see parts that are valid alone.
        for rule in RULES:
            rule(self)

    @property
    def trained_group_size(self) -> int:
        """K, the completions of a group that an update trains on."""
        return self.replay.group_size or self.rollout.group_size

    @property
    def prompts_per_micro_batch(self) -> int:
        """Prompts that a training step holds in memory at once."""
        return self.data.prompts_per_batch // self.train.mini_batches // self.train.micro_batches

    @property
    def measures_mismatch(self) -> bool:
        """Whether searchers measure how far their samples are off for their depth: where nesting control asks, and age
        would be in the ratios of an update as well."""
        trains_on_old = self.replay.is_on or self.search.lag > 0 or self.search.sync_every > 1
        return self.nesting_control.hold is not None and trains_on_old

    def to_json(self) -> dict[str, Any]:
        """Nested plain values; `from_json` reads them back.

        Raises:
            ValueError: a field holds what JSON cannot keep.
        """
        return _plain(self, "")

    @classmethod
    def from_json(cls, value: Any) -> Config:
        """The configuration that `to_json` wrote.

        Args:
            value: what `to_json` returned, also after a way through a file.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        try:
            return read(cls, _renamed(value), choosers={SourceConfig: _source_kind, ObjectiveConfig: _objective_kind})
        except UnknownField as error:
            raise ValueError(f"{error}{_elsewhere(error.field)}") from None


def _renamed(value: Any) -> Any:
    """The values with the names that fields and choices have now: runs of earlier versions go on."""
    if not isinstance(value, dict):
        return value
    mesh, train = value.get("mesh"), value.get("train")
    if isinstance(mesh, dict) and "model" in mesh and "tensor" not in mesh:
        value = value | {"mesh": {("tensor" if name == "model" else name): size for name, size in mesh.items()}}
    if isinstance(train, dict) and isinstance(train.get("remat"), bool):
        value = value | {"train": train | {"remat": "full" if train["remat"] else "none"}}
    return value


def _elsewhere(field: str) -> str:
    """Where else a field of that name stands; fields move now and then."""
    part, _, name = field.rpartition(".")
    hints = typing.get_type_hints(Config)
    # A part may be one of several dataclasses.
    kinds = {other: typing.get_args(hint) or (hint,) for other, hint in hints.items() if other != part}
    found = [other for other, options in kinds.items() if any(name in typing.get_type_hints(kind) for kind in options)]
    return f"; did you mean {' or '.join(f'{other}.{name}' for other in found)}?" if part in hints and found else ""


def _source_kind(field: str, value: dict[str, Any]) -> type:
    """The kind of a source, which its fields tell.

    Raises:
        ValueError: it is of no kind, or of several.
    """
    kinds: dict[str, type] = {"task": TaskSource, "dataset": DatasetSource, "file": JsonlSource}
    # Each kind of source has one field that no other kind has.
    found = [kind for name, kind in kinds.items() if name in value]
    if len(found) != 1:
        raise ValueError(f"{field} needs exactly one of the fields {', '.join(kinds)}")
    return found[0]


def _objective_kind(field: str, value: dict[str, Any]) -> type:
    """The objective of a `kind`.

    Raises:
        ValueError: there is no such kind.
    """
    # Runs from before there were several objectives say no kind.
    kind = value.get("kind", "policy_gradient")
    if not isinstance(kind, str) or kind not in OBJECTIVE_CONFIGS:
        raise ValueError(f"{field}.kind is {shown(kind)}; allowed are {', '.join(OBJECTIVE_CONFIGS)}")
    return OBJECTIVE_CONFIGS[kind]


def load_config(name: str, /, **overrides: Any) -> Config:
    """A configuration by name, with some of its fields changed.

    Examples:
        >>> config = load_config("tiny", train={"steps": 3}, nesting={"skip_ratio": 0.4})
        >>> config.train.steps, config.nesting.skip_ratio, config.rollout.group_size
        (3, 0.4, 8)
        >>> load_config("tiny", train={"stepz": 3})
        Traceback (most recent call last):
        ...
        ValueError: train.stepz is no field of the configuration; allowed are steps, updates_per_batch, mini_batches, \
micro_batches, remat, compute_dtype, seed, checkpoint_every, keep_checkpoints, ess_warning, stop_after_empty_updates, \
stop_after_nonfinite_updates, stall_seconds, save_seconds, wandb_project

    Args:
        name: one that `nested-reft configs` lists, or a path to a Python file with `get_config()`.
        overrides: new values by field. A mapping changes some fields of a part; anything else, such as a
            dataclass of the part, replaces it. `loss="icepop"` takes a preset, see `with_preset`, and so does
            `loss={"preset": ["dapo", "token TIS"], "clip_high": 0.3}`, with changes.

    Raises:
        ValueError: there is no such configuration or field, or a value cannot work.
    """
    # Overrides pass through the JSON form, so they are checked by the same rules as a stored configuration.
    config = _named_config(name)
    if not overrides:
        return config
    loss = overrides.get("loss")
    if isinstance(loss, str):
        loss = {"preset": loss}
    if isinstance(loss, Mapping) and "preset" in loss:
        names = loss["preset"] if isinstance(loss["preset"], list | tuple) else [loss["preset"]]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"loss.preset is {shown(loss['preset'])}; allowed are names of presets, such as 'icepop'")
        config = with_preset(config, names)
        # What else is said of the loss changes the preset.
        overrides = overrides | {"loss": {key: value for key, value in loss.items() if key != "preset"}}
    return with_absolute_paths(Config.from_json(_merged(config.to_json(), overrides, "")), Path.cwd())


def with_preset(config: Config, names: Sequence[str]) -> Config:
    """The configuration with published presets in its loss, each made of what the one before left.

    Args:
        config: what to change.
        names: as `losses.presets.named` takes them.

    Raises:
        ValueError: a name is unknown, or the loss cannot have such a preset.
    """
    loss = config.loss
    for name in names:
        loss = presets.named(loss, name)
    return dataclasses.replace(config, loss=loss)


def _named_config(name: str) -> Config:
    """The configuration of a name that ships, or of a path to a Python file with `get_config()`."""
    path = local_only(name, "the configuration")
    if path.suffix != ".py":
        shipped = shipped_configs()
        if name not in shipped:
            raise ValueError(f"configuration '{name}' is unknown; known are {', '.join(shipped)}, or a .py file")
        path = shipped[name]
    elif not path.is_file():
        raise ValueError(f"configuration file '{name}' does not exist")
    try:
        # The file is loaded by its path, because it belongs to no package that could be imported.
        module = load_module(path, f"nested_reft_config_{path.stem}")
        config = module.get_config() if hasattr(module, "get_config") else None
    # Whatever a user's own file raises; `sys.exit()` in it must not end the command as if all were well.
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())  # in one line, as all refusals are
        raise ValueError(f"configuration file '{path}' fails: {type(error).__name__}: {message}") from error
    if not isinstance(config, Config):
        raise ValueError(f"configuration file '{path}' has no get_config() that returns a nested_reft Config")
    try:
        return with_absolute_paths(config, path.parent)
    except ValueError as error:
        raise ValueError(f"configuration file '{path}': {error}") from None


def with_absolute_paths(config: Config, directory: Path) -> Config:
    """The configuration with every path in it absolute, so that it means the same wherever a run is continued.

    A file that is not there may be one of those that ship with the configurations. The name of a model is a path
    where there is such a file or directory.

    Args:
        config: the configuration; paths that are absolute already stay.
        directory: what the other paths are relative to.

    Raises:
        ValueError: a field holds what JSON cannot keep, or a value of the wrong type.
    """
    # The way there and back checks the types, which a user's own file may have wrong.
    value = Config.from_json(config.to_json()).to_json()

    def absolute(name: Any) -> str:
        if is_remote(name):
            return address(name)
        path = directory.absolute() / os.path.expanduser(name)  # which leaves `~nobody` as it is
        # Shipped files are looked for last, so a file of the user's own takes their place.
        places = [path, *(shipped / name for shipped in CONFIG_DIRECTORIES)]
        return os.path.normpath(next((place for place in places if place.exists()), path))

    fields = [(source, name) for source in value["data"]["sources"] for name in ("file", "heldout_file", "folder")]
    for part, name in [*fields, (value["nesting"], "divergence_file"), (value["nesting"]["bridge"], "file")]:
        # Sources of the other kinds lack the field, and None names no file.
        if isinstance(part.get(name), str):
            part[name] = absolute(part[name])
    for name in ("function", "safety"):
        file, _, function = str(value["reward"][name]).rpartition(":")
        if file.endswith(".py"):
            local_only(file, f"reward.{name}")
            value["reward"][name] = f"{absolute(file)}:{function}"
    value["reward"]["model"] = [absolute(path) for path in value["reward"]["model"]]
    model = value["model"]["name"]
    # Known names come before files, so that a configuration means the same model in every directory.
    if model and model not in ("scratch", *known_models()) and (directory / os.path.expanduser(model)).exists():
        value["model"]["name"] = absolute(model)
    return Config.from_json(value)


def forbidden_changes(stored: dict[str, Any], asked: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The differences with which a run cannot be continued: all but more steps, another mesh, other time limits,
    another project on Weights & Biases.

    Args:
        stored: the `to_json` value of the run.
        asked: that of its continuation.

    Returns:
        As `differences`; empty where the run may go on.
    """
    found = differences(stored, asked)
    return [
        (name, was, now)
        for name, was, now in found
        if not name.startswith(CHANGEABLE) and (name != "train.steps" or now < was)
    ]


def _merged(stored: dict[str, Any], overrides: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The JSON form of a configuration with some values replaced; `prefix` is where it stands."""
    merged = dict(stored)
    for name, value in overrides.items():
        # Another kind of objective has other fields, so nothing of the stored one stays.
        replaces = prefix + name == "loss" and isinstance(value, Mapping) and "kind" in value
        if (
            isinstance(value, Mapping)
            and isinstance(stored.get(name), dict)
            and not (replaces and value["kind"] != stored[name]["kind"])
        ):
            merged[name] = _merged(stored[name], value, f"{prefix}{name}.")
        else:
            merged[name] = _plain(value, f"{prefix}{name}")
    return merged


def _plain(value: Any, field: str) -> Any:
    """Dataclasses as dictionaries, tuples as lists, paths as text, and numbers and arrays of NumPy as plain ones.

    Raises:
        ValueError: it is nothing that JSON can keep; names the field.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, f"{field}.{name}".lstrip(".")) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{field}.{index}") for index, entry in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # The numbers and arrays of NumPy, JAX and torch all have this method.
    if hasattr(value, "tolist") and not isinstance(value, type):
        return _plain(value.tolist(), field)
    if isinstance(value, int | float | str):  # an enumeration's
        return value
    raise ValueError(f"{field} is {value!r:.80}, of type {type(value).__name__}; JSON cannot keep such a value")
