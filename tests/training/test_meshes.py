"""A run is the same on one device and on several, however parameters, prompts and heads are split.

`scripts/layouts.py` runs the whole matrix, two processes among it.
"""

import functools
from typing import Any

import pytest

from nested_reft.sharding import MeshConfig
from tests.training.mesh_runs import ONE, SPREAD, STORED, VARIANTS, distances, taken_steps

steps_of = functools.cache(taken_steps)
CASES = [("nested", SPREAD, "spread"), *((variant, STORED, "stored") for variant in VARIANTS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mesh"), [pytest.param(variant, mesh, id=f"{variant}-{name}") for variant, mesh, name in CASES]
)
def test_eight_devices_train_as_one_does(variant: str, mesh: MeshConfig):
    one, many = steps_of(variant, ONE), steps_of(variant, mesh)
    assert one[-1]["metrics"]["gradient_norm"] > 0
    # Nothing has been carried on by then.
    norms = [steps[0]["metrics"]["gradient_norm"] for steps in (one, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert {name: distance for name, distance in distances(one, many).items() if distance > 1} == {}


def test_what_differs_is_found():
    """Whole numbers and tokens are equal or not; rounding of other numbers counts as a share of the tolerance."""

    def steps(**changes: Any) -> list[dict[str, Any]]:
        return [{"metrics": {"loss": 2.0, "count": 3, "kept": [1, 2], "none": float("nan")}, "tokens": [[1]]} | changes]

    assert set(distances(steps(), steps()).values()) == {0.0}
    other = steps()[0]["metrics"] | {"loss": 2.0 + 0.5 * (1e-5 + 2e-3), "kept": [1, 3]}
    far = distances(steps(), steps(metrics=other, tokens=[[2]]))
    assert far.pop("step 0, ['loss']") == pytest.approx(0.5)
    assert {name for name, distance in far.items() if distance} == {"step 0, tokens", "step 0, ['kept'][1]"}
    assert distances(steps(), steps(metrics=steps()[0]["metrics"] | {"none": 1.0}))["step 0, ['none']"] == float("inf")
