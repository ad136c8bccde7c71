"""Our side of the benchmarks on a very small model: every timed call runs, and does what the tables say."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from experiments.benchmarks import breakdown, compaction, exact, our_updates, ours
from experiments.benchmarks.floors import Ceilings
from experiments.benchmarks.worker import Case, Spec, measure
from nested_reft.models.formats.huggingface import save_huggingface
from nested_reft.tokenizer import Tokenizer
from tests.tiny_models import TINY, tiny_model

CONFIG = dataclasses.replace(TINY, vocab_size=128)  # prompts of the benchmarks have ids from 100 up
CASE = Case(prompts=2, group=3, prompt_tokens=4, new_tokens=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny"
    save_huggingface(tiny_model(CONFIG), path, Tokenizer.characters("0123456789"))
    return str(path)


def spec(directory: str, variant: str) -> Spec:
    return Spec(variant, (CASE,), directory, "", CONFIG.vocab_size, 1, 1)


@pytest.mark.parametrize("variant", ours.VARIANTS)
def test_a_rollout_goes_on_to_the_limit_whatever_is_drawn(variant, directory):
    """Every token stops a completion of this policy; a call that heeded them would return one token per row."""
    ours.prepare(spec(directory, variant))(CASE)()  # asserts the number of tokens itself
    policy = ours.VARIANTS[variant](directory)
    policy.tokenizer.stop_ids = tuple(range(CONFIG.vocab_size))
    found = ours.rollout_call(policy, dataclasses.replace(CASE, skip_ratio=0.4))()
    assert np.asarray(found.length_BG).tolist() == [[5] * 3] * 2
    assert np.asarray(found.part_BGL).sum(axis=-1).tolist() == [[3] * 3] * 2  # two of five layers are skipped


def test_an_exact_rollout_goes_on_to_the_limit_too(directory):
    policy = ours.VARIANTS["float32"](directory)
    policy.tokenizer.stop_ids = tuple(range(CONFIG.vocab_size))
    found = exact.exact_call(policy, dataclasses.replace(CASE, skip_ratio=0.2), draft_length=2)()
    assert np.asarray(found.rollouts.length_BG).tolist() == [[5] * 3] * 2 and int(found.tested) > 0


@pytest.mark.parametrize("variant", our_updates.VARIANTS)
def test_an_update_trains_what_the_variant_says(variant, directory):
    our_updates.prepare(spec(directory, variant))(CASE)()  # asserts a finite loss itself
    task = our_updates.grpo_task(CASE)
    state, _ = our_updates.initial(our_updates.VARIANTS[variant](directory), task)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    whole = sum(leaf.size for leaf in jax.tree.leaves(ours.VARIANTS["float32"](directory).model.parameters()))
    assert (trained == whole) == ("LoRA" not in variant)


def test_compactions_change_no_lengths(directory, monkeypatch):
    """With 4 tokens or more to decode, the program with compactions has some; rows end by random stop tokens."""
    monkeypatch.setattr(compaction.schedule, "COMPACT_FROM", 4)
    model, case = ours.VARIANTS["float32"](directory).model, Case(2, 4, 4, 16)
    without, shipped = compaction.compaction_rows(model, case, 1 / 4, repeats=1)
    assert without["longest"] == shipped["longest"] > without["mean_length"]
    assert (without["variant"], shipped["variant"]) == ("without compactions", "with compactions")
    stops = compaction.stop_ids(CONFIG.vocab_size, 1 / 4)
    lengths = [np.asarray(compaction.raw_call(model, case, stops, count)().length_BG) for count in (0, 3)]
    assert lengths[0].tolist() == lengths[1].tolist()


def test_breakdowns_name_their_stages(directory, monkeypatch):
    monkeypatch.setattr(breakdown, "ROLLOUT", CASE)
    monkeypatch.setattr(breakdown, "UPDATE", CASE)
    policy, ceilings = ours.VARIANTS["float32"](directory), Ceilings(flops=1e9, bandwidth=math.inf)

    def best(call):
        return measure(call, repeats=1)

    rollout = breakdown.rollout_breakdown(policy, lambda rows: ceilings, best)
    update = breakdown.update_breakdown(policy.model, ceilings, best)
    assert [stage.name for stage in rollout.stages] == [
        "prefill",
        "decode: layers without attention",
        "decode: attention",
        "output head",
        "sampling",
        "the rest",
    ]
    assert [stage.name for stage in update.stages] == [
        "layers, forward",
        "head and log-probabilities, forward",
        "backward",
        "optimizer",
        "the rest",
    ]
    for found in (rollout, update):
        assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.seconds)
