"""One update: its gradient is that of the whole batch's loss, however the batch is split, for every objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nested_reft.compilation import CompileCounter
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.config import PolicyGradientConfig
from nested_reft.losses.objective import LossOutput, Objective, TargetPass
from nested_reft.losses.policy_gradient import PolicyGradient
from nested_reft.losses.supervised import Supervised
from nested_reft.losses.trajectory_balance import TrajectoryBalance, TrajectoryBalanceConfig
from nested_reft.models.layer_loop import Remat
from nested_reft.models.lora import LoraConfig, add_lora, split_trainable
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.sharding import MeshConfig, make_mesh, replicate, shard_batch
from nested_reft.training.step import (
    BaseModel,
    LearnerTask,
    UpdatePlans,
    UpdateResult,
    initial_train_state,
    make_update,
)
from nested_reft.types import TrainBatch
from tests.tiny_models import TINY, tiny_model

B, G, P, C = 8, 3, 5, 4
SHAPE = dataclasses.replace(TINY, num_layers=3)
TEMPERATURE = 0.7
NESTED = LayerPlan.skipping(3, [1])
EVERYTHING = PolicyGradientConfig(
    "leave_one_out", "base", "token", "token_mean", clip_high=0.3, reference_kl="k3_loss", reference_kl_coefficient=0.3,
    entropy_coefficient=0.2, self_distillation_coefficient=0.5,
)  # fmt: skip
# Its divisor is a sum of weights, which differ between micro-batches: an average of averages would go wrong most. The
# entropy bonus has another divisor. A mask takes some completions out of the sum, and a clip acts beside the weight.
SELF_NORMALIZED = PolicyGradientConfig(
    "leave_one_out", "base", "token", "group_token_mean", self_normalized=True, reference_kl="k1_in_reward",
    reference_kl_coefficient=0.3, entropy_coefficient=0.2, clip_policies="three", clip_level="sequence", clip_low=0.2,
    reject_by="geometric_mean", reject_below=0.8, reject_above=1.2,
)  # fmt: skip
MIXTURE = PolicyGradientConfig("leave_one_out", "mixture", "sequence", "fixed_length", fixed_length_tokens=C)
OBJECTIVES: dict[str, Objective] = {
    "everything": PolicyGradient(EVERYTHING),
    "self-normalized": PolicyGradient(SELF_NORMALIZED),
    "mixture": PolicyGradient(MIXTURE),
    "supervised": Supervised(demonstrations=True),
    "trajectory balance": TrajectoryBalance(TrajectoryBalanceConfig(beta=0.5)),
}
KEEP_GRADIENT = optax.GradientTransformation(
    lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    lambda gradient, state, parameters: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)
"""An optimizer that changes nothing and whose state is the latest gradient, to the last digit."""


@functools.cache
def parts_of_model(lora: bool):
    """Structure, trainable and frozen parameters; adapters are off zero, so that both of their factors matter."""
    model = tiny_model(SHAPE, scale=1.0)
    if lora:
        add_lora(model, LoraConfig(rank=2), jax.random.key(1))
        adapters = nnx.state(model, nnx.LoRAParam)
        nnx.update(model, jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), adapters))
    return split_trainable(model)


@functools.cache
def batch_of(objective: str) -> TrainBatch:
    """Groups of unequal lengths, with forced tokens and completions that do not count; all of it off-policy."""
    keys = jax.random.split(jax.random.key(0), 10)
    shape = (B, G, C)
    prompt_BP = jax.random.randint(keys[0], (B, P), 0, SHAPE.vocab_size).at[:, :2].set(5)
    prompt_length_B = jax.random.randint(keys[1], (B,), 3, P + 1)
    tokens_BGC = jax.random.randint(keys[2], shape, 0, SHAPE.vocab_size)
    score = jax.jit(completion_logprobs, static_argnames="temperature")
    inputs = (tiny_model(SHAPE, scale=1.0), prompt_BP, prompt_length_B, tokens_BGC)
    logprob_BGC, _ = score(*inputs, temperature=TEMPERATURE)

    def near(index: int) -> jax.Array:
        return logprob_BGC + 0.4 * jax.random.normal(keys[index], shape)

    batch = TrainBatch(
        prompt_BP=prompt_BP,
        prompt_length_B=prompt_length_B,
        tokens_BGC=tokens_BGC,
        length_BG=jax.random.randint(keys[3], (B, G), 1, C + 1),
        forced_BG=jax.random.randint(keys[4], (B, G), 0, 2),
        counted_BG=jax.random.bernoulli(keys[5], 0.8, (B, G)),
        signal_BG=jax.random.normal(keys[6], (B, G)),
    )
    if objective == "supervised":
        return dataclasses.replace(batch, signal_BG=(batch.signal_BG > -0.5).astype(jnp.float32))
    return dataclasses.replace(
        batch,
        behavior_logprob_BGC=near(7),
        old_logprob_BGC=near(8),
        reference_logprob_BGC=near(9),
        beta_B=jnp.linspace(0.2, 0.8, B) if objective == "trajectory balance" else None,
        nested_logprob_BGC=near(7) if objective == "mixture" else None,
        full_share_BG=jnp.linspace(0.2, 0.8, B * G).reshape(B, G) if objective == "mixture" else None,
    )


@functools.cache
def task(objective: str, micro_batches: int = 1, remat: Remat = "none", shared_prefix: int = 0) -> LearnerTask:
    return LearnerTask(OBJECTIVES[objective], KEEP_GRADIENT, TEMPERATURE, 1, micro_batches, remat, shared_prefix, C)


def plans_of(objective: str) -> UpdatePlans:
    return UpdatePlans(nested=NESTED if objective == "everything" else None)


compiled_update = functools.cache(make_update)  # tests of the same task share its compiled program


@functools.cache
def updated(objective: str, micro_batches: int = 1, data: int = 1, lora: bool = False):
    """`update_once` on the objective's own batch; several tests look at the same update."""
    return update_once(task(objective, micro_batches), batch_of(objective), plans_of(objective), data, lora)


def update_once(made: LearnerTask, batch: TrainBatch, plans: UpdatePlans, data: int = 1, lora: bool = False):
    """Gradient by parameter, and the result, of one update on `data` devices."""
    mesh = make_mesh(MeshConfig(data=data))
    graph, trainable, frozen = parts_of_model(lora)
    state = replicate(initial_train_state(jax.tree.map(jnp.copy, trainable), made.optimizer), mesh)
    base = BaseModel(replicate(frozen, mesh), graph)
    state, result = compiled_update(made)(state, base, shard_batch(batch, mesh), replicate(plans, mesh))
    assert int(state.updates) == 1 - int(result.rejected) and not result.nonfinite
    return jax.device_get((state.optimizer_state, result))


@functools.cache
def expected_gradient(objective: str, lora: bool = False):
    """The loss written out from the model's own log-probabilities and differentiated as one mean."""
    batch, config = batch_of(objective), OBJECTIVES[objective]
    graph, trainable, frozen = parts_of_model(lora)

    def logits_of(model: Transformer, plan: LayerPlan | None) -> jax.Array:
        """Of every completion token, by a plain pass over whole sequences whose prompts are padded on the left."""
        padding_B1 = P - batch.prompt_length_B[:, None]
        prompt_BP = jnp.take_along_axis(batch.prompt_BP, (jnp.arange(P) - padding_B1) % P, axis=1)
        prompt_BGP = jnp.broadcast_to(prompt_BP[:, None], (B, G, P))
        sequence_NT = jnp.concatenate([prompt_BGP, batch.tokens_BGC], axis=-1).reshape(B * G, P + C)
        valid_NT = jnp.repeat(jnp.arange(P + C) >= padding_B1, G, axis=0)
        logits_NTV = model(sequence_NT, valid_NT, plan)
        return logits_NTV[:, P - 1 : -1].reshape(B, G, C, -1) / TEMPERATURE

    def loss(trainable):
        model = nnx.merge(graph, trainable, frozen)
        log_probability_BGCV = jax.nn.log_softmax(logits_of(model, None))
        probability_BGCV = jnp.exp(log_probability_BGCV)
        entropy_BGC = -(probability_BGCV * log_probability_BGCV).sum(axis=-1)
        kl_BGC = None
        if objective == "everything":
            nested_BGCV = jax.nn.log_softmax(logits_of(model, NESTED))
            teacher = jax.lax.stop_gradient((probability_BGCV, log_probability_BGCV))
            kl_BGC = (teacher[0] * (teacher[1] - nested_BGCV)).sum(axis=-1)
        logprob_BGC = jnp.take_along_axis(log_probability_BGCV, batch.tokens_BGC[..., None], axis=-1)[..., 0]
        return config.loss(TargetPass(logprob_BGC, entropy_BGC, kl_BGC), batch).mean()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(trainable))


def named(gradient) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(gradient)}


def check_gradient(found, expected):
    found, expected = named(found), named(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(value) > 0, name
        # Sums in another order: a few of float32's digits, over sums of some hundred terms.
        assert np.linalg.norm(found[name] - value) < 2e-5 * np.linalg.norm(value), name


SPLITS = [(1, 1), (2, 1), (4, 1), (1, 8), (2, 4)]
CASES = [(name, *split) for name in ("everything", "mixture", "supervised") for split in SPLITS]
CASES += [("self-normalized", *split) for split in SPLITS[:2]]
CASES += [("trajectory balance", 2, 4)]


@pytest.mark.parametrize(
    ("objective", "micro_batches", "data"), [*CASES, *(("self-normalized", *split) for split in SPLITS[:3])]
)
def test_gradient_is_that_of_the_whole_batch(objective, micro_batches, data):
    """A mean over micro-batches or devices of their means would weigh tokens by how few stand beside them."""
    gradient, result = updated(objective, micro_batches, data)
    loss, expected = expected_gradient(objective)
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-5)
    check_gradient(gradient, expected)
    assert float(result.gradient_norm) == pytest.approx(float(optax.global_norm(expected)), rel=1e-5)


@pytest.mark.parametrize(("micro_batches", "data"), [(1, 1), (4, 1), (2, 4)])
def test_adapters_get_the_gradient_of_the_whole_batch_and_nothing_else_does(micro_batches, data):
    gradient, _ = updated("everything", micro_batches, data, lora=True)
    assert all("lora" in name for name in named(gradient))
    check_gradient(gradient, expected_gradient("everything", lora=True)[1])


def test_a_mean_of_means_would_not_pass():
    """The tolerance can tell: two halves of the batch, each divided by its own weight, are far off."""
    batch, everything = batch_of("everything"), task("everything")
    halves = [jax.tree.map(lambda x, first=first: x[first::2], batch) for first in (0, 1)]
    found = [update_once(everything, half, plans_of("everything"))[0] for half in halves]
    mean = named(jax.tree.map(lambda a, b: (a + b) / 2, *found))
    expected = named(expected_gradient("everything")[1])
    assert min(np.linalg.norm(mean[n] - v) / np.linalg.norm(v) for n, v in expected.items()) > 1e-3


@pytest.mark.parametrize("objective", ["everything", "mixture"])
def test_what_is_reported_does_not_depend_on_the_split(objective):
    """Every number of the result, health included, which is computed from the joined log-probabilities."""
    results: list[UpdateResult] = [
        updated(objective, micro_batches, data)[1] for micro_batches, data in ((1, 1), (4, 1), (2, 4))
    ]
    whole = named(results[0])
    assert {".loss", ".entropy", ".health.ess_token", ".weight_BGC", ".parts['ess_weight']"} <= whole.keys()
    for split in results[1:]:
        for name, value in named(split).items():
            np.testing.assert_allclose(value, whole[name], rtol=2e-4, atol=1e-6, err_msg=name)
    mask_BGC = np.asarray(batch_of(objective).mask_BGC)
    assert not results[0].weight_BGC[~mask_BGC].any() and results[0].weight_BGC[mask_BGC].all()


def test_memory_savers_change_nothing():
    """Rematerialisation, and a prefix that all prompts share and that runs once."""
    saving = task("everything", remat="full", shared_prefix=2)
    gradient, _ = update_once(saving, batch_of("everything"), plans_of("everything"))
    check_gradient(gradient, expected_gradient("everything")[1])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_demonstrations_have_no_behavior_policy(micro_batches):
    """Cross-entropy per token of the demonstrations, and nothing said about how far off-policy they are."""
    batch = batch_of("supervised")
    assert batch.behavior_logprob_BGC is None
    _, result = updated("supervised", micro_batches)
    assert result.health is None and result.entropy is None
    inputs = (tiny_model(SHAPE, scale=1.0), batch.prompt_BP, batch.prompt_length_B, batch.tokens_BGC)
    score = jax.jit(completion_logprobs, static_argnames="temperature")
    logprob_BGC = np.asarray(score(*inputs, temperature=TEMPERATURE)[0], np.float64)
    chosen_BGC = np.asarray(batch.mask_BGC) & (np.asarray(batch.signal_BG) == 1)[..., None]
    assert 0 < chosen_BGC.sum() < np.asarray(batch.mask_BGC).sum()
    assert float(result.loss) == pytest.approx(-logprob_BGC[chosen_BGC].mean(), rel=1e-5)
    assert np.array_equal(result.weight_BGC, chosen_BGC.astype(np.float32))


@pytest.mark.parametrize("objective", ["everything", "self-normalized", "mixture", "supervised"])
def test_a_batch_in_which_nothing_counts_has_no_gradient(objective):
    batch = batch_of(objective)
    batch = dataclasses.replace(batch, counted_BG=jnp.zeros_like(batch.counted_BG))
    gradient, result = update_once(task(objective, 2), batch, plans_of(objective))
    for value in named(gradient).values():
        assert not value.any()
    # No mask can be suggested from no ratio at all.
    assert all(np.isnan(value).all() for value in (result.bounds or {}).values())
    rest = dataclasses.replace(result, bounds=None)
    assert all(np.isfinite(value).all() for value in named(rest).values())


def test_a_demonstration_batch_needs_its_own_objective():
    """The needs say what an update reads: without a behavior policy a policy gradient would have no ratio."""
    assert Supervised().needs(1).off_policy and not Supervised(demonstrations=True).needs(1).off_policy
    with pytest.raises(ValueError, match=r"needs batch\.behavior_logprob_BGC"):
        update_once(task("everything"), batch_of("supervised"), plans_of("everything"))


class SteepAtZero(Supervised):
    """A loss that is finite with a gradient that is not: the slope of a root at zero, times zero."""

    def loss(self, target: TargetPass, batch: TrainBatch) -> LossOutput:
        output = super().loss(target, batch)
        root = jnp.sqrt(0 * target.logprob_BGC.sum())
        return dataclasses.replace(output, total=dataclasses.replace(output.total, sum=output.total.sum + root))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_that_is_not_finite_leaves_the_state_bit_for_bit(what, micro_batches):
    """Moments and momentum are there from an update before; one value of one completion is enough."""
    objective = "supervised" if what == "gradient" else "everything"
    made = dataclasses.replace(task(objective, micro_batches), optimizer=optax.adamw(0.1, weight_decay=0.1))
    update, (graph, trainable, frozen) = make_update(made), parts_of_model(False)
    base, batch, plans = BaseModel(frozen, graph), batch_of(objective), plans_of(objective)
    state = initial_train_state(jax.tree.map(jnp.copy, trainable), made.optimizer)
    state, result = update(state, base, batch, plans)
    assert not result.nonfinite and int(state.updates) == 1
    before = jax.device_get(state)
    if what == "gradient":
        # The update that goes wrong is another program, on the same state.
        steep = dataclasses.replace(made, objective=SteepAtZero(demonstrations=True))
        state, result = make_update(steep)(state, base, batch, plans)
        assert np.isfinite(result.loss) and not np.isfinite(result.gradient_norm)
    else:
        signal_BG = np.array(batch.signal_BG)
        b, g = np.argwhere(np.asarray(batch.mask_BGC).any(axis=-1))[0]
        signal_BG[b, g] = np.inf
        spoilt = dataclasses.replace(batch, signal_BG=jax.device_put(signal_BG))
        counter = CompileCounter()
        state, result = update(state, base, spoilt, plans)
        assert not np.isfinite(result.loss) and counter.count == 0
        counter.close()
    assert result.nonfinite and not result.rejected
    for (path, kept), (_, value) in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves_with_path(before), strict=True
    ):
        assert np.asarray(kept).tobytes() == np.asarray(value).tobytes(), path
    # It is the state that a later update goes on from.
    state, result = update(state, base, batch, plans)
    assert not result.nonfinite and int(state.updates) == 2


def test_another_batch_and_another_plan_compile_nothing():
    made = task("everything", 2)
    update, (graph, trainable, frozen) = compiled_update(made), parts_of_model(False)
    state = initial_train_state(jax.tree.map(jnp.copy, trainable), made.optimizer)
    base, first = BaseModel(frozen, graph), batch_of("everything")
    second = jax.tree.map(lambda x: jnp.flip(x, axis=0), first)
    plans = [UpdatePlans(nested=LayerPlan.skipping(3, [layer])) for layer in (1, 2)]
    state, _ = update(state, base, first, plans[0])
    counter = CompileCounter()
    state, _ = update(state, base, second, plans[1])
    assert counter.count == 0 and int(state.updates) == 2
    counter.close()


def test_bfloat16_products_change_an_update_by_their_rounding_alone():
    rounded = dataclasses.replace(task("supervised"), compute_dtype="bfloat16")
    gradient, result = update_once(rounded, batch_of("supervised"), plans_of("supervised"))
    exact, expected = updated("supervised")
    # Eight bits of a number are kept, and errors of single products are independent.
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=0.02)
    assert float(result.loss) != float(expected.loss)
    found, expected = (jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradient, exact))
    assert found.dtype == jnp.float32
    assert jnp.linalg.norm(found - expected) < 0.03 * jnp.linalg.norm(expected)
