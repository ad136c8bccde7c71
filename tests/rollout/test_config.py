"""Which rollouts may be configured: every refusal names the field, the value and what is allowed."""

import pytest

from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import GREEDY, SamplingConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "rollout.group_size is 0; allowed is 1 or more"),
        ({"max_completion_tokens": 0}, "rollout.max_completion_tokens is 0; allowed is 1 or more"),
        ({"draft_length": 0}, "rollout.draft_length is 0; allowed is 1 or more"),
        ({"rows": -1}, "rollout.rows is -1; allowed is 0 (all at once) or more"),
        (
            {"mode": "exact", "rows": 8},
            "rollout.mode is 'exact' and rollout.rows 8; exact rollouts draft and",
        ),
        ({"sampling": GREEDY}, "rollout.sampling.temperature is 0; allowed is more, as greedy completions"),
        ({"sampling": SamplingConfig(top_k=1)}, "rollout.sampling.top_k is 1; allowed is 0 (keep all), or 2 or more"),
        ({"mixture_alpha": 0.0}, "rollout.mixture_alpha is 0.0; allowed is 0 < mixture_alpha <= 1, or None"),
        ({"mixture_alpha": 1.5}, "rollout.mixture_alpha is 1.5"),
        ({"mixture_alpha": float("nan")}, "rollout.mixture_alpha is nan"),
        ({"mode": "exact", "weights": "int8"}, "rollout.mode is 'exact' and rollout.weights 'int8'"),
        ({"mode": "exact", "mixture_alpha": 0.5}, "rollout.mode is 'exact' and rollout.mixture_alpha 0.5"),
        ({"weights": "bfloat16", "mixture_alpha": 0.5}, "rollout.weights is 'bfloat16' and rollout.mixture_alpha 0.5"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError) as error:
        RolloutConfig(**{"group_size": 2, "max_completion_tokens": 4} | changes)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"mixture_alpha": 1.0}, {"mode": "exact"}, {"weights": "int8"}, {"group_size": 1}])
def test_what_means_something_is_allowed(changes):
    config = RolloutConfig(**{"group_size": 2, "max_completion_tokens": 4} | changes)
    assert {name: getattr(config, name) for name in changes} == changes
