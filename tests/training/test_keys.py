"""Random keys: each purpose of a run has one that no other purpose draws with."""

import jax
import numpy as np

from nested_reft import api
from nested_reft.bridging import BridgeConfig
from nested_reft.evaluation import Evaluation
from nested_reft.models import source
from nested_reft.models.lora import LoraConfig
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training import heldout
from nested_reft.training.keys import RunKeys
from nested_reft.training.setup import prepare
from tests.training.runs import nano, two_sources


def draws(key: jax.Array) -> set[bytes]:
    """A key and those that are made from it first, by splitting or by folding in."""
    children = [jax.random.fold_in(key, number) for number in range(40)]
    return {np.asarray(jax.random.key_data(each)).tobytes() for each in [key, *jax.random.split(key, 40), *children]}


def test_no_two_purposes_of_a_seed_share_a_key(monkeypatch):
    """`split(key)[i]` and `fold_in(key, i)` may be the same key, so no purpose splits what others fold into."""
    used = {}

    def parameters(shape, key, dtype):
        used["parameters"] = key
        return original(shape, key, dtype)

    original = source.initial_parameters
    monkeypatch.setattr(source, "initial_parameters", parameters)
    monkeypatch.setattr(source, "add_lora", lambda model, lora, key: used.update(adapters=key))
    source.starting_model(nano().model, LoraConfig(rank=1), BridgeConfig(), 3, make_mesh(MeshConfig()))
    keys = RunKeys(jax.random.key(3))
    for name in ("warm_start", "split", "throughput", "throughput_plan", "measurement"):
        used[name] = getattr(keys, name)
    for number in (0, 1):
        used[f"evaluation {number}"] = keys.evaluation(number)
        step = keys.step(number)
        used[f"plan {number}"] = step.plan
        used[f"mini-batches {number}"] = step.mini_batches
        for index in (0, 1):
            used[f"evaluation {number} {index}"] = step.evaluation(index)
            batch = step.batch(index)
            for name in ("curriculum", "rollout", "reset"):
                used[f"{name} {number} {index}"] = getattr(batch, name)
    seen: dict[bytes, str] = {}
    for purpose, key in used.items():
        for drawn in draws(key):
            assert drawn not in seen, f"{purpose} and {seen[drawn]}"
        seen |= dict.fromkeys(draws(key), purpose)
    assert len(used) == 29


def test_each_evaluated_source_draws_with_a_key_of_its_own(monkeypatch):
    keys = []

    def evaluate(policy, examples, reward, config, key, samples, plan=None, completions=None):
        keys.append(np.asarray(jax.random.key_data(key)).tolist())
        return Evaluation(1, 0.5)

    monkeypatch.setattr(heldout, "evaluate_examples", evaluate)
    api.evaluate_sources(prepare(two_sources()), None, samples=True)
    base = np.asarray(jax.random.key_data(jax.random.key(0))).tolist()
    assert len(keys) == 2 and keys[0] != keys[1] and base not in keys
