"""Completions that begin with given tokens: what is sampled after them is what a longer prompt would give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.rollout import schedule
from nested_reft.rollout.exact import generate_exact
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.mixture import mixture_rollouts
from nested_reft.rollout.sampling import GREEDY, SamplingConfig
from nested_reft.types import ForcedPrefixes, Rollouts
from tests.tiny_models import TINY, forward, tiny_model, tiny_prompts

NO_STOP = jnp.array([-1])
SIZE = 7
FULL, NESTED = LayerPlan.full(5), LayerPlan.skipping(5, [1, 3])
both_plans = pytest.mark.parametrize("plan", [FULL, NESTED], ids=["full", "nested"])
LENGTHS = [[0, 1, 3, 6], [6, 0, 2, 5], [4, 7, 1, 0]]  # of 7 tokens: none, one left to sample, and none left

score = jax.jit(completion_logprobs, static_argnames="temperature")


def prefixes(length_BG, size: int = SIZE, seed: int = 3, padding: int = 11) -> ForcedPrefixes:
    """Random first tokens; what is not part of them is `padding`, which must reach nothing."""
    length_BG = jnp.asarray(length_BG)
    tokens_BGF = jax.random.randint(jax.random.key(seed), (*length_BG.shape, size), 0, TINY.vocab_size)
    return ForcedPrefixes(jnp.where(jnp.arange(size) < length_BG[..., None], tokens_BGF, padding), length_BG)


def sample(model, key, forced=None, *, plan=FULL, how="plain", prompts=None, stop_ids=NO_STOP, size=SIZE,
           group_size=4, sampling=None):  # fmt: skip
    """Rollouts of `generate`, or with `how` = exact the full model's that `plan` drafts."""
    inputs = (model, *(tiny_prompts() if prompts is None else prompts), plan, stop_ids, key, 0, forced)
    options = {"group_size": group_size, "max_completion_tokens": size, "sampling": sampling or SamplingConfig()}
    if how == "exact":
        return generate_exact(*inputs, draft_length=2, **options).rollouts
    return generate(*inputs, **options)


def check_prefixes(result: Rollouts, forced: ForcedPrefixes):
    """The given tokens stand in front, without a log-probability, and say that they were given."""
    tokens, logprob, length = (
        np.asarray(x) for x in (result.tokens_BGC, result.behavior_logprob_BGC, result.length_BG)
    )
    assert np.array_equal(result.forced_BG, forced.length_BG)
    for b, g in np.ndindex(length.shape):
        given = int(forced.length_BG[b, g])
        assert given <= length[b, g]
        assert tokens[b, g, :given].tolist() == np.asarray(forced.tokens_BGF)[b, g, :given].tolist()
        assert not logprob[b, g, :given].any() and np.all(logprob[b, g, given : length[b, g]] < 0)
        assert not tokens[b, g, length[b, g] :].any() and not logprob[b, g, length[b, g] :].any()


def check_logprobs(model, result: Rollouts, plan: LayerPlan | None, temperature: float = 1.0):
    """Those of an uncached pass over prompt and completion, at every token that was sampled."""
    inputs = (model, result.prompt_BP, result.prompt_length_B, result.tokens_BGC)
    expected_BGC, _ = score(*inputs, temperature=temperature, plan=plan)
    position_C = np.arange(result.tokens_BGC.shape[-1])
    forced, length = np.asarray(result.forced_BG)[..., None], np.asarray(result.length_BG)[..., None]
    own_BGC = (position_C >= forced) & (position_C < length)
    assert own_BGC.any()
    np.testing.assert_allclose(
        np.asarray(result.behavior_logprob_BGC)[own_BGC], np.asarray(expected_BGC)[own_BGC], atol=1e-4
    )


@both_plans
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_go_on_from_each_rows_own_prefix(plan, temperature, key):
    model, forced = tiny_model(scale=1.5), prefixes(LENGTHS)
    result = sample(model, key, forced, plan=plan, sampling=SamplingConfig(temperature=temperature))
    check_prefixes(result, forced)
    assert jnp.all(result.length_BG == SIZE) and not jnp.any(result.finished_BG) and jnp.all(result.counted_BG)
    check_logprobs(model, result, plan, temperature)


def test_exact_rollouts_go_on_from_each_rows_own_prefix(key):
    """Their log-probabilities are the full model's, whichever layers draft."""
    model, forced = tiny_model(scale=1.5), prefixes(LENGTHS)
    result = sample(model, key, forced, plan=NESTED, how="exact")
    check_prefixes(result, forced)
    assert jnp.all(result.length_BG == SIZE) and not jnp.any(result.finished_BG)
    check_logprobs(model, result, None)


def greedy_continuation(model, plan, prompt: list[int], prefix: list[int], count: int) -> list[int]:
    """Greedy decoding by uncached passes over the prompt with the prefix at its end."""
    known, found = prompt + prefix, []
    sequence = jnp.zeros(32, jnp.int32).at[: len(known)].set(jnp.array(known))
    for end in range(len(known), len(known) + count):  # what comes after `end` reaches nothing before it
        found.append(int(jnp.argmax(forward(model, sequence[None], plan)[0, end - 1])))
        sequence = sequence.at[end].set(found[-1])
    return found


@pytest.mark.parametrize(
    ("how", "plan"), [("plain", FULL), ("plain", NESTED), ("exact", NESTED)], ids=["full", "nested", "exact"]
)
def test_greedy_continuation_is_that_of_a_longer_prompt(how, plan, key):
    """Token for token: a prefix at a wrong position, or padding that is seen, would change an argmax somewhere."""
    model, forced = tiny_model(), prefixes(LENGTHS)
    result = sample(model, key, forced, plan=plan, how=how, sampling=GREEDY)
    tokens_BP, length_B = tiny_prompts()
    for b, g in np.ndindex(3, 4):
        prompt, given = tokens_BP[b, : int(length_B[b])].tolist(), int(forced.length_BG[b, g])
        prefix = forced.tokens_BGF[b, g, :given].tolist()
        expected = greedy_continuation(model, None if how == "exact" else plan, prompt, prefix, SIZE - given)
        assert result.tokens_BGC[b, g].tolist() == prefix + expected, (b, g)


@pytest.mark.parametrize(
    ("how", "plan", "sampling"),
    [("plain", FULL, GREEDY), ("plain", NESTED, SamplingConfig()), ("exact", NESTED, GREEDY)],
    ids=["full", "nested", "exact"],
)
def test_a_rows_own_tokens_bring_back_the_rest(how, plan, sampling, key):
    """Also where they were sampled: a draw belongs to its position in the completion, forced tokens counted."""
    model = tiny_model(scale=1.0)
    whole = sample(model, key, plan=plan, how=how, sampling=sampling)
    forced = ForcedPrefixes(whole.tokens_BGC, jnp.asarray(LENGTHS))
    again = sample(model, key, forced, plan=plan, how=how, sampling=sampling)
    assert jnp.array_equal(again.tokens_BGC, whole.tokens_BGC)
    own_BGC = np.arange(SIZE) >= np.asarray(LENGTHS)[..., None]
    np.testing.assert_allclose(again.behavior_logprob_BGC, np.asarray(whole.behavior_logprob_BGC) * own_BGC, atol=1e-4)


@pytest.mark.parametrize(
    ("how", "plan"), [("plain", FULL), ("plain", NESTED), ("exact", NESTED)], ids=["full", "nested", "exact"]
)
@pytest.mark.parametrize("forced_size", [1, 7])
def test_prefixes_of_no_tokens_change_nothing(how, plan, forced_size, key):
    model, stop_ids = tiny_model(scale=1.0), jnp.array([0, 15])
    nothing = prefixes(np.zeros((3, 4), np.int32), forced_size)
    plain = sample(model, key, plan=plan, how=how, stop_ids=stop_ids)
    forced = sample(model, key, nothing, plan=plan, how=how, stop_ids=stop_ids)
    assert 0 < np.asarray(plain.finished_BG).mean() < 1
    for field in dataclasses.fields(Rollouts):
        np.testing.assert_allclose(
            np.asarray(getattr(forced, field.name), np.float32),
            np.asarray(getattr(plain, field.name), np.float32),
            atol=1e-4 if field.name == "behavior_logprob_BGC" else 0,
            err_msg=field.name,
        )


@pytest.mark.parametrize("how", ["plain", "exact"])
def test_padding_of_a_prefix_reaches_nothing(how, key):
    model = tiny_model()
    some, other = (sample(model, key, prefixes(LENGTHS, padding=p), plan=NESTED, how=how) for p in (11, 29))
    assert jnp.array_equal(some.tokens_BGC, other.tokens_BGC)
    np.testing.assert_allclose(some.behavior_logprob_BGC, other.behavior_logprob_BGC, atol=1e-5)


@pytest.mark.parametrize("how", ["plain", "exact"])
def test_a_stop_token_within_a_prefix_ends_nothing(how, key):
    """The prefixes consist of the stop token alone; a row ends where it is sampled, or at the limit."""
    model, stop_ids = tiny_model(scale=1.0), jnp.arange(0, 31, 5)
    length_BG = jnp.asarray([[0, 1, 3, 6, 7] * 4] * 3)
    forced = ForcedPrefixes(jnp.zeros((3, 20, SIZE), jnp.int32), length_BG)
    result = sample(model, key, forced, how=how, plan=NESTED, stop_ids=stop_ids, group_size=20)
    tokens, length, finished = (np.asarray(x) for x in (result.tokens_BGC, result.length_BG, result.finished_BG))
    for b, g in np.ndindex(length.shape):
        given = int(length_BG[b, g])
        stops = np.flatnonzero(np.isin(tokens[b, g, given : length[b, g]], np.asarray(stop_ids)))
        assert finished[b, g] == (len(stops) > 0)
        assert length[b, g] == (given + stops[0] + 1 if len(stops) else SIZE)
    sampled = np.asarray(length_BG) < SIZE
    assert finished[sampled].any() and not finished[sampled].all() and not finished[~sampled].any()


@pytest.mark.parametrize("forced_size", [20, 64])
def test_long_rollouts_shrink_and_grow_around_prefixes(forced_size, key, monkeypatch):
    """Rows that end are dropped and caches grow, with prefixes of 0 to 20 tokens; neither changes a token."""
    model, stop_ids = tiny_model(dataclasses.replace(TINY, max_positions=128), scale=1.0), jnp.arange(0, 31, 15)
    length_BG = jax.random.randint(jax.random.key(5), (3, 8), 0, 21)
    forced = prefixes(length_BG, forced_size)
    results = []
    for compact_from, grow_from in ((32, 64), (10**9, 10**9)):
        monkeypatch.setattr(schedule, "COMPACT_FROM", compact_from)
        monkeypatch.setattr(schedule, "GROW_FROM", grow_from)
        generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        results.append(sample(model, key, forced, plan=NESTED, stop_ids=stop_ids, size=64, group_size=8))
    generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    shrunk, whole = results
    # Some rows end early and some late, so that rows are dropped while others still need larger caches.
    sampled = np.asarray(whole.length_BG - whole.forced_BG)
    assert sampled.min() < 16 and sampled.max() > 33
    for name in ("tokens_BGC", "length_BG", "finished_BG", "forced_BG"):
        np.testing.assert_array_equal(getattr(shrunk, name), getattr(whole, name), err_msg=name)
    check_prefixes(shrunk, forced)
    check_logprobs(model, shrunk, NESTED)


def test_a_mixture_goes_on_from_the_prefix_of_each_slot(key):
    """Each slot keeps its own prefix, whichever component fills it, and is scored by that component."""
    model, alpha = tiny_model(), 0.4
    length_BG = jax.random.randint(jax.random.key(5), (3, 8), 0, 5)
    forced = prefixes(length_BG)

    def rollout(plan, sample_key, count, prefixes_of_count):
        return sample(model, sample_key, prefixes_of_count, plan=plan, group_size=count)

    result = mixture_rollouts(rollout, key, NESTED, 5, 3, 8, alpha, forced)
    check_prefixes(result, forced)
    nested_BG = np.asarray(result.nested_BG)
    assert nested_BG.any() and not nested_BG.all()
    own_BGC = np.arange(SIZE) >= np.asarray(length_BG)[..., None]
    inputs = (model, result.prompt_BP, result.prompt_length_B, result.tokens_BGC)
    full_BGC, nested_BGC = (np.asarray(score(*inputs, temperature=1.0, plan=plan)[0]) for plan in (FULL, NESTED))
    expected_BGC = np.where(nested_BG[..., None], nested_BGC, full_BGC) * own_BGC
    np.testing.assert_allclose(result.behavior_logprob_BGC, expected_BGC, atol=1e-4)
    assert np.abs((full_BGC - nested_BGC) * own_BGC).max(axis=-1).min() > 1e-3  # the two can be told apart


@pytest.mark.parametrize("how", ["plain", "exact"])
def test_other_prefixes_of_the_same_size_compile_nothing(how, key):
    model, prompts = tiny_model(), tiny_prompts()
    first, second = prefixes(LENGTHS), prefixes(np.flip(np.asarray(LENGTHS), axis=1).copy(), seed=4)
    sample(model, key, first, plan=NESTED, how=how, prompts=prompts)
    counter = CompileCounter()
    sample(model, key, second, plan=NESTED, how=how, prompts=prompts)
    assert counter.count == 0
    counter.close()


@pytest.mark.parametrize("how", ["plain", "exact"])
def test_the_token_after_a_prefix_follows_the_models_distribution(how, key):
    """Chi-square over many rows, half of which begin with one token and half with two."""
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    count, plan = 20_000, NESTED
    length_BG = jnp.asarray([[1, 2] * (count // 2)])
    forced = ForcedPrefixes(jnp.broadcast_to(jnp.array([4, 9]), (1, count, 2)), length_BG)
    result = sample(
        model, key, forced, plan=plan, how=how, prompts=(tokens_BP[:1], length_B[:1]), size=3, group_size=count
    )
    tokens = np.asarray(result.tokens_BGC)[0]
    for given in (1, 2):
        sequence = jnp.concatenate([tokens_BP[0, : int(length_B[0])], jnp.array([4, 9])[:given]])
        logits = forward(model, sequence[None], None if how == "exact" else plan)[0, -1]
        expected = count / 2 * np.asarray(jax.nn.softmax(logits), np.float64)
        observed = np.bincount(tokens[np.asarray(length_BG)[0] == given, given], minlength=31)
        frequent = expected > 5
        grouped = [np.append(values[frequent], values[~frequent].sum()) for values in (observed, expected)]
        statistic = ((grouped[0] - grouped[1]) ** 2 / np.maximum(grouped[1], 1e-9)).sum()
        degrees = frequent.sum()
        assert statistic < degrees + 5 * np.sqrt(2 * degrees), given
