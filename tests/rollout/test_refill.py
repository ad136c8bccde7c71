"""Rows that take the next completion: the samples of each prompt alone, and a batch that stays full."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.models.low_precision import low_precision
from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer
from nested_reft.rollout import schedule
from nested_reft.rollout.generate import generate
from nested_reft.rollout.mixture import mixture_rollouts
from nested_reft.rollout.refill import generate_refilled
from nested_reft.rollout.sampling import SamplingConfig
from nested_reft.rollout.schedule import cached_tokens, refills, stocked_prompts
from nested_reft.sharding import MeshConfig, make_mesh, on_mesh, replicate, shard_batch, shard_parameters
from nested_reft.types import ForcedPrefixes, Rollouts
from tests.tiny_models import TINY, tiny_model

PROMPTS, GROUP, SIZE = 8, 2, 32  # as long as rows begin to be dropped
FULL, NESTED = LayerPlan.full(5), LayerPlan.skipping(5, [1, 3])
STOPS = jnp.array([0, 14])
# Rows of 1, of all but one token, and of all tokens, which are done before they begin; and shorter ones.
GIVEN = np.array([[0, 3], [1, 0], [31, 2], [32, 6], [0, 0], [5, 32], [1, 0], [0, 0]])


def prompts():
    tokens_BP = jax.random.randint(jax.random.key(7), (PROMPTS, 9), 0, TINY.vocab_size)
    return tokens_BP, jnp.array([9, 4, 6, 2, 7, 1, 5, 3])


def prefixes() -> ForcedPrefixes:
    tokens_BGF = jax.random.randint(jax.random.key(3), (PROMPTS, GROUP, SIZE), 1, TINY.vocab_size)
    return ForcedPrefixes(jnp.where(jnp.arange(SIZE) < GIVEN[..., None], tokens_BGF, 11), jnp.asarray(GIVEN))


def sample(model, key, plan=FULL, forced=None, rows=0, number_B=None, group_size=GROUP, inputs=None, size=SIZE):
    """Rollouts of all prompts, or of those given, by so many rows; 0 is the plain program."""
    program = partial(generate_refilled, rows=rows) if rows else generate
    return program(
        model, *(prompts() if inputs is None else inputs), plan, STOPS, key, 0, forced, number_B,
        group_size=group_size, max_completion_tokens=size, sampling=SamplingConfig(),
    )  # fmt: skip


def assert_same(found: Rollouts, expected: Rollouts, atol: float = 1e-4):
    for field in dataclasses.fields(Rollouts):
        values = [np.asarray(getattr(each, field.name)) for each in (found, expected)]
        if field.name == "behavior_logprob_BGC":
            np.testing.assert_allclose(values[0], values[1], atol=atol)
        else:
            np.testing.assert_array_equal(values[0], values[1], err_msg=field.name)


@pytest.mark.parametrize(
    ("precision", "plan", "forced", "size"),
    [
        (None, FULL, None, 64),  # long enough for caches that grow
        (None, NESTED, prefixes(), SIZE),
        ("bfloat16", NESTED, None, SIZE),
        ("int8", FULL, prefixes(), SIZE),
    ],
    ids=["full", "nested-prefixes", "bfloat16-nested", "int8-prefixes"],
)
def test_each_prompt_has_the_samples_that_it_has_alone(precision, plan, forced, size, key):
    """Four rows for sixteen completions: slots are used again, and the tail is dropped to two rows."""
    model = tiny_model(scale=1.0)
    model = model if precision is None else low_precision(model, precision)
    found = sample(model, key, plan, forced, rows=4, size=size)
    tokens_BP, length_B = prompts()
    alone = [
        sample(
            model, key, plan, None if forced is None else jax.tree.map(lambda x, b=b: x[b : b + 1], forced),
            number_B=jnp.array([b]), inputs=(tokens_BP[b : b + 1], length_B[b : b + 1]), size=size,
        )
        for b in range(PROMPTS)
    ]  # fmt: skip
    # Sums of another order, rounded to bfloat16, are off by more.
    assert_same(found, jax.tree.map(lambda *x: jnp.concatenate(x), *alone), 1e-4 if precision is None else 0.1)
    # Rows end early and late, so caches are used again and read in each of their sizes.
    sampled_BG = np.asarray(found.length_BG - found.forced_BG)
    assert sampled_BG.sum() > 3.5 * SIZE and len(set(sampled_BG.ravel().tolist())) > 4
    assert sampled_BG.max() > size / 2 and np.asarray(found.finished_BG).any()


def test_a_mixture_is_refilled_in_each_of_its_parts(key):
    model, results = tiny_model(scale=1.0), []
    for rows in (0, 2):

        def rollout(plan, sample_key, count, forced, rows=rows):
            return sample(model, sample_key, plan, forced, rows=rows, group_size=count, size=8)

        results.append(mixture_rollouts(rollout, key, NESTED, 5, PROMPTS, 4, 0.4))
    assert_same(results[1], results[0])
    assert 0 < np.asarray(results[0].nested_BG).mean() < 1


def test_devices_that_share_rows_sample_the_same(key):
    model, forced = tiny_model(scale=1.0), prefixes()
    expected = sample(model, key, NESTED, forced, rows=4)
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    # 31 tokens cannot be split in two.
    axes = {name: tuple("_" if a == "vocab" else a for a in names) for name, names in parameter_axes(TINY).items()}
    sharded = Transformer(TINY, shard_parameters(model.parameters(), axes, mesh))
    with on_mesh(mesh):
        found = generate_refilled(
            sharded, *(shard_batch(x, mesh) for x in prompts()), *replicate((NESTED, STOPS, key), mesh), 0,
            shard_batch(forced, mesh), group_size=GROUP, max_completion_tokens=SIZE, sampling=SamplingConfig(), rows=4,
        )  # fmt: skip
    assert_same(found, expected, 5e-4)


def test_rows_stay_full_and_prompts_run_once(key, monkeypatch):
    """The steps of four rows are hardly more than the tokens ask for, until too few completions are left."""
    steps, stocked = [], []
    decode, prefill = Transformer.decode, Transformer.prefill

    def counted_decode(model, token_BG, *inputs):
        jax.debug.callback(lambda: steps.append(token_BG.shape[0]), ordered=True)
        return decode(model, token_BG, *inputs)

    def counted_prefill(model, prompt_BP, *inputs):
        jax.debug.callback(lambda: stocked.append(prompt_BP.shape[0]), ordered=True)
        return prefill(model, prompt_BP, *inputs)

    monkeypatch.setattr(Transformer, "decode", counted_decode)
    monkeypatch.setattr(Transformer, "prefill", counted_prefill)
    generate_refilled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    found = sample(tiny_model(scale=1.0), key, rows=4)
    jax.effects_barrier()
    generate_refilled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    tokens, longest = int(found.length_BG.sum()), int(found.length_BG.max())
    assert stocked == [1] * PROMPTS
    # A completion that begins last can be no longer than the longest.
    assert tokens / 4 <= len(steps) <= tokens / 4 + longest
    assert sum(steps[: int(tokens / 4) - longest]) == 4 * max(int(tokens / 4) - longest, 0)
    assert set(steps) == {4, 2} and sorted(steps, reverse=True) == steps


@pytest.mark.parametrize(
    ("rows", "group", "is_forced"),
    [
        pytest.param(4, 1, False, id="as many prompts as rows", marks=pytest.mark.slow),
        pytest.param(5, 2, True, id="prefixes"),
        pytest.param(3, 1, False, id="the last prompts fill no batch"),
    ],
)
def test_several_prompts_wait_together(rows, group, is_forced, key, monkeypatch):
    """Where all rows take completions at once, these belong to several prompts."""
    monkeypatch.setattr(schedule, "REFILL_SHARE", 1)
    assert stocked_prompts(rows, group) > 1
    # What was compiled before has the share of then.
    generate_refilled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    given, model = prefixes(), tiny_model(scale=1.0)
    forced = ForcedPrefixes(given.tokens_BGF[..., :8], jnp.minimum(given.length_BG, 8)) if is_forced else None
    found, expected = (sample(model, key, NESTED, forced, count, None, group, size=8) for count in (rows, 0))
    generate_refilled.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    assert_same(found, expected)


def test_other_values_compile_nothing(key):
    model, (tokens_BP, length_B), given = tiny_model(scale=1.0), prompts(), prefixes()
    sample(model, key, NESTED, given, rows=4, inputs=(tokens_BP, length_B))
    # Made first, since that compiles too.
    other = jax.random.key(5), LayerPlan.skipping(5, [0, 2]), jax.tree.map(lambda x: x[::-1], given)
    inputs = tokens_BP[::-1], length_B[::-1]
    counter = CompileCounter()
    sample(model, *other, rows=4, inputs=inputs)
    assert counter.count == 0
    counter.close()


def test_caches_are_those_of_the_rows():
    """16 rows of 10 + 8 slots; two rows take new completions at once, whose one prompt waits beside them."""
    assert cached_tokens(100, 4, 10, 8, 16) == 16 * (10 + 8) + 10
    assert cached_tokens(100, 1, 10, 8, 16) == 16 * (10 + 8) + 2 * 10
    # A whole batch holds no last token, which is never fed.
    assert cached_tokens(3, 4, 10, 8, 0) == cached_tokens(3, 4, 10, 8, 12) == 3 * (10 + 4 * 7)
    # Prefixes of 3 wait on the shelf, one for each completion of its prompts, and stand in front of a whole batch.
    assert cached_tokens(100, 4, 10, 8, 16, 3) == 16 * (10 + 8) + 10 + 4 * 3
    assert cached_tokens(100, 4, 10, 8, 16, 8) == 16 * (10 + 9) + 10 + 4 * 8
    assert cached_tokens(3, 4, 10, 8, 0, 3) == 3 * (10 + 4 * (3 + 7))
    assert refills(11, 12) and not refills(12, 12) and not refills(0, 12)
