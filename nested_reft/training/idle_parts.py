"""Parts of a loss that have nothing to do in a configuration, though it is allowed.

Presets set them all together, and a comparison may switch nesting off, so these are warnings and no refusals.
"""

from __future__ import annotations

from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.training.compatibility import correcting_parts, is_on_policy
from nested_reft.training.config import Config


def idle_parts(config: Config) -> list[str]:
    """One sentence for each cause that leaves parts of the loss without work.

    Args:
        config: of a run.
    """
    loss = config.loss
    if not isinstance(loss, PolicyGradientConfig):
        return []
    found, idle = [], _idle_with_one_update(loss)
    if config.train.updates_per_batch == 1 and idle:
        found.append(
            f"train.updates_per_batch is 1, so pi is pi_old when a batch is learnt from, and their ratio is 1:"
            f" {' and '.join(f'loss.{name}' for name in idle)} change nothing"
        )
    correcting = correcting_parts(config)
    if correcting and is_on_policy(config):
        found.append(
            f"nothing is nested and no sample is old, so all ratios are 1: {' and '.join(correcting)} change nothing"
        )
    return found


def _idle_with_one_update(loss: PolicyGradientConfig) -> list[str]:
    """The fields that only a ratio pi / pi_old other than 1 could give work to."""
    clips = [name for name in ("clip_low", "clip_high", "dual_clip") if getattr(loss, name) is not None]
    is_weight = loss.bias_mitigation == "practical"
    found = clips if loss.clip_policies == "three" or is_weight else []
    if is_weight and loss.truncate_at is not None:
        found = [*found, "truncate_at"]
    # Where nothing is rejected either, all weights are 1, and so are their squares.
    if (is_weight or loss.bias_mitigation == "one") and loss.reject_by is None:
        found = [*found, *["self_normalized"] * loss.self_normalized]
        found = [*found, *["advantage"] * (loss.advantage == "weighted_leave_one_out")]
    return found
