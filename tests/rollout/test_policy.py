"""A policy: what a call may change, and what it refuses before anything runs on the devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout import policy as rollout_policy
from nested_reft.rollout import throughput
from nested_reft.rollout.policy import Policy
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.sharding import MeshConfig, make_mesh
from nested_reft.training.setup import initial_policy
from nested_reft.types import ForcedPrefixes, Prompts
from tests.training.runs import nano


@pytest.fixture(scope="module")
def policy():
    return initial_policy(nano())


@pytest.mark.parametrize("own", [SamplingConfig(0.7, top_k=3), SamplingConfig(0.7, top_p=0.5)])
def test_another_temperature_leaves_truncation_as_it_is(policy, own, monkeypatch):
    drawn = []

    def generate(self, *_, sampling, **__):
        drawn.append(sampling)
        raise InterruptedError  # the rest needs completions, which are not asked for here

    monkeypatch.setattr(Policy, "generate", generate)
    for temperature in (None, 0.0, 2.0):
        with pytest.raises(InterruptedError):
            dataclasses.replace(policy, sampling=own).sample("12 =", temperature=temperature)
    assert drawn == [own, *(dataclasses.replace(own, temperature=temperature) for temperature in (0.0, 2.0))]


def prompts_with(length: int, size: int) -> Prompts:
    tokens = np.array([[1, 2]], np.int32)
    forced = ForcedPrefixes(jnp.ones((1, 1, size), jnp.int32), jnp.array([[length]]))
    return Prompts(tokens, np.array([2]), np.zeros(1, np.int32), ("",), ("",), ({},), forced=forced)


@pytest.mark.parametrize(
    ("length", "size", "most"),
    [(9, 12, 8), (5, 4, 4), (-1, 4, 4)],  # more than C, more than the prefix has, and less than nothing
)
def test_prefixes_that_do_not_fit_are_refused(policy, length, size, most):
    """A compiled program would move a write that does not fit, without a word."""
    message = f"forced.length_BG holds {length}; allowed is 0 to {most}: prefixes have {size} tokens, and completions 8"
    for draw in (
        lambda prompts: policy.generate(prompts, None, jax.random.key(0)),
        lambda prompts: policy.generate_exact(
            prompts, LayerPlan.full(6), jax.random.key(0), group_size=1, draft_length=2
        ),
    ):
        with pytest.raises(ValueError, match=message):
            draw(prompts_with(length, size))


def test_padding_beyond_the_limit_is_cut(policy, monkeypatch):
    """The caches of drafts have no room for it."""
    given = []

    def draw(*arguments, **_):
        given.append(arguments[7])
        raise InterruptedError

    monkeypatch.setattr(rollout_policy, "generate_exact", draw)
    with pytest.raises(InterruptedError):
        policy.generate_exact(prompts_with(8, 12), LayerPlan.full(6), jax.random.key(0), group_size=1, draft_length=2)
    assert given[0].tokens_BGF.shape == (1, 1, 8) and given[0].length_BG.tolist() == [[8]]


def test_the_limit_of_a_call_is_the_one_that_prefixes_must_fit(policy):
    with pytest.raises(ValueError, match=r"forced\.length_BG holds 4; allowed is 0 to 3"):
        policy.generate(prompts_with(4, 4), None, jax.random.key(0), max_completion_tokens=3)


def test_rows_are_added_until_the_mesh_divides_them(policy, monkeypatch):
    asked = []

    def refilled(*_, rows, **__):
        asked.append(rows)
        raise InterruptedError

    monkeypatch.setattr(rollout_policy, "generate_refilled", refilled)
    prompts = policy.prompts_of(["1 =", "2 ="])
    for shares, expected in ((1, 3), (2, 4)):
        there = policy.on(make_mesh(MeshConfig(data=shares)))
        with pytest.raises(InterruptedError):
            there.generate(prompts, None, jax.random.key(0), group_size=4, rows=3)
        assert asked.pop() == expected


def test_speed_is_measured_on_short_completions(policy, monkeypatch):
    """No stop token ends them, so whole answers of thousands of tokens would take longer than training."""
    monkeypatch.setattr(throughput, "MOST_TOKENS", 3)
    sizes, generate = [], Policy.generate

    def counted(self, *arguments, **options):
        rollouts = generate(self, *arguments, **options)
        sizes.append(np.asarray(rollouts.length_BG).tolist())
        return rollouts

    monkeypatch.setattr(Policy, "generate", counted)
    plan = LayerPlan.skipping(6, [2])
    found = throughput.compare_throughput(policy, policy.prompts_of(["1 ="]), plan, jax.random.key(0), 2, repeats=1)
    assert sizes == [[[3, 3]]] * 4  # each policy once to compile, and once to be timed
    assert (found.kept_layers, found.layers) == (5, 6) and found.nested_speedup > 0
