"""The optimizer: which learning rate each update has."""

import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.training.optimizer import OptimizerConfig, make_optimizer


def rates(updates: int, **fields) -> list[float]:
    """The learning rate of each update, as a share of the peak; AdamW's step on a constant gradient is as long."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, beta1=0.0, beta2=0.0, **fields), updates)
    parameters = jnp.zeros(1)
    state, found = optimizer.init(parameters), []
    for _ in range(updates):
        steps, state = optimizer.update(jnp.ones(1), state, parameters)
        found.append(-float(np.asarray(steps)[0]) / 0.5)
    return found


@pytest.mark.parametrize(
    ("updates", "fields", "expected"),
    [
        # Counted from zero, the one update of the first run would change nothing, and no update of the second would
        # have the peak.
        (1, {"warmup_steps": 1}, [1]),
        (4, {"warmup_steps": 4}, [0.25, 0.5, 0.75, 1]),
        (5, {"warmup_steps": 10}, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (4, {"warmup_steps": 2}, [0.5, 1, 1, 1]),
        (3, {}, [1, 1, 1]),
        # The decay begins at the peak and is over after the last update.
        (4, {"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        (5, {"schedule": "linear", "warmup_steps": 2}, [0.5, 1, 1, 2 / 3, 1 / 3]),
        (5, {"schedule": "cosine", "warmup_steps": 1}, [1, 1, 0.8535534, 0.5, 0.1464466]),
        (2, {"schedule": "cosine", "warmup_steps": 2}, [0.5, 1]),
    ],
)
def test_the_rate_of_every_update(updates, fields, expected):
    np.testing.assert_allclose(rates(updates, **fields), expected, atol=1e-5)
