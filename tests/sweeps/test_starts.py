"""The warm start that runs of a seed share: made once, and never taken for another."""

import dataclasses

import jax
import numpy as np
import pytest

from nested_reft.sweeps.starts import shared_start
from nested_reft.training.warm_start import WarmStartConfig
from tests.training.runs import nano

WARM = WarmStartConfig(steps=2, batch_size=4)


@pytest.mark.slow
def test_a_warm_start_is_made_once_for_a_seed(tmp_path, capsys):
    config = nano(train__seed=3)
    first, second = (shared_start(config, tmp_path, WARM) for _ in range(2))
    assert capsys.readouterr().out.count("warm start, seed 3") == 1
    for a, b in zip(jax.tree.leaves(first.policy.model), jax.tree.leaves(second.policy.model), strict=True):
        np.testing.assert_array_equal(a, b)
    # Another loss begins with the same weights. Other data do not, and both starts stay.
    shared_start(nano(train__seed=3, loss__truncate_at=3.0), tmp_path, WARM)
    assert "warm start" not in capsys.readouterr().out
    (source,) = config.data.sources
    other = dataclasses.replace(config.data, sources=(dataclasses.replace(source, train_size=16),))
    shared_start(dataclasses.replace(config, data=other), tmp_path, WARM)
    assert "warm start, seed 3" in capsys.readouterr().out
    assert len(list(tmp_path.glob("warm-seed3-*.safetensors"))) == 2
    # Weights without the description of a finished start must not be taken for one.
    for file in tmp_path.glob("*.json"):
        file.write_text("of another warm start")
    shared_start(config, tmp_path, WARM)
    assert "warm start, seed 3" in capsys.readouterr().out


def test_without_steps_nothing_is_kept(tmp_path):
    shared_start(nano(), tmp_path, WarmStartConfig())
    assert not list(tmp_path.iterdir())
