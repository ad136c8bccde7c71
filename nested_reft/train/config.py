"""The configuration of a run: the parts of every room, composed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite

from nested_reft.config_files import CONFIG_DIRECTORIES, shipped_configs
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.prompts import PromptFormat, TooLong
from nested_reft.data.sources import DatasetSource, JsonlSource, SourceConfig, TaskSource
from nested_reft.data.splits import SplitConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses.config import LossConfig
from nested_reft.models.config import ModelConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.dynamic_sampling import DynamicSamplingConfig
from nested_reft.rollout.exact import DRAFT_LENGTHS
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.sharding import MeshConfig
from nested_reft.train.optimizer import OptimizerConfig


@dataclass(frozen=True)
class ModelSource:
    """The model to fine-tune.

    Attributes:
        name: a known model, a hub id, a GGUF file, a Hugging Face directory, or `scratch`.
        dtype: of the weights, and of the inputs of matrix products.
        shape: for `scratch`, the model's shape; its vocabulary is that of `alphabet`.
        alphabet: for `scratch`, the characters of its tokenizer.
    """

    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    shape: ModelConfig | None = None
    alphabet: str = ""

    def __post_init__(self):
        if (self.name == "scratch") != (self.shape is not None):
            raise ValueError(
                f"model.name is '{self.name}' and model.shape is {self.shape};"
                " 'scratch' needs a shape, every other model brings its own"
            )


@dataclass(frozen=True)
class DataConfig:
    """What the prompts are.

    Attributes:
        sources: where questions come from; the curriculum chooses between them.
        prompts_per_batch: B.
        max_prompt_tokens: longest prompt allowed.
        prompt: how a question becomes a prompt, unless its source says otherwise.
        too_long: `refuse` prompts that are longer than allowed, or `drop` and count them.
        split: how sources are divided into finer ones before training.
    """

    sources: tuple[SourceConfig, ...]
    prompts_per_batch: int
    max_prompt_tokens: int
    prompt: PromptFormat = field(default_factory=PromptFormat)
    too_long: TooLong = "refuse"
    split: SplitConfig = field(default_factory=SplitConfig)

    def __post_init__(self):
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one source")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources has the names {names}; each source needs a name of its own")
        unknown = [name for name in self.split.sources if name not in names]
        if unknown:
            raise ValueError(f"data.split.sources has {unknown[0]!r}; allowed are {', '.join(names)}")
        for name in ("prompts_per_batch", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; allowed is 1 or more")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled.

    Attributes:
        group_size: G, completions per prompt; every advantage but `no_baseline` needs 2 or more.
        max_completion_tokens: C.
        sampling: temperature and truncation.
        mode: `nested` samples from the layer-skipped policy; `exact` only drafts with it, and the full model
            verifies, so that samples are exactly its own (`rollout.exact`).
        draft_length: drafts of the first `exact` batch; later ones follow the acceptance rate.
        weights: what rollouts are computed with: the `target`'s own weights, or a `bfloat16` or `int8` copy made
            after each update (`models.low_precision`), whose rounding the importance weight corrects.
    """

    group_size: int
    max_completion_tokens: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mode: Literal["nested", "exact"] = "nested"
    draft_length: int = 2
    weights: Literal["target", "bfloat16", "int8"] = "target"

    def __post_init__(self):
        if self.group_size < 1:
            raise ValueError(f"rollout.group_size is {self.group_size}; allowed is 1 or more")
        if self.max_completion_tokens < 1:
            raise ValueError(f"rollout.max_completion_tokens is {self.max_completion_tokens}; allowed is 1 or more")
        if self.sampling.temperature == 0:
            raise ValueError("rollout.sampling.temperature is 0; greedy completions of a prompt are all alike")
        if self.mode not in ("nested", "exact"):
            raise ValueError(f"rollout.mode is '{self.mode}'; allowed are nested, exact")
        if self.weights not in ("target", "bfloat16", "int8"):
            raise ValueError(f"rollout.weights is '{self.weights}'; allowed are target, bfloat16, int8")
        if self.mode == "exact" and self.weights != "target":
            raise ValueError(
                f"rollout.mode is 'exact' and rollout.weights '{self.weights}'; exact rollouts are the target's own:"
                " use weights 'target', or mode 'nested'"
            )
        if self.draft_length not in DRAFT_LENGTHS:
            raise ValueError(f"rollout.draft_length is {self.draft_length}; allowed are {DRAFT_LENGTHS}")


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised training before reinforcement, on question-answer pairs.

    Attributes:
        steps: updates; 0 for none.
        batch_size: pairs per update.
        learning_rate: of AdamW, decaying to zero by a cosine.
        layer_dropout: largest share of layers skipped in an update, drawn uniformly from 0 up.
    """

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3
    layer_dropout: float = 0.0

    def __post_init__(self):
        if self.steps < 0 or self.batch_size < 1:
            raise ValueError(
                f"warm_start has steps {self.steps}, batch_size {self.batch_size}; allowed are 0 or more and 1 or more"
            )
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"warm_start.learning_rate is {self.learning_rate}; allowed is more than 0")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"warm_start.layer_dropout is {self.layer_dropout}; allowed is 0 <= layer_dropout < 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: rollout batches.
        updates_per_batch: passes over each batch. From the second on the target has moved, and
            the log-probabilities of the full model at rollout time are scored first.
        micro_batches: parts that a batch is computed in, to save memory; the gradient is the same.
        remat: recompute activations in the backward pass, to save more.
        seed: decides everything random in the run.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        keep_checkpoints: newest ones kept.
        ess_warning: effective sample size, as a share, under which a step logs a warning and a remedy.
    """

    steps: int
    updates_per_batch: int = 1
    micro_batches: int = 1
    remat: bool = False
    seed: int = 0
    checkpoint_every: int = 20
    keep_checkpoints: int = 1
    ess_warning: float = 0.1

    def __post_init__(self):
        for name in ("steps", "updates_per_batch", "micro_batches", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; allowed is 1 or more")
        if not 0 < self.ess_warning < 1:
            raise ValueError(f"train.ess_warning is {self.ess_warning}; allowed is 0 < ess_warning < 1")
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}; allowed is 0 or more")


@dataclass(frozen=True)
class Config:
    """A whole run. `experiments/configs/*.py` compose one each in `get_config()`."""

    name: str
    model: ModelSource
    data: DataConfig
    rollout: RolloutConfig
    nesting: NestingConfig
    reward: RewardConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    curriculum: CurriculumConfig
    nesting_control: NestingControlConfig = field(default_factory=NestingControlConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            raise ValueError(
                f"name is {self.name!r}; allowed are letters, digits, '_', '.' and '-': it names the run's directory"
            )
        if self.data.prompts_per_batch % self.train.micro_batches:
            raise ValueError(
                f"train.micro_batches is {self.train.micro_batches}; it must divide data.prompts_per_batch,"
                f" which is {self.data.prompts_per_batch}"
            )
        if (self.data.prompts_per_batch // self.train.micro_batches) % self.mesh.data:
            raise ValueError(
                f"mesh.data is {self.mesh.data}; it must divide the prompts of a micro-batch,"
                f" {self.data.prompts_per_batch // self.train.micro_batches}"
            )
        if self.warm_start.steps and self.warm_start.batch_size % self.mesh.data:
            raise ValueError(
                f"mesh.data is {self.mesh.data}; it must divide warm_start.batch_size, {self.warm_start.batch_size}"
            )
        if self.reward.overlong_cache_tokens > self.rollout.max_completion_tokens:
            raise ValueError(
                f"reward.overlong_cache_tokens is {self.reward.overlong_cache_tokens}; allowed is 0 to"
                f" rollout.max_completion_tokens, which is {self.rollout.max_completion_tokens}"
            )
        if self.rollout.mode == "exact" and self.loss.mixture_alpha is not None:
            raise ValueError(
                f"rollout.mode is 'exact' and loss.mixture_alpha {self.loss.mixture_alpha}; exact rollouts are all the"
                " full model's, so there is nothing to mix: use bias_mitigation 'base', or mode 'nested'"
            )
        if self.rollout.weights != "target" and self.loss.mixture_alpha is not None:
            raise ValueError(
                f"rollout.weights is '{self.rollout.weights}' and loss.mixture_alpha {self.loss.mixture_alpha};"
                " a mixture weighs with the target's own density: use weights 'target', or another bias_mitigation"
            )
        if self.rollout.mode == "exact" and self.nesting_control.hold is not None:
            raise ValueError(
                f"rollout.mode is 'exact' and nesting_control.hold '{self.nesting_control.hold}'; exact rollouts are"
                " on-policy at any depth, so there is no budget to hold: use mode 'nested', or no nesting_control"
            )
        if self.nesting.remeasure_every:
            for name, most, of in (
                ("remeasure_prompts", self.data.prompts_per_batch, "data.prompts_per_batch"),
                ("remeasure_completions", self.rollout.group_size, "rollout.group_size"),
            ):
                if getattr(self.nesting, name) > most:
                    raise ValueError(
                        f"nesting.{name} is {getattr(self.nesting, name)}; allowed is 1 to {of}, which is {most}"
                    )
        sampling = self.rollout.sampling
        self.loss.validate_for(self.rollout.group_size, truncated_sampling=sampling.top_k > 0 or sampling.top_p < 1)
        self.curriculum.validate_for([source.name for source in self.data.sources])
        if self.curriculum.kind == "static" and self.data.split.kind != "none":
            raise ValueError(
                f"curriculum.kind is 'static' and data.split.kind '{self.data.split.kind}'; how many parts need a"
                " weight is not known beforehand: use another kind, or 'none'"
            )
        if self.curriculum.kind == "dump" and self.loss.advantage == "no_baseline":
            raise ValueError(
                "curriculum.kind is 'dump' and loss.advantage 'no_baseline': without a baseline a solved source has the"
                " largest advantages; allowed with 'dump' are leave_one_out, group_mean, group_std"
            )
        if self.model.dtype == "bfloat16" and self.lora.rank == 0:
            raise ValueError(
                "model.dtype is 'bfloat16' and lora.rank 0: updates of the size of a learning rate round away in"
                " bfloat16 weights; train adapters (lora.rank 1 or more, which are float32), or set model.dtype float32"
            )
        if self.lora.rank and self.warm_start.steps:
            raise ValueError("lora.rank and warm_start.steps are both set; a warm start trains the whole model")

    def to_json(self) -> dict[str, Any]:
        """Nested plain values; `from_json` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Config:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        try:
            return dacite.from_dict(cls, value, _reading(type_hooks={SourceConfig: _read_source}))
        except dacite.DaciteError as error:
            raise ValueError(f"not a configuration of this version: {error}") from None


def _reading(**options: Any) -> dacite.Config:
    return dacite.Config(cast=[tuple, float], strict=True, **options)


def _read_source(value: dict[str, Any]) -> SourceConfig:
    """A source of the kind that its fields tell; dacite would try all kinds and hide what is wrong with the right one.

    Raises:
        ValueError: it is of no kind, or a field is missing, unknown or of the wrong type.
    """
    kinds = {"task": TaskSource, "dataset": DatasetSource, "file": JsonlSource}
    found = [kind for name, kind in kinds.items() if name in value]
    if len(found) != 1:
        raise ValueError(f"data.sources.{value.get('name')} needs exactly one of the fields {', '.join(kinds)}")
    try:
        return dacite.from_dict(found[0], value, _reading())
    except dacite.DaciteError as error:
        raise ValueError(f"data.sources.{value.get('name')}: {error}") from None


def load_config(name: str) -> Config:
    """The configuration of a name that ships, or of a path to a Python file with `get_config()`.

    Raises:
        ValueError: there is no such configuration, or the file does not give one.
    """
    path = Path(name)
    if path.suffix != ".py":
        shipped = shipped_configs()
        if name not in shipped:
            raise ValueError(f"configuration '{name}' is unknown; known are {', '.join(shipped)}, or a .py file")
        path = shipped[name]
    elif not path.is_file():
        raise ValueError(f"configuration file '{name}' does not exist")
    spec = importlib.util.spec_from_file_location(f"nested_reft_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # whatever a user's own file raises
        raise ValueError(f"configuration file '{path}' fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"configuration file '{path}' has no get_config() that returns a nested_reft Config")
    return config


def find_data_file(name: str) -> Path:
    """A file named in a configuration: as a path, or beside the shipped configurations."""
    if not os.path.isabs(name) and not Path(name).exists():
        for directory in CONFIG_DIRECTORIES:
            if (directory / name).exists():
                return directory / name
    return Path(name)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """`(field, value in a, value in b)` wherever two `to_json` values differ."""
    found = []
    for name in a.keys() | b.keys():
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append((prefix + name, left, right))
    return sorted(found, key=lambda difference: difference[0])
