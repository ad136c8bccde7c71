"""Which parts of a configuration go together: every rule refuses with fields, values and what is allowed."""

import dataclasses
from typing import Any

import pytest

from nested_reft.api import open_trainer
from nested_reft.bridging import BridgeConfig
from nested_reft.config_files import shipped_configs
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.splits import SplitConfig
from nested_reft.dataset_reset import ResetConfig
from nested_reft.evaluation import EvaluationConfig
from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.supervised import SftConfig, SupervisedConfig
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.mix_control import MixControlConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.nesting_control import NestingControlConfig
from nested_reft.replay import DynamicSamplingConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rewards.reward import RewardConfig
from nested_reft.rollout.config import RolloutConfig
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.sharding import MeshConfig
from nested_reft.training.compatibility import RULES, START_RULES, check_start
from nested_reft.training.config import load_config
from nested_reft.training.search_config import SearchConfig
from tests.training.runs import MOVING, nano

MIXTURE = PolicyGradientConfig("leave_one_out", "mixture", "sequence", "fixed_length", 8)
UNBIASED = PolicyGradientConfig("leave_one_out", "base", "sequence", "fixed_length", 8)
BASE = dataclasses.replace(UNBIASED, level="token", clip_low=0.2)
REPLAY = ReplayConfig(capacity=64, recent_share=0.5)
BALANCE = TrajectoryBalanceConfig(beta=0.1)
MIXED = dataclasses.replace(UNBIASED, bias_mitigation="interpolated")
RETRACE = dataclasses.replace(UNBIASED, bias_mitigation="retrace", level="token")
PRACTICAL = dataclasses.replace(BASE, bias_mitigation="practical")
ONE = dataclasses.replace(UNBIASED, bias_mitigation="one", level="token")
TRUNCATED = SamplingConfig(top_k=3), SamplingConfig(top_p=0.9)
CONTROL = NestingControlConfig("ess_token", budget=0.5, max_skipped=2)
MEASURED = NestingConfig(skip_ratio=0.2, choice="measured", remeasure_every=2, divergence_temperature=0.0)
FROM_FILE = NestingConfig(skip_ratio=0.2, bridge=BridgeConfig("per_layer", file="b"))
EXACT = RolloutConfig(group_size=4, max_completion_tokens=8, mode="exact")
STATIC = CurriculumConfig("static", weights=(1.0,))
MASKED = dataclasses.replace(UNBIASED, reject_by="sequence_ratio", reject_above=3.0)
BUDGETED = dataclasses.replace(UNBIASED, obrs_lambda=1.0)
HELD = {"loss": MIXED, "mix_control": MixControlConfig(ess=0.9)}
NO_NESTING = NestingConfig(skip_ratio=0.0)


def replaced(nesting: NestingConfig, **changes: Any) -> NestingConfig:
    """The same with other bridges."""
    return dataclasses.replace(nesting, bridge=dataclasses.replace(nesting.bridge, **changes))


def with_kl_target(loss: PolicyGradientConfig) -> PolicyGradientConfig:
    """The same with a coefficient that a divergence decides."""
    assert loss.critic is not None
    return dataclasses.replace(loss, critic=dataclasses.replace(loss.critic, kl_target=0.5))


# Of each rule: what it refuses, and the message.
REFUSED = {
    "offline_objectives_sample_nothing": [
        (
            {"loss": SftConfig(), "reset": ResetConfig(share=0.5)},
            r"loss.kind is 'sft', which samples nothing, and reset",
        ),
    ],
    "name_is_a_directory_name": [
        ({"name": "a/b"}, r"name is 'a/b'; allowed are letters, digits, '_', '.' and '-'"),
        ({"name": ""}, r"name is ''; allowed are letters"),
        ({"name": ".hidden"}, r"name is '.hidden'; allowed are letters"),
    ],
    "mini_batches_divide_prompts": [
        (
            {"train__updates_per_batch": 3, "train__mini_batches": 3},
            r"train.mini_batches is 3; it must divide data.prompts_per_batch, which is 4",
        ),
    ],
    "micro_batches_divide_prompts": [
        (
            {"train__micro_batches": 3},
            r"train.micro_batches is 3; it must divide data.prompts_per_batch / train.mini_batches, which is 4",
        ),
        (
            {"train__micro_batches": 4, "train__updates_per_batch": 2, "train__mini_batches": 2},
            r"train.micro_batches is 4; it must divide data.prompts_per_batch / train.mini_batches, which is 2",
        ),
    ],
    "mesh_divides_batches": [
        (
            {"mesh": MeshConfig(data=2, fsdp=3)},
            r"mesh.data x mesh.fsdp is 6; it must divide the prompts of a micro-batch, 4: allowed are 1, 2, 4",
        ),
        (
            {"mesh": MeshConfig(data=3)},
            r"mesh.data is 3; it must divide the prompts of a micro-batch, 4: allowed are 1, 2, 4",
        ),
        (
            {"mesh": MeshConfig(data=4), "train__micro_batches": 2},
            r"mesh.data is 4; it must divide the prompts of a micro-batch, 2",
        ),
        (
            {"mesh": MeshConfig(data=4), "warm_start__steps": 1, "warm_start__batch_size": 6},
            r"mesh.data is 4; it must divide warm_start.batch_size / warm_start.micro_batches, 6",
        ),
    ],
    "overlong_cache_fits_completions": [
        (
            {"reward": RewardConfig(overlong_cache_tokens=9)},
            r"reward.overlong_cache_tokens is 9; allowed is 0 to rollout.max_completion_tokens, which is 8",
        ),
    ],
    "mixture_weights_need_a_mixture": [
        (
            {"loss": MIXTURE},
            r"loss.bias_mitigation is 'mixture' and rollout.mixture_alpha None: .* set rollout.mixture_alpha",
        ),
    ],
    "exact_rollouts_need_no_control": [
        (
            {"rollout": EXACT, "nesting_control": CONTROL},
            r"rollout.mode is 'exact' and nesting_control.hold 'ess_token'; .* use mode 'nested'",
        ),
    ],
    "bridge_files_are_of_the_start": [
        (
            {"nesting": FROM_FILE, "warm_start__steps": 3},
            r"nesting.bridge.file is 'b' and warm_start.steps 3: .* or set warm_start.steps 0",
        ),
        (  # the first steps would nest with them, even where they are fitted again later
            {"nesting": replaced(FROM_FILE, refit_every=2), "warm_start__steps": 3},
            r"nesting.bridge.file is 'b' and warm_start.steps 3: .* Leave the file out",
        ),
    ],
    "remeasuring_fits_the_batch": [
        (
            {"nesting": dataclasses.replace(MEASURED, remeasure_completions=5)},
            r"nesting.remeasure_completions is 5; allowed is 1 to rollout.group_size, which is 4",
        ),
        (
            {"nesting": dataclasses.replace(MEASURED, remeasure_prompts=5)},
            r"nesting.remeasure_prompts is 5; allowed is 1 to data.prompts_per_batch, which is 4",
        ),
    ],
    "baseline_needs_a_group": [
        (
            {"rollout__group_size": 1, "loss": MOVING},
            r"loss.advantage is 'leave_one_out' and rollout.group_size 1: .* or use advantage 'no_baseline'",
        ),
        (
            {"rollout__group_size": 1, "loss": BALANCE},
            r"loss.kind is 'trajectory_balance' and rollout.group_size 1: .*\(K = 1\).* Set group_size 2 or more",
        ),
    ],
    "one_normaliser_needs_one_start": [
        (
            {"reset": ResetConfig(share=0.5, references="answers", per="completion"), "loss": BALANCE},
            r"reset.per is 'completion', with loss.kind 'trajectory_balance': .* Set reset.per 'group'",
        ),
    ],
    "own_references_need_a_store": [
        (
            {"reset": ResetConfig(share=0.5, references="replay")},
            r"reset.references is 'replay' and replay.capacity 0: .* Set replay.capacity, or reset.references 'given'",
        ),
    ],
    "replay_needs_weights_for_old_completions": [
        (
            {"replay": REPLAY, "loss": PRACTICAL},
            r"replay.capacity is 64 and loss.bias_mitigation 'practical', which takes the present policy for the one",
        ),
        (
            {"replay": REPLAY, "loss": MIXTURE, "rollout__mixture_alpha": 0.5},
            r"replay.capacity is 64 and loss.bias_mitigation 'mixture', .* loss.kind 'trajectory_balance'",
        ),
    ],
    "replay_holds_a_batch": [
        (
            {"replay": dataclasses.replace(REPLAY, capacity=15)},
            r"replay.capacity is 15; allowed is 0 \(off\) or at least .* rollout.group_size, which are 16",
        ),
        (
            {"replay": dataclasses.replace(REPLAY, maximum_tokens=8)},
            r"replay.maximum_tokens is 8, which no completion exceeds; .* rollout.max_completion_tokens, which is 8",
        ),
    ],
    "staleness_limit_lets_new_batches_in": [
        (
            {"replay": dataclasses.replace(REPLAY, max_staleness=2), "loss": BALANCE, "search": SearchConfig(lag=3)},
            r"replay.max_staleness is 2, but with search.lag 3, .* up to 3 versions old .*; allowed is 3 or more",
        ),
        (
            {"replay": dataclasses.replace(REPLAY, max_staleness=5), "loss": BALANCE, "train__updates_per_batch": 2}
            | {"search": SearchConfig(lag=1, sync_every=3)},
            r"replay.max_staleness is 5, but .* and train.updates_per_batch 2 new batches are up to 6 versions old",
        ),
    ],
    "safety_needs_a_store": [
        (
            {"reward": RewardConfig(safety="mine:is_safe")},
            r"reward.safety is 'mine:is_safe' and replay.capacity 0: it judges what is kept for replay",
        ),
    ],
    "replay_chooses_alone": [
        (
            {"replay": REPLAY, "dynamic_sampling": DynamicSamplingConfig(3)},
            r"replay.capacity is 64 and dynamic_sampling.max_generation_batches 3: both decide what is trained on",
        ),
    ],
    "dynamic_sampling_needs_a_group": [
        (
            {
                "rollout__group_size": 1,
                "loss": dataclasses.replace(MOVING, advantage="no_baseline"),
                "dynamic_sampling": DynamicSamplingConfig(max_generation_batches=2),
            },
            r"dynamic_sampling.max_generation_batches is 2 and rollout.group_size 1: no group of one",
        ),
    ],
    "mix_has_one_source": [
        (
            {"loss": MIXED},
            r"mix_share is None and mix_control.ess None; bias_mitigation 'interpolated' needs one of them",
        ),
        (
            {"loss": dataclasses.replace(MIXED, mix_share=0.5), "mix_control": MixControlConfig(ess=0.9)},
            r"mix_share is 0.5 and mix_control.ess 0.9; .* needs one of them",
        ),
        (
            {"loss": UNBIASED, "mix_control": MixControlConfig(ess=0.9)},
            r"mix_control.ess is 0.9, but only loss.bias_mitigation 'interpolated' has a share to choose",
        ),
    ],
    "ratios_need_full_support": [
        (
            {"loss": loss, "rollout__sampling": sampling, "rollout__mixture_alpha": 0.5},
            r"rollout.sampling truncates \(top_k \d, top_p [\d.]+\), but loss.bias_mitigation '"
            + loss.bias_mitigation
            + "' compares .* Set top_k 0 and top_p 1, or use",
        )
        for loss in (UNBIASED, MIXTURE, BASE, RETRACE)
        for sampling in TRUNCATED
    ]
    + [
        (
            {"loss": dataclasses.replace(ONE, reject_by="geometric_mean", reject_above=1.2)}
            | {"rollout__sampling": sampling},
            r"rollout.sampling truncates .*, but loss.reject_by is 'geometric_mean': .* or use no reject_by",
        )
        for sampling in TRUNCATED
    ]
    + [
        (
            {"loss": PRACTICAL, "rollout__sampling": sampling, "nesting_control": CONTROL},
            r"rollout.sampling truncates .*, but nesting_control.hold is 'ess_token': .* use no nesting_control",
        )
        for sampling in TRUNCATED
    ]
    + [
        (
            {"loss": with_kl_target(presets.ppo("practical")), "rollout__sampling": sampling},
            r"rollout.sampling truncates .*, but loss.critic.kl_target is 0.5: .* or leave kl_target out",
        )
        for sampling in TRUNCATED
    ],
    "limits_can_act_on_a_mixture": [
        (
            {"loss": dataclasses.replace(MIXTURE, **limit), "rollout__mixture_alpha": alpha},
            rf"loss.{next(iter(limit))} is .*, but .* with rollout.mixture_alpha {alpha} has weights of at most",
        )
        for limit, alpha in (
            ({"clip_high": 3.0}, 0.5),
            ({"clip_high": 1.0}, 0.5),
            ({"dual_clip": 2.5}, 0.5),
            ({"truncate_at": 4.0}, 0.3),
            ({"truncate_at": 4.0, "clip_policies": "three"}, 0.3),
        )
    ],
    "exact_rollouts_leave_nothing_to_reject": [
        ({"rollout": EXACT, "loss": MASKED}, r"rollout.mode is 'exact' and loss.reject_by is set; .* are 1 and it has"),
        ({"rollout": EXACT, "loss": BUDGETED}, r"rollout.mode is 'exact' and loss.obrs_lambda is set"),
        ({"rollout": EXACT} | HELD, r"rollout.mode is 'exact' and mix_control.ess is set"),
        (
            {
                "rollout": EXACT,
                "loss": dataclasses.replace(MASKED, clip_policies="three"),
                "train__updates_per_batch": 2,
            },
            r"rollout.mode is 'exact' and loss.reject_by is set",
        ),
    ],
    "static_weights_name_every_source": [
        (
            {"curriculum": CurriculumConfig("static", weights=(1.0, 2.0))},
            r"curriculum.weights has 2 weights; allowed is one for each of the 1 sources three_to_six_digits",
        ),
    ],
    "static_weights_need_undivided_sources": [
        (
            {"curriculum": STATIC, "data__split": SplitConfig("pass_rate")},
            r"curriculum.kind is 'static' and data.split.kind 'pass_rate'; .* use another kind, or 'none'",
        ),
    ],
    "stale_groups_need_their_own_weight": [
        (
            {"loss": PRACTICAL, "search": SearchConfig(lag=1)},
            r"loss.bias_mitigation is 'practical', with search.lag 1 and search.sync_every 1: its weight needs groups"
            r" of the present policy. Use 'base' or 'retrace'",
        ),
        (
            {"loss": MIXTURE, "rollout__mixture_alpha": 0.5, "search": SearchConfig(sync_every=2)},
            r"loss.bias_mitigation is 'mixture', with search.lag 0 and search.sync_every 2",
        ),
    ],
    "mixed_temperatures_need_the_densities_that_drew": [
        (
            {"loss": PRACTICAL, "search": SearchConfig(temperatures=(1.0, 0.5))},
            r"search.temperatures is \(1.0, 0.5\), but loss.bias_mitigation is 'practical', which knows",
        ),
        (
            {"rollout": EXACT, "search": SearchConfig(temperatures=(0.5,))},
            r"search.temperatures is \(0.5,\), but rollout.mode is 'exact'",
        ),
    ],
    "right_references_need_a_verifier": [
        (
            {"reset": ResetConfig(share=0.5, only_right=True), "reward": RewardConfig(checker="model", model=("m",))},
            r"reset.only_right is True, but the answers of source '\w+' have the checker 'model'",
        ),
    ],
    "depths_take_turns_alone": [
        (
            {"search": SearchConfig(skip_ratios=(0.0, 0.2))} | changes,
            r"search.skip_ratios is \(0.0, 0.2\), with nesting.choice .*: allowed is a choice that draws layers",
        )
        for changes in (
            {"nesting": NestingConfig(choice="fixed", layers=(2,))},
            {"nesting": NestingConfig(skip_ratio=0.2, bridge=BridgeConfig("per_layer"))},
            {"nesting_control": CONTROL},
        )
    ],
    "bfloat16_weights_need_adapters": [
        (
            {"model__dtype": "bfloat16"},
            r"model.dtype is 'bfloat16' and lora.rank 0: .* or set model.dtype float32",
        ),
    ],
}


def test_every_rule_is_tested():
    assert set(REFUSED) == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    ("rule", "changes", "message"), [(rule, *case) for rule, cases in REFUSED.items() for case in cases]
)
def test_what_does_not_go_together_is_refused(rule, changes, message):
    """Making the configuration asks every rule."""
    with pytest.raises(ValueError, match=message):
        nano(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "tiny-2.b_c"},
        {"train__micro_batches": 4, "mesh": MeshConfig(data=1)},
        {"mesh": MeshConfig(data=4), "warm_start__steps": 0, "warm_start__batch_size": 6},
        {"reward": RewardConfig(overlong_cache_tokens=8)},
        {"loss": MIXTURE, "rollout__mixture_alpha": 0.5},
        {"rollout__mixture_alpha": 0.5},  # completions of a mixture under another weight
        {"nesting": dataclasses.replace(MEASURED, remeasure_completions=4, remeasure_prompts=4)},
        {"rollout__group_size": 1, "loss": dataclasses.replace(MOVING, advantage="no_baseline")},
        {"rollout__group_size": 1, "loss": SupervisedConfig()},  # it has no baseline
        *(
            {"loss": loss, "rollout__sampling": sampling}
            # No weight of theirs reads the behavior policy.
            for loss in (SupervisedConfig(), PRACTICAL, ONE, BALANCE)
            for sampling in TRUNCATED
        ),
        {"loss": UNBIASED},
        {"loss": presets.ppo("practical"), "rollout__sampling": TRUNCATED[0]},
        {"loss": dataclasses.replace(MIXTURE, clip_high=0.5), "rollout__mixture_alpha": 0.5},
        {"loss": dataclasses.replace(MIXTURE, truncate_at=1.9), "rollout__mixture_alpha": 0.5},
        # The target moves away from the policy that the mixture was of.
        {
            "loss": dataclasses.replace(MIXTURE, truncate_at=4.0),
            "rollout__mixture_alpha": 0.5,
            "train__updates_per_batch": 2,
        },
        # A comparison may switch nesting off; see `test_idle_parts`. Old samples, passes and rounding have ratios.
        {"nesting": NO_NESTING, "loss": MASKED},
        {"rollout": EXACT, "loss": MASKED, "train__updates_per_batch": 2},
        {"rollout": EXACT, "loss": BUDGETED, "search": SearchConfig(lag=1)},
        {"rollout": EXACT, "loss": MASKED, "train__compute_dtype": "bfloat16"},
        {"nesting": FROM_FILE},
        {"reset": ResetConfig(share=0.0, references="replay")},
        {"reset": ResetConfig(share=0.5, references="replay"), "replay": REPLAY, "loss": BALANCE},
        *({"replay": REPLAY, "loss": loss} for loss in (BALANCE, UNBIASED, RETRACE, ONE, SupervisedConfig())),
        {"replay": REPLAY, "loss": BALANCE, "rollout__mixture_alpha": 0.5},
        {"replay": REPLAY, "loss": BALANCE, "rollout": EXACT},
        {"replay": REPLAY, "loss": BALANCE, "nesting_control": CONTROL},  # searchers measure depth alone
        {"replay": dataclasses.replace(REPLAY, max_staleness=3), "loss": BALANCE, "search": SearchConfig(lag=3)},
        {"replay": dataclasses.replace(REPLAY, max_staleness=0), "loss": BALANCE, "train__updates_per_batch": 2},
        {"reset": ResetConfig(share=0.5, references="answers"), "loss": BALANCE},
        {"reset": ResetConfig(share=0.5, only_right=True), "reward": RewardConfig(model=("m",))},
        {"reset": ResetConfig(only_right=True), "reward": RewardConfig(checker="model", model=("m",))},  # no resets
        {"curriculum": STATIC},
        {"model__dtype": "bfloat16", "lora": LoraConfig(rank=1)},
        {"lora": LoraConfig(rank=1), "warm_start__steps": 5},  # the warm start trains the adapters
    ],
    ids=str,
)
def test_what_goes_together_is_not_refused(changes):
    assert nano(**changes) != nano()  # no rule raised, and the change is there


BRIDGED = NestingConfig(skip_ratio=0.2, bridge=BridgeConfig("per_layer", tokens=512))
NONE_LEFT_OUT = r"but no layer is left out, since nesting\.skip_ratio is 0 and there is no nesting_control"
# Of each rule for runs that begin: what it refuses, and the message. `nano` samples at most 128 tokens in a step.
REFUSED_AT_START = {
    "bridges_can_be_fitted": [
        (
            {"nesting": BRIDGED, "train__steps": 3},
            r"nesting.bridge.tokens is 512, and train.steps 3: the run samples at most 384 completion tokens",
        ),
        ({"nesting": replaced(BRIDGED, tokens=10**8)}, r"tokens is 100000000, and train.steps 4: .* at most 512"),
        (  # the refits would never come
            {"nesting": replaced(BRIDGED, tokens=513, file="b", refit_every=2)},
            r"tokens is 513, and train.steps 4: .* at most 512",
        ),
    ],
    "rows_leave_some_waiting": [
        (  # 4 prompts and groups of 4
            {"rollout__rows": 16},
            r"rollout.rows is 16, .* make 16 completions, so none would wait; allowed are 1 to 15, or 0",
        ),
        (
            {"evaluation": EvaluationConfig(batch_size=8, samples_per_prompt=4, rows=32)},
            r"evaluation.rows is 32, .*batch_size \(8\) prompts has 32 completions at most, .* 1 to 31, or 0",
        ),
    ],
    "settings_of_nesting_are_read": [
        (
            {"nesting": dataclasses.replace(BRIDGED, skip_ratio=0.0)},
            rf"nesting.bridge.kind is 'per_layer' \(allowed is 'off'\), {NONE_LEFT_OUT}",
        ),
        (
            {"nesting": NestingConfig(leave_out="mlp")},
            rf"nesting.leave_out is 'mlp' \(allowed is 'layer'\), {NONE_LEFT_OUT}",
        ),
        (
            {"nesting": NestingConfig(skip_ratio=0.2, divergence_file="x.json")},
            r"nesting.divergence_file is 'x.json' \(allowed is None\), but nesting.choice is 'uniform', and only",
        ),
        (
            {"nesting": NestingConfig(skip_ratio=0.2, remeasure_prompts=2, remeasure_completions=1)},
            r"remeasure_prompts is 2 \(allowed is 4\), nesting.remeasure_completions is 1 .*, but the run measures no",
        ),
        (
            {"nesting": replaced(BRIDGED, distil_learning_rate=0.1)},
            r"distil_learning_rate is 0.1 \(allowed is 0.0003\), but nesting.bridge.distil_steps is 0",
        ),
        (
            {"nesting_control": NestingControlConfig(patience=3, margin=0.5)},
            r"patience is 3 \(allowed is 5\), nesting_control.margin is 0.5 .*, but nesting_control.hold is None",
        ),
        (
            {"nesting_control": NestingControlConfig("ess_token", budget=0.5, max_skipped=0)},
            r"nesting_control.max_skipped is 0 and nesting_control.hold 'ess_token': there is nothing to control",
        ),
        (
            {"rollout__draft_length": 3},
            r"draft_length is 3 \(allowed is 2\), but rollout.mode is 'nested', which drafts",
        ),
        (
            {"loss": SftConfig(), "nesting": BRIDGED},
            r"nesting.bridge.kind is 'per_layer' \(allowed is 'off'\), but loss.kind is 'sft', which samples nothing",
        ),
        (
            {"loss": SftConfig(), "nesting": NestingConfig(skip_ratio=0.3)},
            r"nesting.skip_ratio is 0.3 \(allowed is 0.0\), but loss.kind is 'sft'",
        ),
    ],
}


def test_every_rule_for_a_start_is_tested():
    assert set(REFUSED_AT_START) == {rule.__name__ for rule in START_RULES}


@pytest.mark.parametrize(
    ("rule", "changes", "message"), [(rule, *case) for rule, cases in REFUSED_AT_START.items() for case in cases]
)
def test_what_a_new_run_would_not_do_is_refused(rule, changes, message, tmp_path):
    """A configuration can be made of it, so that runs of earlier versions can be read; no run begins with it."""
    config = nano(**changes)
    with pytest.raises(ValueError, match=message):
        check_start(config)
    with pytest.raises(ValueError, match=message):
        open_trainer(config, str(tmp_path / "runs"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"nesting": BRIDGED},
        {"nesting": replaced(BRIDGED, tokens=10**8, file="b")},  # nothing waits for tokens
        {
            "nesting": replaced(BRIDGED, tokens=1024),
            "dynamic_sampling": DynamicSamplingConfig(max_generation_batches=2),
        },
        {"nesting": dataclasses.replace(BRIDGED, skip_ratio=0.0), "nesting_control": CONTROL},
        {"nesting": NestingConfig(choice="fixed", layers=(2,), leave_out="attention")},
        {"nesting": NestingConfig(leave_out="mlp"), "search": SearchConfig(skip_ratios=(0.0, 0.2))},
        # The full model of a configuration that measures.
        {"nesting": NestingConfig(choice="measured", divergence_file="x.json")},
        {"nesting": dataclasses.replace(MEASURED, remeasure_prompts=2)},
        {"nesting": replaced(BRIDGED, distil_steps=2, distil_learning_rate=0.1)},
        {"rollout": dataclasses.replace(EXACT, draft_length=3)},
        {"loss": SftConfig(), "nesting": NestingConfig()},
    ],
)
def test_what_is_read_is_not_refused(changes):
    check_start(nano(**changes))


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_can_begin(name):
    check_start(load_config(name))
