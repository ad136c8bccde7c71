"""What does not fit is refused before anything compiles, with what is needed and which field to change."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from nested_reft.cli.main import main
from nested_reft.models.config import ModelConfig
from nested_reft.models.lora import LoraConfig, split_trainable
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer
from nested_reft.replay_store import ReplayConfig
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training import memory
from nested_reft.training.config import load_config
from nested_reft.training.memory import check_memory, least_bytes, old_weights, update_peak
from nested_reft.training.reinforcement import reinforcement_task
from nested_reft.training.search_config import SearchConfig
from nested_reft.training.setup import Setup, prepare
from nested_reft.training.step import BaseModel, UpdatePlans, initial_train_state, make_update
from nested_reft.training.update_memory import update_working_bytes
from nested_reft.types import TrainBatch

SHAPE = ModelConfig(
    vocab_size=100, num_layers=4, width=12, hidden_width=20, num_heads=2, num_kv_heads=1, head_size=4, max_positions=64
)
# Embedding 1200, final norm 12; a layer: norms 24, query 96, key and value 48 each, output 96, MLP 720.
WEIGHTS = 4 * (1200 + 12 + 4 * (24 + 96 + 96 + 96 + 720))


@pytest.fixture(scope="module")
def tiny_setup() -> Setup:
    return prepare(load_config("tiny"))


@pytest.fixture
def setup_of(tiny_setup, key):
    """Setups of SHAPE with prompts of 8 tokens and the sizes given."""
    model = Transformer(SHAPE, initial_parameters(SHAPE, key))

    def make(prompts=2, group=3, size=5, micro_batches=1, weights="target", data=1, shared_prefix=0) -> Setup:
        tiny = tiny_setup.config
        config = dataclasses.replace(
            tiny,
            data=dataclasses.replace(tiny.data, prompts_per_batch=prompts),
            rollout=dataclasses.replace(tiny.rollout, group_size=group, max_completion_tokens=size, weights=weights),
            train=dataclasses.replace(tiny.train, micro_batches=micro_batches),
            mesh=MeshConfig(data=data),
        )
        return dataclasses.replace(
            tiny_setup,
            config=config,
            policy=dataclasses.replace(tiny_setup.policy, model=model),
            data=dataclasses.replace(tiny_setup.data, prompt_size=8, shared_prefix=shared_prefix),
        )

    return make


def test_least_bytes_by_hand(setup_of):
    parts = least_bytes(setup_of())
    tokens = 2 * (8 + 3 * 4)
    assert parts["rollouts"] == {"weights": WEIGHTS, "optimizer": 2 * WEIGHTS, "caches": 2 * 4 * 4 * 4 * tokens}
    assert parts["updates"]["activations"] == tokens * 4 * 12 * 4


def test_rows_that_are_refilled_hold_their_own_caches_alone(setup_of, monkeypatch):
    """Three rows at a time, each with 8 prompt tokens and 5 slots, and one prompt whose completions wait."""
    setup = setup_of(prompts=50)
    rollout = dataclasses.replace(setup.config.rollout, rows=3)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, rollout=rollout))
    assert least_bytes(setup)["rollouts"]["caches"] == 2 * 4 * 4 * 4 * (3 * (8 + 5) + 8)
    # A prefix of 5, as long as a completion, leaves no slot for a sixth token. Those of a group of 3 wait as well.
    forced = dataclasses.replace(setup, data=dataclasses.replace(setup.data, forced_size=9))
    assert least_bytes(forced)["rollouts"]["caches"] == 2 * 4 * 4 * 4 * (3 * (8 + 6) + 8 + 3 * 5)
    assert least_bytes(forced)["evaluation"] == least_bytes(setup)["evaluation"]
    # Less than the caches themselves, so that these are the largest part.
    monkeypatch.setattr(memory, "least_bytes", lambda setup: {"rollouts": {"weights": 1.0, "caches": 9e9}})
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 8e9)
    message = r"caches 9.0 GB of 3 rows of 8 \+ 5 tokens\); .*: lower rollout.rows \(3\) or rollout.max_"
    with pytest.raises(ValueError, match=message):
        check_memory(setup)


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        (3, r"lower evaluation.rows \(3\) or rollout.max_completion_tokens \(\d+\)$"),
        # As many rows as completions are no fewer at a time.
        (10**6, r"lower evaluation.batch_size \(\d+\), .* or set evaluation.rows to decode fewer at a time$"),
    ],
)
def test_caches_of_an_evaluation_are_lowered_by_what_decides_on_them(setup_of, monkeypatch, rows, remedy):
    setup = setup_of()
    evaluation = dataclasses.replace(setup.config.evaluation, rows=rows)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, evaluation=evaluation))
    monkeypatch.setattr(memory, "least_bytes", lambda setup: {"evaluation": {"weights": 1.0, "caches": 9e9}})
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 8e9)
    with pytest.raises(ValueError, match=remedy):
        check_memory(setup)


def test_updates_hold_the_completions_that_they_train_on(setup_of):
    """Groups of 2 out of the 3 that are sampled: rollouts cache all of them."""
    setup = setup_of()
    replay = ReplayConfig(capacity=100, recent_share=0.5, group_size=2)
    fewer = least_bytes(dataclasses.replace(setup, config=dataclasses.replace(setup.config, replay=replay)))
    assert fewer["updates"]["activations"] == 2 * (8 + 2 * 4) * 4 * 12 * 4
    assert fewer["rollouts"] == least_bytes(setup)["rollouts"]


@pytest.mark.parametrize(
    ("search", "weights", "rank", "expected"),
    [
        (SearchConfig(), "target", 0, 0),
        (SearchConfig(lag=8, backend="inline"), "target", 0, 0),  # what is found ahead is held, and no weights
        (SearchConfig(lag=8, backend="thread"), "target", 0, WEIGHTS),
        (SearchConfig(sync_every=2), "target", 0, WEIGHTS),
        (SearchConfig(lag=8, backend="thread"), "target", 4, 0),  # adapters share the frozen base
        (SearchConfig(lag=8, backend="thread"), "bfloat16", 0, WEIGHTS / 2),
        (SearchConfig(sync_every=2), "bfloat16", 0, 0),  # the one copy is counted with the weights
        (SearchConfig(lag=8, backend="ray"), "target", 0, 0),  # in the object store
        (SearchConfig(lag=8, backend="ray", sync_every=2), "target", 0, WEIGHTS),  # for the orders of the second step
    ],
)
def test_updates_beside_searchers_hold_old_weights(setup_of, search, weights, rank, expected):
    setup = setup_of(weights=weights)
    config = dataclasses.replace(setup.config, search=search, lora=LoraConfig(rank=rank))
    parts = least_bytes(dataclasses.replace(setup, config=config))
    assert parts["updates"]["old weights"] == expected and parts["warm start"]["old weights"] == 0


@pytest.mark.parametrize(
    ("search", "weights", "most"),
    [
        # Slow searchers still hold the orders of `lag` steps, that of the step which is to update among them.
        (SearchConfig(lag=3, backend="thread"), "target", 3),
        # Steps 0 and 1 share weights, and 2 and 3: the update of step 2 meets orders of 0, 1 and 2.
        (SearchConfig(lag=3, backend="thread", sync_every=2), "target", 2),
        # The update of step 3, which begins a period, meets orders of 2 and 3.
        (SearchConfig(lag=2, backend="thread", sync_every=3), "target", 2),
        (SearchConfig(sync_every=4), "target", 1),
        (SearchConfig(lag=2, backend="thread"), "bfloat16", 2 / 2),
        (SearchConfig(lag=3), "target", 0),
        (SearchConfig(lag=3, backend="ray"), "target", 0),
    ],
)
def test_slow_searchers_hold_more_versions(setup_of, search, weights, most):
    setup = setup_of(weights=weights)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, search=search))
    assert old_weights(setup)[1] == most * WEIGHTS


def test_versions_that_would_not_fit_are_a_warning(setup_of, monkeypatch, caplog):
    setup = setup_of()
    evaluation = dataclasses.replace(setup.config.evaluation, batch_size=1)
    config = dataclasses.replace(setup.config, search=SearchConfig(9, 1, "thread"), evaluation=evaluation)
    setup = dataclasses.replace(setup, config=config)
    certain = sum(least_bytes(setup)["updates"].values())
    # A prediction, which has tests of its own, would refuse this one.
    monkeypatch.setattr(memory, "MOST_KEPT", 0)
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: certain + 7.9 * WEIGHTS)
    check_memory(setup)
    assert "updates may need up to" in caplog.text and "Lower search.lag (9)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: certain + 8.1 * WEIGHTS)
    check_memory(setup)
    assert not caplog.text


def test_what_changes_the_bound(setup_of):
    copied = least_bytes(setup_of(weights="bfloat16"))["rollouts"]
    assert copied["weights"] == WEIGHTS + WEIGHTS // 2  # the target and its copy
    assert copied["caches"] == 2 * 4 * 4 * 2 * 2 * (8 + 3 * 4)  # in bfloat16, too
    assert least_bytes(setup_of(micro_batches=2))["updates"]["activations"] == (8 + 3 * 4) * 4 * 12 * 4
    shared = least_bytes(setup_of(shared_prefix=6))["updates"]["activations"]
    assert shared == (6 + 2 * (2 + 3 * 4)) * 4 * 12 * 4  # the common tokens run once
    replicated = least_bytes(setup_of(data=2))["updates"]
    assert replicated["weights"] == replicated["gradient"] == 2 * WEIGHTS


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            {"prompts": 2000, "size": 5000, "micro_batches": 2000},
            r"rollouts need at least .* caches .* of 2000 prompts of 8 tokens and 6000 completions of 4999\); .* lower"
            r" data.prompts_per_batch \(2000\), .*_tokens \(5000\), or set rollout.rows to decode fewer at a time",
        ),
        ({"prompts": 100, "size": 500}, r"updates need at least .* activations .* raise train.micro_batches \(1\)"),
        (  # one prompt, which no micro-batches divide
            {"prompts": 1, "group": 300, "size": 500},
            r"updates need at least .*: lower rollout.group_size \(300\) or rollout.max_completion_tokens \(500\)$",
        ),
        ({}, r"rollouts need at least 0.069 MB .* there are 0.01 MB: train adapters"),
    ],
)
def test_what_cannot_fit_is_refused(sizes, message, setup_of, monkeypatch):
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 2.5e7 if sizes else 1e4)
    with pytest.raises(ValueError, match=message):
        check_memory(setup_of(**sizes))


@pytest.mark.parametrize(("share", "outcome"), [(0.8, "refused"), (0.9, "warned"), (1.01, "passed")])
def test_updates_are_predicted_where_they_come_near_what_there_is(share, outcome, setup_of, monkeypatch, caplog):
    """The lower bounds fit in all three. In the margin of the prediction the run goes on."""
    # Long enough that activations outweigh what the other stages need.
    setup = setup_of(prompts=1, group=2, size=200)
    evaluation = dataclasses.replace(setup.config.evaluation, batch_size=1)
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, evaluation=evaluation))
    needed = sum(update_peak(setup).values())
    assert needed > 2 * sum(least_bytes(setup)["updates"].values())
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: share * needed)
    # Heads of 4 have far more scores beside their inputs than those of any model that is in use.
    monkeypatch.setattr(memory, "MOST_KEPT", 10**4)
    if outcome == "refused":
        with pytest.raises(ValueError, match=r"updates need about .* or set train.remat full \(now none\)"):
            check_memory(setup)
    else:
        check_memory(setup)
    assert ("updates need about" in caplog.text) == (outcome == "warned")


def test_each_policy_of_rematerialisation_keeps_less(setup_of):
    def kept(remat):
        setup = setup_of(prompts=1, group=2, size=200)
        train = dataclasses.replace(setup.config.train, remat=remat)
        return update_peak(dataclasses.replace(setup, config=dataclasses.replace(setup.config, train=train)))

    none, dots, full = (kept(remat)["activations"] for remat in ("none", "dots", "full"))
    inputs = 4 * 4 * 12 * (8 + 2 * 199)  # of each layer, its input alone: 12 numbers for each token
    logits = 4 * 100 * 2 * 200
    assert inputs + logits < full < 2.2 * inputs + logits < dots < none / 2


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "length"), [("none", 64), ("full", 600)])
def test_a_predicted_peak_is_that_of_the_compiled_update(remat, length, key):
    """Within 15 %, with attention that writes its scores out and with attention by blocks."""
    shape = ModelConfig(
        vocab_size=2048, num_layers=4, width=96, hidden_width=256, num_heads=6, num_kv_heads=2, head_size=16,
        max_positions=1024,
    )  # fmt: skip
    model = Transformer(shape, initial_parameters(shape, key))
    task = reinforcement_task(load_config("tiny", train={"remat": remat}), shared_prefix=0)
    task = dataclasses.replace(task, max_completion_tokens=length)
    graph, trainable, frozen = split_trainable(model)
    rows = (1, 4)
    batch = TrainBatch(
        prompt_BP=jnp.zeros((1, 16), jnp.int32),
        prompt_length_B=jnp.full(1, 16),
        tokens_BGC=jnp.zeros((*rows, length), jnp.int32),
        length_BG=jnp.full(rows, length),
        forced_BG=jnp.zeros(rows, jnp.int32),
        counted_BG=jnp.ones(rows, bool),
        signal_BG=jnp.ones(rows),
        behavior_logprob_BGC=jnp.zeros((*rows, length)),
    )
    state = initial_train_state(trainable, task.optimizer)
    compiled = make_update(task).lower(state, BaseModel(frozen, graph), batch, UpdatePlans()).compile()
    found = compiled.memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    predicted = 4 * weights + sum(update_working_bytes(model, task, 1, 4, 16).values())
    assert predicted == pytest.approx(found.argument_size_in_bytes + found.temp_size_in_bytes, rel=0.15)


@pytest.mark.parametrize(
    ("room", "change", "message"),
    [
        (
            "warm_start",
            {"steps": 1, "batch_size": 10**6},
            r"warm start needs .* lower warm_start.batch_size \(10{6}\)",
        ),
        ("evaluation", {"samples_per_prompt": 10**8}, r"evaluation needs .* evaluation.samples_per_prompt \(10{8}\)"),
        ("evaluation", {"batch_size": 10**12}, r"evaluation needs .* lower evaluation.batch_size \(10{12}\)"),
    ],
)
def test_other_batches_that_cannot_fit_are_refused(room, change, message, setup_of, monkeypatch):
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 1e8)
    setup = setup_of()
    changed = dataclasses.replace(getattr(setup.config, room), **change)
    config = dataclasses.replace(setup.config, **{room: changed})
    with pytest.raises(ValueError, match=message):
        check_memory(dataclasses.replace(setup, config=config))


def test_what_fits_passes(setup_of):
    check_memory(setup_of())
    assert memory.mesh_bytes(make_mesh(MeshConfig())) > 1e9


def test_only_training_is_refused(tmp_path, monkeypatch, capsys):
    """An evaluation holds no moments, gradients or batches of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "mesh_bytes", lambda mesh: 1e4)
    assert main(["train", "tiny"]) == 2
    assert "rollouts need at least" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    prepare(load_config("tiny"))
