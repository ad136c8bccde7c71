"""What is said of parts that are allowed and have nothing to do."""

import dataclasses

import pytest

from nested_reft.layer_skip import NestingConfig
from nested_reft.losses import presets
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.supervised import SupervisedConfig
from nested_reft.mix_control import MixControlConfig
from nested_reft.training.idle_parts import idle_parts
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import prepare
from tests.training.runs import nano

TOKEN = PolicyGradientConfig("leave_one_out", "base", "token", "token_mean")
MASKED = dataclasses.replace(TOKEN, reject_by="token_ratio", reject_above=3.0)
MIXED = dataclasses.replace(TOKEN, bias_mitigation="interpolated")
ONE = dataclasses.replace(TOKEN, bias_mitigation="one", clip_policies="three", advantage="weighted_leave_one_out")
PRACTICAL = dataclasses.replace(
    TOKEN, bias_mitigation="practical", truncate_at=2.0, advantage="weighted_leave_one_out", self_normalized=True
)
FULL = {"nesting": NestingConfig(skip_ratio=0.0)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": presets.dapo("base")}, ["their ratio is 1: loss.clip_low and loss.clip_high change nothing"]),
        ({"loss": presets.dapo("practical")}, ["loss.clip_low and loss.clip_high change nothing"]),
        ({"loss": PRACTICAL}, ["loss.truncate_at and loss.self_normalized and loss.advantage change nothing"]),
        ({"loss": ONE}, ["is 1: loss.advantage change nothing"]),
        ({"loss": MASKED} | FULL, ["no sample is old, so all ratios are 1: loss.reject_by change nothing"]),
        ({"loss": dataclasses.replace(TOKEN, obrs_lambda=1.0)} | FULL, ["are 1: loss.obrs_lambda change nothing"]),
        ({"loss": MIXED, "mix_control": MixControlConfig(ess=0.5)} | FULL, ["mix_control.ess change nothing"]),
        # What moves, rounds, nests or is old gives them work.
        ({"loss": presets.dapo("base"), "train__updates_per_batch": 2}, []),
        ({"loss": presets.dapo("base", clip_policies="two")}, []),
        ({"loss": dataclasses.replace(ONE, reject_by="token_ratio", reject_above=3.0)}, []),
        ({"loss": MASKED}, []),
        ({"loss": MASKED, "train__updates_per_batch": 2} | FULL, []),
        ({"loss": MASKED, "rollout__weights": "int8"} | FULL, []),
        ({"loss": MASKED, "search": SearchConfig(skip_ratios=(0.0, 0.4))} | FULL, []),
        ({"loss": MASKED, "search": SearchConfig(sync_every=2)} | FULL, []),
        ({"loss": SupervisedConfig()}, []),
    ],
)
def test_idle_parts(changes, expected):
    found = idle_parts(nano(**changes))
    assert len(found) == len(expected) and all(
        words in sentence for words, sentence in zip(expected, found, strict=True)
    )


def test_a_run_says_what_has_nothing_to_do(caplog):
    prepare(nano(loss=presets.dapo("base")))
    assert "loss.clip_low and loss.clip_high change nothing" in caplog.text
