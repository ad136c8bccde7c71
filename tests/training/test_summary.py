"""What a finished run measures for its summary."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np

from nested_reft.compilation import CompileCounter
from nested_reft.data.pipeline import batch_prompts
from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout.policy import Policy
from nested_reft.training import summary
from nested_reft.training.clock import Clock
from nested_reft.training.keys import RunKeys
from nested_reft.training.run_state import RunState
from nested_reft.training.setup import prepare
from tests.training.runs import nano


def test_speed_is_measured_with_the_rows_of_the_run(tmp_path, monkeypatch, key):
    """All completions at once may be more than the devices hold."""
    setup, rows = prepare(nano(rollout__rows=3)), []

    def generate(policy, prompts, *arguments, group_size, **options):
        rows.append(options.get("rows", 0))
        return SimpleNamespace(length_BG=np.ones((len(prompts), group_size), int))

    monkeypatch.setattr(Policy, "generate", generate)
    monkeypatch.setattr(summary, "heldout_results", lambda *arguments: {})
    state = Mock(spec=RunState, data=setup.data, learner=Mock(), before={}, seconds=0.0, nonfinite_updates=0)
    state.learner.behavior_policy.return_value = setup.policy
    state.next_prompts.return_value = batch_prompts(
        list(setup.data.train_examples[0][:4]), [0] * 4, setup.data.prompt_size
    )
    state.draw_plan.return_value = LayerPlan.skipping(6, [2])
    (tmp_path / "metrics.jsonl").touch()
    counter = CompileCounter()
    summary.run_summary(setup.config, state, RunKeys(key), tmp_path, counter, Clock(lambda: 0.0))
    counter.close()
    # The full model and the plan: once to compile and three times on the clock.
    assert rows == [3] * 8
