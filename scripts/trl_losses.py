"""TRL's own losses and gradients on a small random batch, for a test to compare with: `tests/losses/trl_losses.json`.

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 numpy
    trl/bin/python scripts/trl_losses.py

`GRPOTrainer._compute_loss` runs as it is, on log-probabilities in place of a model's. The ratio that corrects the
sampler is made before it, where the trainer samples. `correction` is that rule: truncated at a cap, or 0 above it.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl  # pyright: ignore[reportMissingImports]
from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

GROUPS, GROUP, TOKENS = 2, 3, 4
CAP, MOST = 1.3, 6  # of the correction; tokens of a completion
LOSSES = {"grpo": (0.2, 0.04), "dapo": (0.28, 0.0), "dr_grpo": (0.2, 0.0)}  # upper clip and beta
MODES = ("token_truncate", "sequence_truncate", "token_mask", "sequence_mask")


def batch() -> dict[str, np.ndarray]:
    """Log-probabilities under four policies, rewards and lengths, all from one seed."""
    draw = np.random.default_rng(0)
    shape = (GROUPS * GROUP, TOKENS)
    target = -draw.uniform(0.2, 2.0, shape)
    others = {name: target + draw.normal(0, 0.3, shape) for name in ("old", "behavior", "reference")}
    length = draw.integers(1, TOKENS + 1, GROUPS * GROUP)
    return {"target": target, **others, "reward": draw.normal(0, 1, GROUPS * GROUP), "length": length}


def correction(mode: str, old: torch.Tensor, behavior: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The ratio that multiplies each token's loss.

    Args:
        mode: of `vllm_importance_sampling_mode`.
        old, behavior: log-probabilities before the update and of the sampler.
        mask: 1 at tokens.
    """
    apart = (old - behavior) * mask
    ratio = torch.exp(apart.sum(-1, keepdim=True) if mode.startswith("sequence") else apart)
    return ratio.clamp(max=CAP) if mode.endswith("truncate") else ratio.masked_fill(ratio > CAP, 0.0)


def loss_and_gradient(values: dict[str, np.ndarray], loss: str, mode: str) -> dict[str, object]:
    """TRL's loss, and its gradient with respect to the target's log-probabilities.

    Args:
        values: of `batch`.
        loss: of `LOSSES`.
        mode: of `MODES`.
    """
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    target = tensors["target"].requires_grad_()
    mask = (torch.arange(TOKENS) < tensors["length"][:, None]).double()
    reward = tensors["reward"].reshape(GROUPS, GROUP)
    advantage = reward - reward.mean(1, keepdim=True)
    if loss != "dr_grpo":
        advantage = advantage / (reward.std(1, keepdim=True) + 1e-6)
    high, beta = LOSSES[loss]
    # The trainer reads these of itself; whatever it does not need for the loss is left out.
    arguments = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (target, torch.zeros_like(mask), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=arguments,
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=high,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss,
        max_completion_length=MOST,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantage.flatten(),
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["reference"],
        "importance_sampling_ratio": correction(mode, tensors["old"], tensors["behavior"], mask),
        "num_items_in_batch": mask.sum(),
    }
    value = GRPOTrainer._compute_loss(trainer, None, inputs)
    value.backward()
    assert target.grad is not None
    return {"loss": loss, "mode": mode, "value": value.item(), "gradient": target.grad.tolist()}


def main() -> None:
    """Writes the file."""
    values = batch()
    found = {
        "trl": trl.__version__,
        "cap": CAP,
        "tokens": MOST,
        "batch": {name: value.tolist() for name, value in values.items()},
        "losses": [loss_and_gradient(values, loss, mode) for loss in LOSSES for mode in MODES],
    }
    path = Path(__file__).parents[1] / "tests/losses/trl_losses.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
