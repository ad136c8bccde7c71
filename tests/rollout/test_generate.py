"""Rollouts: cached decoding against uncached forward passes, stopping, padding, compile counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.models.parameters import parameter_axes
from nested_reft.models.transformer import Transformer
from nested_reft.rollout import generate as generate_module
from nested_reft.rollout import logprobs, schedule
from nested_reft.rollout.generate import generate
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.rollout.sampling import GREEDY, SamplingConfig
from nested_reft.sharding import MeshConfig, make_mesh, replicate, shard_batch, shard_parameters
from tests.tiny_models import TINY, forward, tiny_model, tiny_prompts

NO_STOP = jnp.array([-1])


def rollout(
    model, key, *, plan=None, stop_ids=NO_STOP, prompts=None, group_size=4, size=7, sampling=None, number_B=None
):
    tokens_BP, length_B = tiny_prompts() if prompts is None else prompts
    plan = LayerPlan.full(5) if plan is None else plan
    sampling = SamplingConfig() if sampling is None else sampling
    return generate(
        model,
        tokens_BP,
        length_B,
        plan,
        stop_ids,
        key,
        number_B=number_B,
        group_size=group_size,
        max_completion_tokens=size,
        sampling=sampling,
    )


def right_padded(tokens_BP, valid_BP):
    """Each row's valid tokens moved to the front, in order, and how many there are."""
    order = jnp.argsort(~valid_BP, axis=-1, stable=True)
    return jnp.take_along_axis(tokens_BP, order, axis=-1), valid_BP.sum(axis=-1)


@pytest.mark.parametrize("skipped", [(), (0, 2), (1, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cached_logprobs_equal_an_uncached_forward_pass(skipped, temperature, key):
    model, plan = tiny_model(), LayerPlan.skipping(5, list(skipped))
    result = rollout(model, key, plan=plan, sampling=SamplingConfig(temperature=temperature))
    for b, length in enumerate(result.prompt_length_B.tolist()):
        for g in range(4):
            sequence = jnp.concatenate([result.prompt_BP[b, :length], result.tokens_BGC[b, g]])[None]
            logits = forward(model, sequence, plan)[0, length - 1 : -1] / temperature
            expected = jnp.take_along_axis(jax.nn.log_softmax(logits), result.tokens_BGC[b, g][:, None], 1)[:, 0]
            np.testing.assert_allclose(result.behavior_logprob_BGC[b, g], expected, atol=1e-4)


def test_full_plan_samples_have_weight_one_under_the_update_pass(key):
    model = tiny_model()
    result = rollout(model, key)
    target_logprob_BGC, entropy_BGC = completion_logprobs(
        model, result.prompt_BP, result.prompt_length_B, result.tokens_BGC, 1.0
    )
    np.testing.assert_allclose(jnp.exp(target_logprob_BGC - result.behavior_logprob_BGC), 1.0, atol=1e-4)
    assert jnp.all(entropy_BGC > 0) and jnp.all(entropy_BGC <= np.log(31) + 1e-5)


def test_greedy_rollout_equals_an_uncached_greedy_loop(key):
    model, plan = tiny_model(), LayerPlan.skipping(5, [2])
    result = rollout(model, key, plan=plan, group_size=1, sampling=GREEDY)
    for b, length in enumerate(result.prompt_length_B.tolist()):
        sequence = jnp.zeros(16, jnp.int32).at[:length].set(result.prompt_BP[b, :length])
        for end in range(length, length + 7):  # what comes after `end` reaches nothing before it
            sequence = sequence.at[end].set(jnp.argmax(forward(model, sequence[None], plan)[0, end - 1]))
        assert sequence[length : length + 7].tolist() == result.tokens_BGC[b, 0].tolist()


def test_samples_follow_the_models_distribution(key):
    """The first token of many completions against the exact distribution, by chi-square."""
    model = tiny_model()
    tokens_BP, length_B = tiny_prompts()
    result = rollout(model, key, prompts=(tokens_BP[:1], length_B[:1]), group_size=20_000, size=1)
    probability_V = np.asarray(jax.nn.softmax(forward(model, tokens_BP[:1])[0, int(length_B[0]) - 1]))
    expected = 20_000 * probability_V
    counts = np.bincount(np.asarray(result.tokens_BGC).ravel(), minlength=31)
    frequent = expected > 5
    chi_square = ((counts - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert chi_square < frequent.sum() + 5 * np.sqrt(2 * frequent.sum())


def test_rows_end_at_their_stop_token(key):
    model = tiny_model()
    stop_ids = jnp.array([3, 8, 12, 20, 25])
    result = rollout(model, key, stop_ids=stop_ids, group_size=16, size=10)
    tokens, length, logprob = (
        np.asarray(x) for x in (result.tokens_BGC, result.length_BG, result.behavior_logprob_BGC)
    )
    assert 0 < np.asarray(result.finished_BG).mean() < 1 or np.asarray(result.finished_BG).all()
    for b, g in np.ndindex(length.shape):
        row, end = tokens[b, g], length[b, g]
        assert not np.isin(row[: end - 1], stop_ids).any()
        assert bool(result.finished_BG[b, g]) == bool(np.isin(row[end - 1], stop_ids))
        assert result.finished_BG[b, g] or end == 10
        assert (row[end:] == 0).all() and (logprob[b, g, end:] == 0).all()


def test_prompts_that_stand_beside_a_row_change_nothing(key):
    """Alone, in another order, or in a smaller group, a row draws by its prompt's number and its place in the group."""
    model, (tokens_BP, length_B) = tiny_model(scale=1.0), tiny_prompts()
    whole = rollout(model, key, stop_ids=jnp.arange(0, 31, 9))
    assert len(set(whole.length_BG.ravel().tolist())) > 2
    order = jnp.array([2, 0, 2])
    moved = rollout(
        model, key, stop_ids=jnp.arange(0, 31, 9), prompts=(tokens_BP[order], length_B[order]), number_B=order
    )
    assert moved.tokens_BGC.tolist() == whole.tokens_BGC[order].tolist()
    alone = rollout(
        model, key, stop_ids=jnp.arange(0, 31, 9), prompts=(tokens_BP[1:2], length_B[1:2]), number_B=jnp.array([1]),
        group_size=2,
    )  # fmt: skip
    assert alone.tokens_BGC.tolist() == whole.tokens_BGC[1:2, :2].tolist()


@pytest.fixture
def decoded_rows(monkeypatch):
    """Rows of every decoding step that runs, in order, `[prompts, completions]`."""
    shapes = []
    decode = Transformer.decode

    def counted(model, token_BG, *inputs):
        jax.debug.callback(lambda: shapes.append(token_BG.shape), ordered=True)
        return decode(model, token_BG, *inputs)

    monkeypatch.setattr(Transformer, "decode", counted)
    generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    yield shapes
    generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def test_loop_ends_when_every_row_is_done(key, decoded_rows):
    """With every token a stop token, one token per row is all there is."""
    result = rollout(tiny_model(), key, stop_ids=jnp.arange(31))
    jax.effects_barrier()
    assert jnp.all(result.length_BG == 1) and jnp.all(result.finished_BG) and not decoded_rows
    rollout(tiny_model(), key, stop_ids=jnp.array([-1]), size=6)
    jax.effects_barrier()
    assert decoded_rows == [(3, 4)] * 5


def test_finished_rows_are_dropped_on_the_way(key, decoded_rows):
    """Each decoding step takes the smallest shape that holds the rows still running."""
    result = rollout(tiny_model(), key, stop_ids=jnp.array([3, 8]), size=40)
    jax.effects_barrier()
    expected = []
    for step in range(1, int(result.length_BG.max())):
        running_B = (np.asarray(result.length_BG) > step).sum(axis=1)
        expected.append((3, 1) if running_B.max() <= 1 else (3, 2) if running_B.max() <= 2 else (3, 4))
    assert decoded_rows == expected and len(set(expected)) > 1


def test_stopping_does_not_change_what_came_before(key):
    model = tiny_model()
    free, stopped = rollout(model, key), rollout(model, key, stop_ids=jnp.array([5, 9]))
    for b, g in np.ndindex(3, 4):
        end = int(stopped.length_BG[b, g])
        assert free.tokens_BGC[b, g, :end].tolist() == stopped.tokens_BGC[b, g, :end].tolist()


def test_left_right_and_no_padding_give_the_same_rollouts(key):
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    left = jnp.stack([jnp.roll(row, 9 - int(n)) for row, n in zip(tokens_BP, length_B, strict=True)])
    from_left = rollout(model, key, prompts=right_padded(left, jnp.arange(9) >= 9 - length_B[:, None]))
    wide = jnp.pad(tokens_BP, ((0, 0), (0, 5)), constant_values=11)
    from_right, from_wide = rollout(model, key), rollout(model, key, prompts=(wide, length_B))
    for other in (from_left, from_wide):
        assert jnp.array_equal(from_right.tokens_BGC, other.tokens_BGC)
        np.testing.assert_allclose(from_right.behavior_logprob_BGC, other.behavior_logprob_BGC, atol=2e-5)
    alone = rollout(model, key, prompts=(tokens_BP[1:2, :4], length_B[1:2]), sampling=GREEDY)
    together = rollout(model, key, sampling=GREEDY)
    assert jnp.array_equal(alone.tokens_BGC[0], together.tokens_BGC[1])


def test_a_second_plan_of_the_same_size_compiles_nothing(key):
    model, other_key, other_stop = tiny_model(), jax.random.key(5), jnp.array([4])
    plans = [LayerPlan.skipping(5, skipped) for skipped in ([1], [3], [0, 1, 2, 3])]
    prompts = tiny_prompts()
    rollout(model, key, plan=plans[0], prompts=prompts)
    counter = CompileCounter()
    rollout(model, other_key, plan=plans[1], stop_ids=other_stop, prompts=prompts)
    assert counter.count == 0
    rollout(model, key, plan=plans[2], prompts=prompts)  # one layer: no other test keeps so few
    assert counter.count > 0
    counter.close()


def test_one_completion_token_is_enough(key):
    result = rollout(tiny_model(), key, size=1)
    assert result.tokens_BGC.shape == (3, 4, 1) and jnp.all(result.length_BG == 1)


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (4, 2)])
def test_many_devices_give_the_rollouts_of_one(data, tensor, key):
    prompts = tuple(jnp.concatenate([x, x[:1]]) for x in tiny_prompts())
    model = tiny_model()
    expected = rollout(model, key, prompts=prompts, sampling=SamplingConfig(temperature=0.8))
    mesh = make_mesh(MeshConfig(data=data, tensor=tensor))
    # 31 tokens cannot be split in two; the vocabulary stays whole and everything else is split.
    axes = {name: tuple("_" if a == "vocab" else a for a in names) for name, names in parameter_axes(TINY).items()}
    sharded = Transformer(TINY, shard_parameters(model.parameters(), axes, mesh))
    result = generate(
        sharded,
        *(shard_batch(x, mesh) for x in prompts),
        replicate(LayerPlan.full(5), mesh),
        replicate(NO_STOP, mesh),
        replicate(key, mesh),
        group_size=4,
        max_completion_tokens=7,
        sampling=SamplingConfig(temperature=0.8),
    )
    assert jnp.array_equal(result.tokens_BGC, expected.tokens_BGC)
    # Split sums add up in another order; logits of this model reach 30, so 1e-4 would be float32's own limit.
    np.testing.assert_allclose(result.behavior_logprob_BGC, expected.behavior_logprob_BGC, atol=5e-4)


@pytest.mark.parametrize("block_size", [1, 3])
def test_blocks_of_positions_change_neither_logprobs_nor_gradient(key, monkeypatch, block_size):
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()
    tokens_BGC = jax.random.randint(key, (len(length_B), 2, 7), 0, 31)

    def both(parameters):
        logprob, entropy = completion_logprobs(
            Transformer(model.config, parameters), tokens_BP, length_B, tokens_BGC, 0.7, differentiable_entropy=True
        )
        return (jnp.sin(logprob) + jnp.cos(entropy)).sum(), (logprob, entropy)

    whole_gradient, whole = jax.jit(jax.grad(both, has_aux=True))(model.parameters())
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", block_size * 2 * len(length_B) * 31)
    gradient, blocks = jax.jit(jax.grad(both, has_aux=True))(model.parameters())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), (gradient, blocks), (whole_gradient, whole)
    )


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_logprob_and_entropy_and_their_gradients_are_those_of_the_definition(shift, key):
    logits, token = 5 * jax.random.normal(key, (3, 4, 31)), jax.random.randint(key, (3, 4), 0, 31)

    def definition(logits):
        logprob = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logprob, token[..., None], -1)[..., 0], -jnp.sum(jnp.exp(logprob) * logprob, axis=-1)

    def ours(logits, differentiable=True):
        return logprobs.logprob_and_entropy(logits, token, differentiable)

    atol = 1e-5 if shift == 0 else 0.02  # such logits are 0.001 apart
    for found, expected in zip(ours(logits + shift), definition(logits), strict=True):
        np.testing.assert_allclose(found, expected, atol=atol)
    for part in (0, 1):
        gradient, expected = (jax.grad(lambda x, f=f, part=part: f(x)[part].sum())(logits) for f in (ours, definition))
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert not np.any(jax.grad(lambda x: ours(x, False)[1].sum())(logits))
    flat = logprobs.logprob_and_entropy(jnp.zeros(31), jnp.zeros((), int))
    np.testing.assert_allclose(flat, [-np.log(31), np.log(31)], atol=1e-6)


@pytest.mark.parametrize("kept", [1, 2, 30])
def test_excluded_tokens_add_nothing_to_entropy_and_its_gradient(kept, key):
    """0 log 0 is 0; with a product of 0 and -inf, loss and gradient would be NaN."""
    logits = 5 * jax.random.normal(key, (31,))
    excluded = jnp.where(jnp.arange(31) < kept, logits, -jnp.inf)

    def both(logits):
        return sum(logprobs.logprob_and_entropy(logits, jnp.zeros((), int), differentiable_entropy=True))

    value, gradient = jax.value_and_grad(both)(excluded)
    expected, expected_gradient = jax.value_and_grad(both)(logits[:kept])
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    np.testing.assert_allclose(gradient[:kept], expected_gradient, atol=1e-5)
    assert not np.any(gradient[kept:])


def test_completions_of_one_token_can_be_scored():
    """All of a batch may be a lone stop token; the update then cuts it to one position."""
    model, (prompt_BP, length_B) = tiny_model(), tiny_prompts()
    tokens_BGC = jnp.array([[[3], [4]]] * 3)
    score = jax.jit(completion_logprobs, static_argnames="temperature")
    one, _ = score(model, prompt_BP, length_B, tokens_BGC, temperature=1.0)
    padded, _ = score(model, prompt_BP, length_B, jnp.pad(tokens_BGC, ((0, 0), (0, 0), (0, 2))), temperature=1.0)
    np.testing.assert_allclose(one, padded[..., :1], rtol=1e-5)
    assert len(set(np.asarray(one).ravel().tolist())) == 6


@pytest.mark.parametrize(("skipped", "shared"), [((), 3), ((0, 2), 1)])
def test_a_shared_prefix_run_once_changes_nothing(skipped, shared, key):
    model, plan = tiny_model(scale=1.0), LayerPlan.skipping(5, list(skipped))
    tokens_BP, length_B = tiny_prompts()
    tokens_BP = tokens_BP.at[:, :shared].set(tokens_BP[0, :shared])
    valid_BP = jnp.arange(9) < length_B[:, None]
    whole, parts = (model.prefill(tokens_BP, valid_BP, plan, shared_prefix=q) for q in (0, shared))
    np.testing.assert_allclose(parts.last_hidden_BD, whole.last_hidden_BD, atol=1e-4)
    mask = valid_BP[None, :, None, :, None]
    np.testing.assert_allclose(parts.layers.key * mask, whole.layers.key * mask, atol=1e-4)
    np.testing.assert_allclose(parts.layers.value * mask, whole.layers.value * mask, atol=1e-4)

    tokens_BGC = jax.random.randint(key, (3, 4, 6), 0, TINY.vocab_size)

    def loss(model, shared_prefix):
        logprob_BGC, _ = completion_logprobs(
            model, tokens_BP, length_B, tokens_BGC, 1.0, plan, shared_prefix=shared_prefix
        )
        return jnp.sum(jnp.sin(jnp.arange(72.0)).reshape(3, 4, 6) * logprob_BGC), logprob_BGC

    gradients, logprobs = zip(
        *(jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(model, q) for q in (0, shared)), strict=True
    )
    np.testing.assert_allclose(logprobs[1], logprobs[0], atol=1e-4)
    for name, gradient in gradients[0].parameters().items():
        error = jnp.linalg.norm(gradients[1].parameters()[name] - gradient)
        assert error < 1e-4 * jnp.linalg.norm(gradient), name


def test_a_prefix_that_is_not_shared_would_show(key):
    model = tiny_model()
    tokens_BP, length_B = tiny_prompts()  # different from the first token on
    valid_BP = jnp.arange(9) < length_B[:, None]
    whole, parts = (model.prefill(tokens_BP, valid_BP, shared_prefix=q).last_hidden_BD for q in (0, 3))
    assert jnp.abs(parts[0] - whole[0]).max() < 1e-4 < jnp.abs(parts[1:] - whole[1:]).max()


def test_compactions_halve_groups_first():
    assert schedule.compactions_of(3, 8, 32) == [(3, 4), (3, 2), (3, 1)]
    assert schedule.compactions_of(7, 1, 32) == [(4, 1), (2, 1)]
    assert schedule.compactions_of(8, 8, 31) == []  # too short to pay


def test_caches_hold_a_quarter_half_and_all():
    assert schedule.cache_sizes(128) == [32, 64, 127]
    assert schedule.cache_sizes(63) == [62] and schedule.cache_sizes(1) == [1]


def test_decoding_grows_caches_and_drops_rows():
    model, (tokens_BP, length_B) = tiny_model(), tiny_prompts()

    def run(model):
        return generate.__wrapped__(  # pyright: ignore[reportAttributeAccessIssue]
            model, tokens_BP, length_B, LayerPlan.skipping(5, [1]), jnp.array([0]), jax.random.key(0),
            group_size=8, max_completion_tokens=64, sampling=SamplingConfig(),
        )  # fmt: skip

    program = str(jax.make_jaxpr(run)(model))
    for group, cached in ((8, 16), (8, 32), (8, 63), (4, 63), (2, 63), (1, 63)):
        assert f"f32[4,3,{group},2,{cached},8]" in program  # S, B, G, J, C, K


def test_growing_caches_changes_nothing(key, monkeypatch):
    results = []
    for grow_from in (10**9, 8):
        monkeypatch.setattr(schedule, "GROW_FROM", grow_from)
        generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        plan = LayerPlan.skipping(5, [1])
        results.append(
            rollout(tiny_model(scale=1.0), key, plan=plan, stop_ids=jnp.arange(0, 31, 9), group_size=8, size=23)
        )
    generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    whole, grown = results
    assert len(set(whole.length_BG.ravel().tolist())) > 4 and whole.length_BG.max() > 12  # ends in every phase
    for name in ("tokens_BGC", "length_BG", "finished_BG"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(grown.behavior_logprob_BGC, whole.behavior_logprob_BGC, atol=1e-4)


@pytest.mark.parametrize("skipped", [(), (0, 2)])
@pytest.mark.parametrize("group_size", [8, 1])
def test_dropping_finished_rows_changes_nothing(skipped, group_size, key, monkeypatch):
    model, plan, stop_ids = tiny_model(scale=1.0), LayerPlan.skipping(5, list(skipped)), jnp.arange(0, 31, 5)
    prompts = None
    if group_size == 1:
        prompts = jax.random.randint(key, (8, 9), 0, TINY.vocab_size), jnp.arange(2, 10)
    results = []
    for compact_from in (10**9, 8):
        monkeypatch.setattr(schedule, "COMPACT_FROM", compact_from)
        generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
        results.append(
            rollout(model, key, plan=plan, stop_ids=stop_ids, prompts=prompts, group_size=group_size, size=24)
        )
    generate.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    whole, compacted = results
    assert len(set(whole.length_BG.ravel().tolist())) > 2  # rows end at different times, most of them early
    for name in ("tokens_BGC", "length_BG", "finished_BG"):
        np.testing.assert_array_equal(getattr(compacted, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(compacted.behavior_logprob_BGC, whole.behavior_logprob_BGC, atol=1e-4)


def test_compacted_rows_are_those_that_run():
    model = tiny_model()
    tokens_BP, length_B = tiny_prompts()
    prompt = model.prefill(tokens_BP, jnp.arange(9) < length_B[:, None])
    done_BG = jnp.array([[True, True, False, True], [True, True, True, True], [False, True, True, False]])
    number_BG = jnp.arange(12).reshape(3, 4)
    state = generate_module._DecodeState(
        step=jnp.array(1),
        tokens_BGC=number_BG[..., None],
        logprob_BGC=jnp.zeros((3, 4, 1)),
        length_BG=jnp.ones((3, 4), jnp.int32),
        done_BG=done_BG,
        cache=jax.tree.map(lambda a: a + number_BG[None, :, :, None, None, None], model.empty_cache(3, 4, 2, None)),
    )
    part, rows, part_prompt = generate_module._compacted(state, generate_module._Rows(), prompt, 2, 2)
    assert rows.of(number_BG).tolist() == [[2, 0], [8, 11]]
    assert part.cache.key[3, ..., 0, 1, 5].tolist() == [[2, 0], [8, 11]]
    np.testing.assert_array_equal(part_prompt.layers.value, prompt.layers.value[:, jnp.array([0, 2])])
    _, rows, _ = generate_module._compacted(part, rows, part_prompt, 2, 1)  # of what is left
    assert rows.of(number_BG).tolist() == [[2], [8]]
    assert rows.put(0 * number_BG, jnp.array([[5], [7]])).ravel().nonzero()[0].tolist() == [2, 8]
