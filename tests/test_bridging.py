"""When bridges are fitted and on which texts, and what of their configuration is refused."""

import numpy as np
import pytest

from nested_reft import bridging
from nested_reft.bridging import BridgeConfig, BridgeState
from nested_reft.layer_plan import Part, PlanShape
from nested_reft.layer_skip import NestingConfig, draw_plan, nested_shape
from tests.scored_groups import scored

# A batch of two groups of two holds 2 * 2 * 4 = 16 tokens.
BATCH = scored([[0, 1], [1, 1]]).rollouts


def test_the_first_fit_waits_for_its_tokens():
    config, state = BridgeConfig("per_layer", tokens=40), BridgeState()
    due = []
    for step in range(4):
        state = bridging.add(state, config, [BATCH])
        due.append(bridging.is_due(state, config, step))
    assert due == [False, False, True, True]  # 16, 32, 48 tokens
    state = bridging.fitted(state, config, 2)
    assert state.fits == 1 and not state.texts  # no later fit will read them
    assert not bridging.is_due(bridging.add(state, config, [BATCH] * 9), config, 9)


def test_the_latest_texts_are_kept_for_refits():
    config, state = BridgeConfig("per_layer", tokens=30, refit_every=2), BridgeState()
    due = []
    for step in range(7):
        state = bridging.add(state, config, [scored([[0, 1], [1, 1]], first=step).rollouts])
        due.append(bridging.is_due(state, config, step))
        if due[-1]:
            state = bridging.fitted(state, config, step)
    assert due == [False, True, False, True, False, True, False]
    # Two batches hold 32 tokens, so the older ones are gone.
    assert [int(batch.prompt_BP[0, 0]) for batch in state.texts] == [5, 6]
    stored = BridgeState.from_plain(state.to_plain())
    assert stored.fits == state.fits and stored.fitted_at == state.fitted_at
    for batch, kept in zip(stored.texts, state.texts, strict=True):
        for array, expected in zip(batch, kept, strict=True):
            assert np.array_equal(array, expected)


def test_without_bridges_nothing_is_kept():
    state = bridging.add(BridgeState(), BridgeConfig(), [BATCH])
    assert state == BridgeState() and not bridging.is_due(state, BridgeConfig(), 0)


def test_a_run_of_neighbours_has_one_bridge(key):
    fixed = {"choice": "fixed", "layers": (1, 2, 3, 6)}
    part_L = draw_plan(key, NestingConfig(**fixed, bridge=BridgeConfig("per_run")), 8).host_parts(8)
    keep, bridge, skip = Part.KEEP, Part.BRIDGE, Part.SKIP
    assert part_L.tolist() == [keep, bridge, skip, skip, keep, keep, bridge, keep]
    part_L = draw_plan(key, NestingConfig(**fixed, bridge=BridgeConfig("per_layer")), 8).host_parts(8)
    assert part_L.tolist() == [keep, bridge, bridge, bridge, keep, keep, bridge, keep]


@pytest.mark.parametrize(
    ("nesting", "shape"),
    [
        (NestingConfig(skip_ratio=0.3), (7, 0, 0, 0)),
        (NestingConfig(skip_ratio=0.3, bridge=BridgeConfig("per_layer")), (7, 3, 0, 0)),
        (NestingConfig(skip_ratio=0.3, leave_out="attention"), (7, 0, 3, 0)),
        (NestingConfig(skip_ratio=0.3, leave_out="mlp"), (7, 0, 0, 3)),
        (NestingConfig(choice="fixed", layers=(2, 3, 6), bridge=BridgeConfig("per_run")), (7, 2, 0, 0)),
    ],
)
def test_a_configuration_has_plans_of_one_shape(nesting, shape, key):
    assert nested_shape(nesting, 10) == PlanShape(*shape) == draw_plan(key, nesting, 10).shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "nesting.bridge.rank is 0; allowed is 1 or more, or None"),
        ({"ridge": 0.0}, "nesting.bridge.ridge is 0.0; allowed is 1e-12 or more"),
        ({"ridge": 1e-300}, "nesting.bridge.ridge is 1e-300; allowed is 1e-12 or more"),
        ({"kind": "per_layer", "file": ""}, "nesting.bridge.file is ''; allowed is a file that"),
        ({"tokens": 0}, "nesting.bridge.tokens is 0; allowed is 1 or more"),
        ({"refit_every": -1}, r"nesting.bridge.refit_every is -1; allowed is 0 \(never\) or more"),
        ({"rank": 4}, r"nesting.bridge.rank is 4 \(allowed is None\), but nesting.bridge.kind is 'off', so nothing"),
        ({"ridge": 0.1}, r"ridge is 0.1 \(allowed is 0.01\), but nesting.bridge.kind is 'off'"),
        ({"tokens": 9}, r"tokens is 9 \(allowed is 8192\), but"),
        ({"refit_every": 3}, r"refit_every is 3 \(allowed is 0\), but"),
        ({"distil_steps": 3}, r"distil_steps is 3 \(allowed is 0\), but"),
        ({"distil_learning_rate": 0.1}, r"distil_learning_rate is 0.1 \(allowed is 0.0003\), but"),
        ({"file": "x"}, r"nesting.bridge.file is 'x' \(allowed is None\), but .* set kind to 'per_layer' or 'per_run'"),
        ({"rank": 4, "tokens": 9}, r"rank is 4 \(allowed is None\), nesting.bridge.tokens is 9"),
        ({"distil_learning_rate": float("nan")}, "nesting.bridge.distil_learning_rate is nan"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BridgeConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BridgeConfig("per_layer", tokens=127), "tokens is 127; a bridge of full rank needs 128 or more"),
        (BridgeConfig("per_layer", rank=8, tokens=15), "tokens is 15; a bridge of rank 8 needs 16 or more"),
        (BridgeConfig("per_layer", rank=64), "rank is 64; allowed is 1 to 63"),
    ],
)
def test_too_few_tokens_for_the_rank_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.validate_for(64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"leave_out": "mlp"}, "a bridge stands in for a whole layer"),
        ({"choice": "measured", "divergence_file": "x.json"}, "measured with their bridges after each fit"),
        ({"choice": "measured", "remeasure_every": 2}, "measured with their bridges after each fit"),
    ],
)
def test_settings_that_bridges_do_not_read_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NestingConfig(**fields, bridge=BridgeConfig("per_layer"))


def test_runs_must_be_known_beforehand():
    with pytest.raises(ValueError, match=r"nesting.bridge.kind is 'per_run' and nesting.choice 'uniform'"):
        NestingConfig(bridge=BridgeConfig("per_run"))
