"""Learned rewards: what a reward model says of rollouts, how it is normalised, and which ones are refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.checkpoints import newest_checkpoint
from nested_reft.cli.main import main
from nested_reft.data.pipeline import batch_prompts
from nested_reft.dataset_reset import ResetConfig
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses import presets
from nested_reft.losses.trajectory_balance import TrajectoryBalanceConfig
from nested_reft.models.heads import HeadParam, ScalarHead
from nested_reft.replay_store import ReplayConfig
from nested_reft.reward_model import RewardModel, check_reward_models, read_facts, score_rollouts
from nested_reft.rewards.reward import RewardConfig, score
from nested_reft.rollout.policy import Policy
from nested_reft.run_directory import RunDirectory, read_log
from nested_reft.tokenizer import Tokenizer
from nested_reft.training import reinforcement, setup
from nested_reft.training.setup import prepare
from nested_reft.training.summary import gold_metric
from nested_reft.training.trainer import Trainer
from tests.training.preference_runs import preferences, write_pairs

GOLD = "def gold(text, example):\n    return float(text.count('7'))\n"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def models(pairs, tmp_path_factory):
    """Two finished reward models of different seeds."""
    root, found = tmp_path_factory.mktemp("models"), []
    for seed in (0, 1):
        config = preferences(pairs, "bradley_terry", train__steps=20, train__seed=seed, evaluation__every_steps=20)
        run = Trainer(prepare(config), RunDirectory.create(root, f"model{seed}", config.to_json()))
        run.open().run()
        found.append(str(run.run_directory.path))
    return found


def rollouts_of(config, key):
    setup = prepare(config)
    examples = list(setup.data.train_examples[0][:3])
    prompts = batch_prompts(examples, [0] * 3, setup.data.prompt_size)
    plan = LayerPlan.full(setup.policy.num_layers)
    return setup.policy, prompts, jax.device_get(setup.policy.generate(prompts, plan, key, group_size=4))


def test_a_reward_is_that_of_the_whole_text(pairs, models, key):
    """Read off the state after the stop token of the plain sequence of prompt and completion, bias left out."""
    _, prompts, rollouts = rollouts_of(preferences(pairs, "sft"), key)
    model = RewardModel.load(models[0])
    head = model.policy.model.value_head
    assert head is not None
    found = model.normalized(prompts, rollouts)
    for b in range(3):
        for g in range(4):
            length = int(rollouts.length_BG[b, g])
            text = [*prompts.tokens_BP[b, : prompts.length_B[b]], *rollouts.tokens_BGC[b, g, :length]]
            hidden, _ = model.policy.model._run_prompt(  # the plain sequence
                jnp.asarray([text], jnp.int32), jnp.ones((1, len(text)), bool), None
            )
            reward = float(hidden[0, -1] @ head.weight[...])
            assert found[b, g] == pytest.approx((reward - model.mean) / model.std, abs=1e-4, rel=1e-4)


def test_a_bias_means_nothing(models):
    """No pair teaches it, and an export has none."""
    model = RewardModel.load(models[0])
    arrays = (
        np.ones((1, 2), np.int32),
        np.array([2], np.int32),
        np.ones((1, 1, 3), np.int32),
        np.array([[3]], np.int32),
    )
    before = np.asarray(model.rewards(*arrays))
    head = model.policy.model.value_head
    assert isinstance(head, ScalarHead)
    head.bias = HeadParam(jnp.float32(5.0))
    np.testing.assert_allclose(model.rewards(*arrays), before, atol=1e-5)


def test_the_mean_of_several_models_is_the_reward_and_their_spread_is_logged(pairs, models, key):
    policy, prompts, rollouts = rollouts_of(preferences(pairs, "sft"), key)
    alone = [RewardModel.load(path).normalized(prompts, rollouts) for path in models]
    config = RewardConfig(checker="model", model=tuple(models), model_weight=2.0)
    _, reward_BG, accuracy_BG, scored_BG, parts = score_rollouts(policy, prompts, rollouts, config, 8)
    finished_BG = np.asarray(rollouts.finished_BG)
    assert 0 < finished_BG.sum() < finished_BG.size  # otherwise nothing is tested
    mean_BG = np.where(finished_BG, np.mean(alone, axis=0), -1)  # what was cut off has no reward of its own
    np.testing.assert_allclose(reward_BG, 2 * mean_BG, atol=1e-5)
    np.testing.assert_allclose(parts["model_std"], np.where(finished_BG, np.std(alone, axis=0), 0), atol=1e-5)
    assert np.array_equal(accuracy_BG, (mean_BG > 0).astype(np.float32)) and scored_BG.all()
    one = score_rollouts(policy, prompts, rollouts, dataclasses.replace(config, model=(models[0],)), 8)[-1]
    assert "model_std" not in one


def test_gold_is_logged_beside_the_learned_reward_and_has_no_part_in_it(pairs, models, tmp_path):
    (tmp_path / "gold.py").write_text(GOLD)
    reward = RewardConfig(
        checker="function", function=f"{tmp_path / 'gold.py'}:gold", function_weight=0.0, model=(models[0],)
    )
    config = preferences(
        pairs,
        loss=presets.ppo("base"),
        reward=reward,
        train__steps=5,
        reset=ResetConfig(share=0.5, references="answers"),
    )
    run = Trainer(prepare(config), RunDirectory.create(tmp_path, "run", config.to_json())).open()
    summary = run.run()
    lines = read_log(run.run_directory.path / "metrics.jsonl")[1:]
    for line in lines:
        assert line["reward"] == pytest.approx(line["reward/model"], abs=1e-5)
        assert {"reward/function", "accuracy", "completion_kl", "completion_tokens"} <= line.keys()
    assert any(line["reward/function"] > 0 for line in lines)
    found = summary["reward_hacking"]
    assert found["gold_metric"] == "reward/function" and len(found["learned"]) == 2 and "kl" in found


def test_a_verifier_judges_references_where_a_model_rewards(pairs, models, tmp_path):
    """The function calls answers of four digits right, and the others start no rollout."""
    (tmp_path / "gold.py").write_text("def gold(text, example):\n    return float(len(text) == 4)\n")
    reward = RewardConfig(
        checker="function", function=f"{tmp_path / 'gold.py'}:gold", function_weight=0.0, model=(models[0],)
    )
    reset = ResetConfig(share=0.5, references="answers", only_right=True)
    data = prepare(preferences(pairs, loss=presets.ppo("base"), reward=reward, reset=reset)).data
    examples = [encoded.example for encoded in data.train_examples[0]]
    assert [example.reference is not None for example in examples] == [len(example.answer) == 4 for example in examples]
    assert 0 < sum(example.reference is None for example in examples) < len(examples)


def test_trajectory_balance_replays_completions_with_their_learned_reward(pairs, models, tmp_path):
    """What is drawn from the store has the reward that it came with, and the objective learns from it."""
    config = preferences(
        pairs,
        loss=TrajectoryBalanceConfig(beta=0.5),
        reward=RewardConfig(checker="model", model=(models[0],)),
        replay=ReplayConfig(capacity=500, recent_share=0.0, inverse_temperature=1.0, prefill=40),
        data__prompts_per_batch=8,
    )
    with Trainer(prepare(config), RunDirectory(tmp_path)) as run:
        records = [run.open().step(0), run.step(1)]
    given = {
        text: reward
        for record in records
        for scored in record.found
        for texts, rewards in zip(scored.texts, scored.parts["model"].tolist(), strict=True)
        for text, reward in zip(texts, rewards, strict=True)
    }
    groups = records[1].groups
    replayed = zip(np.array(groups.texts).flat, groups.reward_BG.flat, strict=True)
    # A text may come for several prompts with other rewards, so the greater part is compared.
    assert np.mean([reward == pytest.approx(given[text]) for text, reward in replayed]) > 0.5
    assert groups.rollouts.version_BG.min() == 0 and records[1].update.gradient_norm > 0


def test_a_reward_model_of_another_tokenizer_is_refused(models):
    """The same number of tokens, in another order: all ids would be read, as other text."""
    own = RewardModel.load(models[0]).policy
    check_reward_models([models[0]], own.tokenizer, own.model.config.max_positions)
    other = Tokenizer.characters("9876543210+-= ")
    with pytest.raises(ValueError, match=rf"reward.model is '{models[0]}', whose tokenizer is not the policy's"):
        check_reward_models([models[0]], other, 1)
    with pytest.raises(ValueError, match=rf"reward.model '{models[0]}' allows {own.model.config.max_positions} pos"):
        check_reward_models([models[0]], own.tokenizer, own.model.config.max_positions + 1)


def test_a_reward_model_that_was_trained_on_has_no_facts_until_its_end(models, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(models[0], run)
    assert read_facts(str(run)) == read_facts(models[0])
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    (run / "checkpoints" / str(newest)).rename(run / "checkpoints" / str(newest + 1))
    with pytest.raises(ValueError, match=rf"of checkpoint {newest}, and the newest of the run is {newest + 1}"):
        read_facts(str(run))
    assert main(["export", str(run), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    capsys.readouterr()
    # It answers nothing, as a run and as what is exported of one.
    assert main(["export", models[0], str(tmp_path / "out")]) == 0
    for where in (models[0], str(tmp_path / "out")):
        assert main(["sample", where, "1 ="]) == 2
        assert f"'{where}' is a reward model, which answers nothing" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "out"), "--config", "tiny_preferences"]) == 2


def test_before_anything_is_computed(pairs, models):
    config = preferences(pairs, loss=presets.ppo("base"), reward=RewardConfig(checker="model", model=(models[0],)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, alphabet="9876543210+-= "))
    with pytest.raises(ValueError, match="whose tokenizer is not the policy's"):
        prepare(config)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, "has no reward_model.json; allowed is a finished run"),
        ("{", "cannot be read"),
        ('{"mean": 0.0}', "cannot be read: KeyError"),
        ('{"mean": 0.0, "std": 0.0}', "has mean 0.0 and std 0.0; allowed are numbers, and std > 0"),
    ],
)
def test_what_is_no_reward_model_is_refused_before_data_are_read(pairs, tmp_path, monkeypatch, facts, message):
    monkeypatch.setattr(setup, "load_source", lambda source: pytest.fail("the data were read first"))
    if facts is not None:
        (tmp_path / "reward_model.json").write_text(facts)
    with pytest.raises(ValueError, match=message):
        prepare(
            preferences(pairs, loss=presets.ppo("base"), reward=RewardConfig(checker="model", model=(str(tmp_path),)))
        )


def test_a_checker_needs_its_model(pairs):
    with pytest.raises(ValueError, match=r"reward.checker is 'model', but reward.model is empty"):
        prepare(preferences(pairs, loss=presets.ppo("base"), reward=RewardConfig(checker="model")))
    with pytest.raises(ValueError, match="allowed is each reward model once"):
        RewardConfig(model=("a", "a"))
    with pytest.raises(ValueError, match="names 1 models; score needs learned_MBG of as many"):
        score([], batch_prompts_of_nothing(), np.zeros((0, 1), bool), RewardConfig(model=("a",)))


def batch_prompts_of_nothing():
    from nested_reft.types import Prompts

    return Prompts(np.zeros((0, 1), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32), (), (), ())


def test_an_export_gives_the_same_rewards(pairs, models, tmp_path, key, capsys):
    assert main(["export", models[0], str(tmp_path / "exported")]) == 0
    _, prompts, rollouts = rollouts_of(preferences(pairs, "sft"), key)
    expected = RewardModel.load(models[0]).normalized(prompts, rollouts)
    found = RewardModel.load(str(tmp_path / "exported")).normalized(prompts, rollouts)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_transformers_gives_the_same_rewards(models, tmp_path, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert main(["export", models[0], str(tmp_path / "exported")]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    # No padding, and no padding token in the text: their classifier would look for the last token before one.
    tokens = [3, 4, 5, 12, 8, 8, 2]
    with torch.no_grad():
        reward = float(theirs(torch.tensor([tokens])).logits[0, 0])
    model = RewardModel.load(models[0])
    ours = model.rewards(
        np.array([tokens[:4]], np.int32),
        np.array([4], np.int32),
        np.array([[tokens[4:]]], np.int32),
        np.array([[3]], np.int32),
    )
    assert float(ours[0, 0]) == pytest.approx(reward, abs=1e-4)


def test_eval_reports_a_reward_model(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", models[0], "--json", "facts.json"]) == 0
    out = capsys.readouterr().out
    assert "pairs (16 pairs): accuracy (95 %)" in out and "expected calibration error" in out
    stored = json.loads((tmp_path / "facts.json").read_text())
    with open(f"{models[0]}/reward_model.json") as file:
        assert json.load(file) == stored | {"checkpoint": 20}  # which `read_facts` compares with the newest
    assert main(["eval", models[0], "--completions", "file.jsonl"]) == 2
    assert "which answers nothing" in capsys.readouterr().err


def test_an_unfinished_reward_model_is_not_exported(models, tmp_path, capsys):
    shutil.copytree(models[0], tmp_path / "run")
    (tmp_path / "run" / "reward_model.json").unlink()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported")]) == 2
    assert "train it to its end first" in capsys.readouterr().err and not (tmp_path / "exported").exists()
    assert Policy.load(tmp_path / "run").model.value_head is not None


@pytest.mark.parametrize(
    ("reward", "source_checker", "gold"),
    [
        ({"function": "f.py:f", "function_weight": 0.0}, None, "reward/function"),
        ({"function": "f.py:f", "function_weight": 0.0, "checker": "function"}, None, "reward/function"),
        # The policy is paid for what these say, so they show no hacking.
        ({"function": "f.py:f", "function_weight": 0.1, "checker": "function"}, None, None),
        ({"checker": "model"}, None, None),
        ({"checker": "math"}, "model", None),
        # Beside a reward model, the verifier is not in the reward.
        ({"checker": "math"}, None, "accuracy"),
        ({"function": "f.py:f", "function_weight": 0.1}, None, "accuracy"),
    ],
)
def test_gold_is_what_the_policy_is_not_paid_for(pairs, reward, source_checker, gold):
    config = preferences(pairs, loss=presets.ppo("base"), reward=RewardConfig(model=("m",), **reward))
    source = dataclasses.replace(config.data.sources[0], checker=source_checker)
    assert gold_metric(dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(source,)))) == gold


def test_hacking_is_told_while_the_run_goes_on(pairs, models, tmp_path, monkeypatch, capsys):
    """Once, with the evaluation after which the log shows it, and not before there are steps enough."""
    seen = []

    def found(lines, gold):
        seen.append((len(lines), gold))
        return {"warning": None if len(lines) < 5 else "the policy exploits the reward model"}

    monkeypatch.setattr(reinforcement, "reward_hacking", found)
    monkeypatch.setattr(reinforcement, "EARLIEST", 3)
    reward = RewardConfig(checker="model", model=(models[0],))
    config = preferences(pairs, loss=presets.ppo("base"), reward=reward, train__steps=8)
    with Trainer(prepare(config), RunDirectory.create(tmp_path, "run", config.to_json())) as run:
        run.open()
        for number in range(8):
            run.phases[-1].step(run.state, number)
    # The line of step 0 is the evaluation before training, which this run leaves out.
    assert seen == [(4, None), (6, None)]
    assert "step 6: the policy exploits the reward model (later ones: summary.json)" in capsys.readouterr().out
