"""The model of a spec as torch has it."""

# It runs in an environment of its own, which the checker does not see.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.benchmarks.worker import Spec


def model_of(spec: Spec) -> Any:
    """The weights in the spec's directory; random ones where it holds a `config.json` alone.

    Args:
        spec: names the directory, the device and the threads; its variant begins with the dtype.
    """
    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.variant.partition(",")[0])
    if any(Path(spec.directory).glob("*.safetensors")):
        model: Any = AutoModelForCausalLM.from_pretrained(spec.directory, dtype=dtype)
        return model.to(spec.device)
    with torch.device(spec.device):  # random numbers are drawn faster there
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.directory), dtype=dtype)
