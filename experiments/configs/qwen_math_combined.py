"""Qwen2.5-Math-1.5B-Instruct on GSM8K and MATH: nested rollouts, DAPO and DUMP together.

As `qwen_math_gsm8k`, with MATH as a second source; `data.split` divides both by the pass rate that the model
starts with, and DUMP chooses between the parts. Command: nested-reft train qwen_math_combined
Time: not measured; it is meant for an accelerator.
"""

import dataclasses

from nested_reft.data.sources import DatasetSource
from nested_reft.data.splits import SplitConfig
from nested_reft.training.config import Config, load_config
from nested_reft.training.presets import with_dump


def get_config() -> Config:
    base = load_config("qwen_math_gsm8k")
    math = DatasetSource("math", "math", None, 256, seed=0)
    data = dataclasses.replace(base.data, sources=(*base.data.sources, math), split=SplitConfig("pass_rate"))
    return dataclasses.replace(with_dump(base), name="qwen_math_combined", data=data)
