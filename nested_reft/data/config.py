"""What a run's prompts are: the configuration of data."""

from __future__ import annotations

from dataclasses import dataclass, field

from nested_reft.data.prompts import TooLong
from nested_reft.data.sources import SourceConfig
from nested_reft.data.splits import SplitConfig
from nested_reft.literals import check_choice
from nested_reft.prompt_format import PromptFormat


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
        check_choice("data.too_long", self.too_long, TooLong)
        for name in ("prompts_per_batch", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; allowed is 1 or more")
