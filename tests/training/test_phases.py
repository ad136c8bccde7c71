"""The phases before reinforcement: warm start and division of the sources."""

import jax
import numpy as np
import pytest

from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.sources import difficulty_ladder, exactly
from nested_reft.data.splits import SplitConfig
from nested_reft.models.lora import LoraConfig
from nested_reft.run_directory import read_log
from nested_reft.training.learner import Learner, LearnerBatch
from nested_reft.training.phases import first_checkpoint, last_checkpoint, warm_started
from nested_reft.training.setup import prepare
from nested_reft.training.split import divided
from nested_reft.training.warm_start import WarmStartConfig, demonstrations, dropout_plan, warm_start_task
from tests.training.runs import assert_equal_arrays, nano, trainer

WARM = {"warm_start__steps": 3, "warm_start__batch_size": 8, "warm_start__learning_rate": 0.01}


def answer_logprob(policy, examples) -> float:
    """Mean log-probability of the answers' tokens."""
    found = policy.score([e.text for e in examples], [e.example.answer for e in examples], chat=False)
    return float(np.concatenate(found).mean())


def parameters(policy) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in policy.model.parameters().items()}


def test_a_warm_start_teaches_the_answers():
    setup = prepare(nano(**WARM | {"warm_start__steps": 20}))
    before = parameters(setup.policy)
    policy = warm_started(setup)
    examples = setup.data.train_examples[0]
    assert answer_logprob(policy, examples) > answer_logprob(setup.policy, examples) + 0.3
    # The setup stays as it was, and the new policy is the beginning of whatever starts from it.
    assert_equal_arrays(before, parameters(setup.policy))
    assert policy.version == 0


def test_all_plans_of_layer_dropout_share_a_program():
    config = WarmStartConfig(steps=1, layer_dropout=0.5)
    plans = [dropout_plan(jax.random.key(step), config, 6) for step in range(20)]
    assert {len(plan.left_out(6)) for plan in plans} == {0, 1, 2, 3} and len({plan.shape for plan in plans}) == 1


def test_a_warm_start_in_micro_batches_is_the_same():
    """Sums of the parts are divided once, whatever the lengths of the answers in each part."""
    updates, found = [], []
    for count in (1, 4):
        setup = prepare(nano(**WARM, warm_start__micro_batches=count))
        config, data, learner = setup.config, setup.data, Learner(setup.policy)
        learner.begin(warm_start_task(config.warm_start, 8, "none", data.shared_prefix))
        prompts = batch_prompts(list(data.train_examples[0][:8]), [0] * 8, data.prompt_size)
        batch = demonstrations(prompts, prompts.answers, setup.policy.tokenizer, 8)
        assert len(set(np.array(batch.length_BG[:, 0]))) > 1  # otherwise a mean of means would be right too
        updates.append(learner.update(LearnerBatch(batch)))
        found.append(np.concatenate([value.ravel() for value in parameters(learner.policy()).values()]))
    whole, parts = updates
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    np.testing.assert_allclose(parts.weight_BGC, whole.weight_BGC)
    # Adam divides a gradient by its size: where it is rounding and nothing else, so is the step's direction.
    assert np.quantile(np.abs(found[1] - found[0]), 0.999) < 1e-5


def test_a_warm_start_trains_adapters_alone():
    setup = prepare(nano(**WARM, lora=LoraConfig(rank=2)))
    policy = warm_started(setup)
    assert_equal_arrays(parameters(setup.policy), parameters(policy))
    assert np.abs(policy.model.layers.down_lora_out[...]).max() > 0  # pyright: ignore[reportAttributeAccessIssue]
    examples = setup.data.train_examples[0]
    assert answer_logprob(policy, examples) > answer_logprob(setup.policy, examples)


def test_reinforcement_begins_where_the_warm_start_ends(tmp_path):
    """With a rate too small to move anything, the run's policy is that of `warm_started`, bit for bit."""
    config = nano(**WARM, train__steps=1, optimizer__learning_rate=1e-30, evaluation__samples_per_prompt=0)
    setup = prepare(config)
    run = trainer(config, tmp_path)
    run.run()
    assert_equal_arrays(parameters(warm_started(setup)), parameters(run.state.learner.policy()))
    # Two phases' numbers: 0 to 3 of the warm start, 4 and 5 of reinforcement.
    assert first_checkpoint(run.phases, 1) == 4 and last_checkpoint(config) == 5
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [0, 1]
    # The optimizer began anew: one update, not four.
    assert run.state.learner.version == 1


def test_pass_rates_of_the_starting_policy_divide_the_sources(tmp_path, monkeypatch):
    """Every second question always right: two parts, the easy one first, named by their pass rates."""
    seen = []

    def half_right(policy, examples, *rest, decoded):
        seen.append(parameters(policy))
        return np.arange(len(examples)) % 2 * rest[-1], 0

    monkeypatch.setattr("nested_reft.training.split.num_correct", half_right)
    config = nano(**WARM, data__split=SplitConfig("pass_rate", parts=4, samples=8), train__steps=1)
    warmed, run = warm_started(prepare(config)), trainer(config, tmp_path)
    undivided = run.state.data
    run.run()
    (measured,) = seen  # the policy after its warm start, once
    assert_equal_arrays(measured, parameters(warmed))
    easy, hard = "three_to_six_digits.pass_1.00-1.00", "three_to_six_digits.pass_0.00-0.00"
    assert run.state.data.source_names == (easy, hard) and run.state.data.heldout_of_source == (0, 0)
    whole = undivided.train_examples[0]
    assert run.state.data.train_examples == (whole[1::2], whole[::2])
    assert run.state.data.heldout_examples == undivided.heldout_examples
    assert run.state.division is not None
    ((first, second),) = run.state.division
    assert first == {"name": easy, "examples": list(range(1, 20, 2)), "pass_rate": 1.0}
    assert second["examples"] == list(range(0, 20, 2))
    assert first_checkpoint(run.phases, 2) == (3 + 1) + (1 + 1) and last_checkpoint(config) == 7


def test_measured_pass_rates_keep_every_example_and_the_names_of_the_held_out_ones(tmp_path):
    config = nano(
        data__split=SplitConfig("pass_rate", parts=2, samples=2),
        train__steps=1,
        evaluation__every_steps=1,
        evaluation__samples_per_prompt=0,
    )
    run = trainer(config, tmp_path)
    run.run()
    assert sum(len(examples) for examples in run.state.data.train_examples) == 20
    assert len(run.state.data.source_names) == len(run.state.data.train_examples) == len(run.state.curriculum.sources)
    lines = read_log(tmp_path / "metrics.jsonl")
    assert all("heldout/three_to_six_digits" in line for line in lines)


def test_parts_of_sources_come_the_easiest_first_whatever_their_source():
    levels = {"a": exactly(terms=1, digits=1), "b": exactly(terms=2, digits=1)}
    config = nano(data__sources=difficulty_ladder("chain_sum", levels, 20, 4, 1))
    data = prepare(config).data
    division = [
        [
            {"name": f"{name}{i}", "examples": list(range(i, len(examples), 2)), "pass_rate": rate}
            for i, rate in enumerate(rates)
        ]
        for name, examples, rates in zip("ab", data.train_examples, ((0.9, 0.1), (0.5, 0.0)), strict=True)
    ]
    found = divided(data, division)
    assert found.source_names == ("a0", "b0", "a1", "b1")
    assert found.heldout_of_source == (0, 1, 0, 1)
    assert found.train_examples[1] == data.train_examples[1][::2]
    with pytest.raises(ValueError, match=r"divides sources of \[\d+, \d+\] examples; this run has others"):
        divided(found, division)
