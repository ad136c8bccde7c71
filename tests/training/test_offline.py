"""Runs without rollouts: supervised fine-tuning, reward models and DPO."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.api import Run, is_complete, train
from nested_reft.curriculum import CurriculumConfig
from nested_reft.data.packing import packed_batch
from nested_reft.data.pipeline import batch_prompts
from nested_reft.data.written import pair, written_batch
from nested_reft.dataset_reset import ResetConfig
from nested_reft.losses.bradley_terry import PAIR_SIGNALS, BradleyTerryConfig
from nested_reft.losses.dpo import DpoConfig
from nested_reft.losses.objective import Objective
from nested_reft.losses.registry import make_objective
from nested_reft.models.lora import LoraConfig
from nested_reft.replay_store import ReplayConfig
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.training.config import Config, load_config
from nested_reft.training.learner import Learner, LearnerBatch
from nested_reft.training.offline import as_offline, offline_task
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from tests.training.preference_runs import preferences, write_pairs
from tests.training.runs import assert_equal_arrays, trainer

KINDS = ("sft", "bradley_terry", "dpo")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def finished(config: Config, path) -> tuple[Trainer, dict]:
    run = Trainer(prepare(config), RunDirectory.create(path, config.name, config.to_json()))
    return run, run.open().run()


def lines(run: Trainer) -> list[dict]:
    """The log without times."""
    found = read_log(run.run_directory.path / "metrics.jsonl")
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in found]


@pytest.fixture(scope="module")
def reward_run(pairs, tmp_path_factory):
    config = preferences(pairs, "bradley_terry", train__steps=60, evaluation__every_steps=20)
    return finished(config, tmp_path_factory.mktemp("reward"))


def test_a_separable_preference_is_learnt(reward_run):
    """Sevens are preferred whatever the length, so the bet on lengths is worth nothing."""
    run, summary = reward_run
    facts = summary["reward_model"]
    report = facts["sources"]["pairs"]
    assert summary["before"]["pairs"] == {"examples": 16, "loss": pytest.approx(np.log(2)), "accuracy": 0.5}
    assert report["accuracy"] > 0.95 and report["accuracy_interval"][0] > 0.75
    assert report["length_baseline"]["accuracy"] < 0.8
    assert summary["after"]["pairs"]["accuracy"] == report["accuracy"]
    # The last step's evaluation went another way, through the objective.
    last = lines(run)[-1]
    assert last["heldout_loss/pairs"] == pytest.approx(report["loss"], rel=1e-3)
    assert last["heldout/pairs"] == pytest.approx(report["accuracy"])
    assert facts == json.loads((run.run_directory.path / "reward_model.json").read_text())
    logged = lines(run)
    assert [line["step"] for line in logged] == list(range(61))
    assert {"loss", "pair_accuracy", "margin", "gradient_norm"} <= logged[1].keys()
    assert {"heldout/pairs", "heldout_loss/pairs"} <= logged[20].keys() and "heldout/pairs" not in logged[21]
    assert is_complete(run.run_directory.path, run.config)


def test_a_reward_model_is_loaded_with_its_head(reward_run):
    run, _ = reward_run
    policy = Policy.load(Run(run.run_directory.path))
    assert policy.model.value_head is not None
    assert np.asarray(policy.model.value_head.weight[...]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_continues_bit_for_bit(pairs, tmp_path, kind):
    """A killed run has the checkpoint of step 2; what it logged later is dropped and done again."""
    config = preferences(pairs, kind, warm_start__steps=2 if kind == "dpo" else 0, train__checkpoint_every=2)
    straight, expected = finished(config, tmp_path / "straight")
    killed = trainer(config, tmp_path / "killed")
    killed.run_earlier_phases()
    last = killed.phases[-1]
    last.start(killed.state)
    killed.state.started = True
    for number in range(3):
        last.step(killed.state, number)
        killed.state.step = number + 1
        if number == 1:
            killed.save()
    killed.close()
    resumed = trainer(config, tmp_path / "killed", resume=True)
    assert resumed.state.step == 2
    summary = resumed.run()
    assert lines(resumed) == lines(straight)
    assert summary["after"] == expected["after"]
    assert_equal_arrays(resumed.state.learner.state, straight.state.learner.state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_split_into_micro_batches_changes_nothing(pairs, kind):
    found = []
    for count in (1, 4):
        config = preferences(pairs, kind, train__micro_batches=count)
        setup = prepare(config)
        learner = Learner(setup.policy, value_head=kind == "bradley_terry")
        learner.begin(offline_task(config, setup.data.shared_prefix, 8))
        if kind == "dpo":
            # Away from its own reference, where all pairs cost the same.
            learner.reference = jax.tree.map(lambda x: x * 1.1, learner.state.trainable)
        if kind == "bradley_terry":
            # A head of zeros would give the trunk no gradient.
            trainable = learner.state.trainable
            moved = jax.tree.map(lambda x: x + 0.1 if x.shape == (64,) else x, trainable)
            learner.state = dataclasses.replace(learner.state, trainable=moved)
        examples = list(setup.data.train_examples[0][:8])
        prompts = batch_prompts(examples, [0] * 8, setup.data.prompt_size)
        texts, signals = [pair(e.example) for e in examples], PAIR_SIGNALS
        if kind == "sft":
            texts, signals = [each[:1] for each in texts], (1.0,)
        tokenizer = setup.policy.tokenizer
        batch = written_batch(prompts, texts, signals, tokenizer.encode, tokenizer.stop_ids[0], 9)
        update = learner.update(learner.written_batch(batch))
        found.append((update.loss, update.gradient_norm, update.parts))
    (loss, norm, parts), (other_loss, other_norm, other_parts) = found
    assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4) and norm > 0.01
    assert other_parts == pytest.approx(parts, rel=1e-4)


def test_dpo_prefers_the_chosen_answers_and_starts_from_its_reference(pairs, tmp_path):
    config = preferences(pairs, "dpo", warm_start__steps=20, train__steps=40, evaluation__every_steps=40)
    summary = finished(config, tmp_path)[1]
    # At the start policy and reference are equal, so the margin is 0: the reference is what the warm start made.
    assert summary["before"]["pairs"]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert summary["after"]["pairs"]["accuracy"] > 0.9
    assert summary["objective"] == "dpo" and "reward_model" not in summary


def test_supervised_fine_tuning_lowers_the_loss(pairs, tmp_path):
    config = preferences(pairs, "sft", train__steps=30)
    summary = finished(config, tmp_path)[1]
    assert summary["after"]["pairs"]["loss"] < summary["before"]["pairs"]["loss"] - 0.4
    assert set(summary["after"]["pairs"]) == {"examples", "loss"}


def test_adapters_alone_train_where_there_are_any(pairs, tmp_path):
    config = preferences(pairs, "bradley_terry", lora=LoraConfig(rank=2), train__steps=3, optimizer__learning_rate=0.01)
    run, _ = finished(config, tmp_path)
    model, start = run.state.learner.policy().model, prepare(config).policy.model
    assert jnp.array_equal(model.embedding[...], start.embedding[...])
    assert model.value_head is not None and np.asarray(model.value_head.weight[...]).any()


def test_the_python_interface_trains_and_gives_a_complete_run_back(pairs, tmp_path):
    run = train(preferences(pairs, "sft", train__steps=2), runs=str(tmp_path))
    assert run.summary()["objective"] == "sft" and run.metrics()["step"] == [0, 1, 2]
    assert train(run) is run


def test_a_configuration_loses_what_only_rollouts_need():
    config = dataclasses.replace(load_config("tiny_reset"), curriculum=CurriculumConfig("uniform"))
    for kind in KINDS:
        changed = as_offline(config, kind)
        assert changed.loss.kind == kind and not changed.reset.is_on
        assert Config.from_json(changed.to_json()) == changed
        assert as_offline(changed, kind) is changed  # its own values stay
    assert as_offline(config, "sft").warm_start.steps == 0 < as_offline(config, "dpo").warm_start.steps
    beta = dataclasses.replace(as_offline(config, "dpo"), loss=DpoConfig(beta=0.05))
    assert as_offline(beta, "dpo").loss == DpoConfig(beta=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reset": ResetConfig(share=0.5)}, "samples nothing, and reset.share is set"),
        ({"replay": ReplayConfig(capacity=64, recent_share=0.5)}, "samples nothing, and replay.capacity is set"),
        ({"reward__model": ("there",)}, "samples nothing, and reward.model is set"),
    ],
)
def test_what_decides_about_rollouts_is_refused(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        preferences(pairs, loss=BradleyTerryConfig(), **changes)


def test_pairs_are_needed_and_long_answers_are_left_out(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows[:3]:
        row["chosen"] = "7" * 20
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setup = prepare(preferences(tmp_path / "long.jsonl", "bradley_terry"))
    kept = [e for examples in (*setup.data.train_examples, *setup.data.heldout_examples) for e in examples]
    assert not any(e.example.answer.startswith("77777") for e in kept)
    (tmp_path / "none.jsonl").write_text(
        "".join(json.dumps({name: row[name] for name in ("prompt", "chosen")}) + "\n" for row in rows)
    )
    with pytest.raises(ValueError, match=r"train rows cannot be learnt from: .*pairs need the fields"):
        prepare(preferences(tmp_path / "none.jsonl", "dpo"))


def test_rollouts_are_no_pairs(pairs, tmp_path):
    assert isinstance(make_objective(BradleyTerryConfig()), Objective)
    run = trainer(preferences(pairs, "bradley_terry"), tmp_path)
    with pytest.raises(RuntimeError, match="samples nothing"):
        run.step(0)


def demonstrations_of(path, config_changes=None) -> Config:
    """Prompts of 4 to 6 tokens that all begin with "12"; most answers have one digit, a few seven."""
    numbers = [12, *range(120, 130), *range(1200, 1217)]
    rows = [{"prompt": f"{n} =", "chosen": "7" * 7 if n % 6 == 0 else str(n % 7)} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = preferences(path, "sft", **(config_changes or {}))
    sources = tuple(dataclasses.replace(source, heldout_size=4) for source in config.data.sources)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


@pytest.mark.parametrize(("shared", "micro_batches"), [(0, 1), (2, 1), (2, 2)])
def test_packed_demonstrations_have_the_loss_and_the_gradient_of_those_in_rows_of_their_own(
    tmp_path, shared, micro_batches
):
    config = demonstrations_of(tmp_path / "rows.jsonl", {"train__micro_batches": micro_batches})
    setup = prepare(config)
    tokenizer, examples = setup.policy.tokenizer, list(setup.data.train_examples[0][:8])
    prompts, texts = batch_prompts(examples, [0] * 8, setup.data.prompt_size), [e.example.answer for e in examples]
    ending = tokenizer.encode, tokenizer.stop_ids[0]
    packed = packed_batch(prompts, texts, *ending, shared, 16 - shared, multiple=2)
    batches = [written_batch(prompts, [[text] for text in texts], (1.0,), *ending, 8), packed]
    # A wrong version: every text sees those to its left.
    batches.append(dataclasses.replace(packed, segment_BGC=jnp.ones_like(packed.segment_BGC)))
    found = []
    for batch in batches:
        learner = Learner(setup.policy)
        learner.begin(offline_task(config, shared, 16))
        found.append(learner.update(learner.written_batch(batch)))
    plain, packed, wrong = found
    assert len(batches[1].tokens_BGC) < 8 and packed.loss == pytest.approx(plain.loss, rel=1e-5)
    assert packed.gradient_norm == pytest.approx(plain.gradient_norm, rel=1e-4)
    assert abs(wrong.loss - plain.loss) > 1e-3


def test_demonstrations_share_rows_where_that_computes_less(pairs, tmp_path, monkeypatch):
    """Answers of the pairs are about as long as the longest, so two of them never fit into one row."""
    seen, update = list[LearnerBatch](), Learner.update
    monkeypatch.setattr(Learner, "update", lambda self, batch, key: (seen.append(batch), update(self, batch, key))[1])
    changes = {"train__steps": 4, "evaluation__every_steps": 4}
    run, _ = finished(demonstrations_of(tmp_path / "rows.jsonl", changes), tmp_path / "short")
    assert all(each.arrays.segment_BGC is not None and len(each.arrays.tokens_BGC) < 8 for each in seen)
    assert lines(run)[4]["loss"] < lines(run)[1]["loss"]
    seen.clear()
    finished(preferences(pairs, "sft", **changes), tmp_path / "even")
    assert seen and all(each.arrays.segment_BGC is None for each in seen)
