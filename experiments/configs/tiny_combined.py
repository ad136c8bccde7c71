"""Nested rollouts, DAPO and DUMP together on the sources of `tiny_dump`; the middle layer of three is skipped.

Command: nested-reft train tiny_combined
Time: about four minutes on one core, beside other work.
"""

import dataclasses

from nested_reft.layer_skip import NestingConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.presets import with_dump


def get_config() -> Config:
    base = load_config("tiny_dapo")
    return dataclasses.replace(
        with_dump(base),
        name="tiny_combined",
        nesting=NestingConfig(skip_ratio=0.34, border=1),
        warm_start=dataclasses.replace(base.warm_start, steps=150, layer_dropout=0.4),
    )
