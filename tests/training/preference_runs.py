"""Runs on synthetic preference pairs that the tests share."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from nested_reft.data.sources import JsonlSource
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.prompt_format import PromptFormat
from nested_reft.training.config import Config
from nested_reft.training.offline import OfflineKind, as_offline
from tests.training.runs import nano


def write_pairs(path: Path, prompts: int = 60, each: int = 2) -> Path:
    """Answers of three or four digits; those with a 7 are preferred to those without, whatever their length."""
    draw = random.Random(0)

    def answer(with_seven: bool) -> str:
        digits = [draw.choice("012345689") for _ in range(draw.randint(3, 4))]
        if with_seven:
            digits[draw.randrange(len(digits))] = "7"
        return "".join(digits)

    rows = [
        {"prompt": f"{100 + n // each} =", "chosen": answer(True), "rejected": answer(False)}
        for n in range(prompts * each)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs_source(path: Path) -> JsonlSource:
    """What `write_pairs` wrote."""
    prompt = PromptFormat("{question}", chat=False)
    return JsonlSource("pairs", str(path), None, 16, 0, question_field="prompt", answer_field="chosen", prompt=prompt)


def preferences(path: Path, kind: OfflineKind | None = None, **changes: Any) -> Config:
    """`nano` on these pairs; `a__b=c` changes field b of part a."""
    config = nano(
        **{
            "data__prompts_per_batch": 8,
            "optimizer__learning_rate": 3e-3,
            "warm_start__layer_dropout": 0.0,
            "nesting": NestingConfig(),
            "evaluation": EvaluationConfig(every_steps=2, samples_per_prompt=0),
        }
        | changes
    )
    assert config.model.shape is not None
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=(pairs_source(path),), max_prompt_tokens=8),
        model=dataclasses.replace(config.model, shape=dataclasses.replace(config.model.shape, num_layers=2)),
    )
    return config if kind is None else as_offline(config, kind)
