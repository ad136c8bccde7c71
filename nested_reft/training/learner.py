"""Learning: the trained policy, its optimizer, and the reference that it stays close to."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nested_reft.bridge_fitting import distil_bridges, fit_bridges
from nested_reft.bridging import BridgeConfig, TextBatch
from nested_reft.estimators.health import Health
from nested_reft.heartbeat import beat
from nested_reft.layer_plan import LayerPlan
from nested_reft.losses.objective import LossOutput, RolloutObjective, TokenSignals
from nested_reft.models.heads import ScalarHead
from nested_reft.models.lora import split_trainable
from nested_reft.models.low_precision import low_precision
from nested_reft.models.parameters import Parameters
from nested_reft.models.placement import place_bridges, place_state
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.config import Weights
from nested_reft.rollout.logprobs import hidden_logprobs
from nested_reft.rollout.policy import Policy
from nested_reft.sharding import on_mesh, replicate, replicate_scalars, shard_batch, to_host
from nested_reft.training.agreement import highest
from nested_reft.training.mini_batches import deal
from nested_reft.training.step import (
    BaseModel,
    LearnerTask,
    TrainState,
    UpdatePlans,
    UpdateResult,
    initial_train_state,
    make_loss,
    make_update,
)
from nested_reft.types import Scored, TrainBatch, valid_mask


@dataclass(frozen=True)
class Update:
    """What the updates on one batch did, as numbers on the host.

    How far off-policy the rollouts were is read off the first update: from the second on, the optimizer has moved the
    target itself. So are the bounds. Everything else is of the last pass, with the mean over its mini-batches.

    An update whose loss or gradient was not finite changed nothing, and its numbers enter none of these. Where there
    was no other, loss and norm are those that were not finite, and nothing else is known.

    Attributes:
        empty: nothing changed, because no token counted, which makes the numbers below zero, or because a mask rejected
            all tokens in every update.
        loss: the mean that was minimised.
        gradient_norm: global norm of its gradient, before clipping.
        parts: the objective's parts, by name.
        health: how far off-policy the rollouts were; None for demonstrations, an empty batch, and truncated sampling.
        entropy: mean entropy of the next-token distributions, in nats; None for demonstrations or an empty batch.
        weight_BGC: the weight of each token's gradient.
        bounds: of masks that would keep most of the rollouts, as `keeping_bounds` says, with NaN for none; empty where
            health is None.
        nonfinite: how many updates changed nothing because loss or gradient was not finite.
        nonfinite_last: how many of them came after the last update that was finite.
    """

    empty: bool
    loss: float
    gradient_norm: float
    parts: dict[str, float]
    health: Health | None
    entropy: float | None
    weight_BGC: Float[np.ndarray, "B G C"]
    bounds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    nonfinite: int = 0
    nonfinite_last: int = 0

    @property
    def all_nonfinite(self) -> bool:
        """Whether there were updates, and none of them was finite."""
        return bool(self.nonfinite) and not np.isfinite(self.loss + self.gradient_norm)


@dataclass(frozen=True)
class LearnerBatch:
    """One batch ready to learn from.

    Attributes:
        arrays: on the mesh, prompts spread over its devices.
        plans: the layers of the update's passes.
    """

    arrays: TrainBatch
    plans: UpdatePlans = dataclasses.field(default_factory=UpdatePlans)


class Learner:
    """Holds the trained parameters and changes them, one batch at a time.

    Attributes:
        state: parameters, optimizer state and number of updates.
        reference: the parameters that a KL penalty compares with; None without one.
        failed: what the latest update read, if its loss or gradient was not finite; None after any other.
    """

    def __init__(self, start: Policy, weights: Weights = "target", value_head: bool = False):
        """Args:
        start: the policy to train. It stays as it is for as long as anyone holds it.
        weights: what `behavior_policy` samples with.
        value_head: whether the trunk carries a critic, of zeros at the start.
        """
        self.mesh, self.tokenizer, self.num_layers = start.mesh, start.tokenizer, start.num_layers
        # All that a policy is beside its weights; holding the model itself would keep its buffers in use.
        self._as_policy = partial(
            Policy,
            tokenizer=start.tokenizer,
            sampling=start.sampling,
            max_completion_tokens=start.max_completion_tokens,
            prompt=start.prompt,
            mesh=start.mesh,
        )
        self._weights: Weights = weights
        graph, trainable, frozen = split_trainable(_with_value_head(start) if value_head else start.model)
        # Only parameters that train get a gradient and moments; the frozen ones are passed beside them.
        self.base = BaseModel(frozen, graph)
        # Until `begin` there is no optimizer.
        self.state = TrainState(trainable, optax.EmptyState(), jnp.zeros((), jnp.int32))
        self.reference: nnx.State | None = None
        self.failed: LearnerBatch | None = None
        # Models whose buffers are those of `state`: while one of them is in use, an update must not take them.
        self._lent = [weakref.ref(start.model)]
        self._rounded: Transformer | None = None
        self._taking_turns = threading.Lock()

    def begin(self, task: LearnerTask) -> None:
        """Starts a phase: a fresh optimizer on the parameters as they are, and no update counted yet."""
        self.task, self.needs = task, task.needs
        self.state = replicate_scalars(initial_train_state(self.state.trainable, task.optimizer), self.mesh)
        self._rounded = None
        # One compiled update serves the whole phase, because the task cannot change within it.
        self._update = make_update(task)
        if isinstance(task.objective, TokenSignals):
            self._token_signals = jax.jit(task.objective.with_token_signals)

    def rest(self) -> None:
        """Ends a phase for one that does not train: the optimizer's memory goes."""
        state = TrainState(self.state.trainable, optax.EmptyState(), jnp.zeros((), jnp.int32))
        # Several processes can save only what lies on the devices of all.
        self.state = replicate_scalars(state, self.mesh)

    def arrays(self, with_reference: bool) -> dict[str, Any]:
        """What a checkpoint holds of the learner, by name. Frozen parameters come with the model.

        Args:
            with_reference: also the reference, if there is one: after a phase that trains, it is no longer
                what the configuration starts from. Nor is it where it is reset, so there it always comes.
        """
        arrays = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(self.state)}
        if self.reference is not None and (with_reference or self.needs.reference_reset_every):
            arrays["reference"] = self.reference
        bridges = self.base.with_parameters(self.state.trainable).bridges
        if bridges is not None:
            arrays["bridges"] = bridges.stack()
        return arrays

    def load(self, arrays: dict[str, Any]) -> None:
        """Takes over the arrays of a checkpoint.

        Args:
            arrays: of the names that `arrays` gives; without a reference, the present one stays.
        """
        self.reference = arrays.get("reference", self.reference)
        names = [f.name for f in dataclasses.fields(self.state)]
        self.state = TrainState(**{name: arrays[name] for name in names})
        if "bridges" in arrays:
            self._take_bridges(arrays["bridges"])
        self._rounded, self._lent = None, []

    def fit_bridges(
        self,
        texts: Sequence[TextBatch],
        config: BridgeConfig,
        plan: LayerPlan | None,
        shared_prefix: int = 0,
        compute_dtype: str = "float32",
    ) -> None:
        """Fits the bridges of the policy as it is now.

        Args:
            texts: what the policy, or the one that it was a moment ago, has sampled.
            config: how.
            plan: the bridges to fit in sequence; None fits those of all layers alone.
            shared_prefix: leading tokens that all prompts have in common.
            compute_dtype: of the inputs of matrix products.
        """
        model = self.base.with_parameters(self.state.trainable, compute_dtype)
        batches = [shard_batch(tuple(batch), self.mesh) for batch in texts]
        self._take_bridges(fit_bridges(model, batches, config.ridge, plan, shared_prefix))

    def distil_bridges(self, texts: Sequence[TextBatch], config: BridgeConfig, plans: Sequence[LayerPlan]) -> None:
        """Improves the bridges by steps of distillation, one for each plan.

        Args:
            texts: as in `fit_bridges`.
            config: how.
            plans: what the nested policy will run.
        """
        policy = self.policy()
        batches = [shard_batch(tuple(batch), self.mesh) for batch in texts]
        temperature, rate = policy.sampling.temperature, config.distil_learning_rate
        self._take_bridges(distil_bridges(policy.model, batches, temperature, replicate(plans, self.mesh), rate))

    def _take_bridges(self, stack: Parameters) -> None:
        """Makes these the bridges of every policy that is asked for from now on.

        Raises:
            FloatingPointError: they hold a value that is not finite.
        """
        # Their computation ends here, so that its time does not count for what follows.
        if not all(to_host(_are_finite(stack))):
            raise FloatingPointError(
                "a fit of bridges gave a value that is not finite; raise nesting.bridge.ridge or lower"
                " nesting.bridge.distil_learning_rate"
            )
        with self._taking_turns:
            # Parameters are looked up and not changed: the model shares them with the state.
            model = self.base.with_parameters(self.state.trainable)
            assert model.bridges is not None
            model.load_bridges(place_bridges(stack, self.mesh))
            graph, _, frozen = split_trainable(model)
            self.base, self._rounded = BaseModel(frozen, graph), None

    def not_finite(self) -> str | None:
        """The first array of parameters, or of the optimizer's memory, with a value that is not finite; None without.

        Returns:
            Its place in the state.
        """
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(self.state)]
        are_finite = to_host(_are_finite(self.state))
        return next((path for path, is_finite in zip(paths, are_finite, strict=True) if not is_finite), None)

    def keep_reference(self) -> None:
        """Makes the parameters as they are now the reference."""
        # A copy is needed, since the next update takes the buffers of these parameters.
        self.reference = jax.tree.map(jnp.copy, self.state.trainable)

    def policy(self) -> Policy:
        """The trained policy as it is now; later updates leave it alone."""
        # The model shares the buffers of the state. It is remembered, so that an update can tell whether it may take
        # them.
        with self._taking_turns:
            model = self.base.with_parameters(self.state.trainable)
            self._lent.append(weakref.ref(model))
            return self._as_policy(model, version=self.version)

    @property
    def version(self) -> int:
        """Updates that the parameters have seen in this phase."""
        return int(self.state.updates)

    @property
    def batches(self) -> int:
        """Batches that changed the parameters in this phase."""
        return self.version // self.task.updates_per_batch

    def behavior_policy(self) -> Policy:
        """What samples: the trained policy, or its copy in fewer bits, made once per update."""
        if self._weights == "target":
            return self.policy()
        # The copy has buffers of its own, so an update need not spare them; it must only wait until they are made.
        with self._taking_turns:
            rounded = self._rounded
            if rounded is None:
                rounded = low_precision(self.base.with_parameters(self.state.trainable), self._weights)
                self._rounded = rounded
            return self._as_policy(rounded, version=self.version)

    def batch(
        self,
        groups: Scored,
        acceptance: jax.Array | None = None,
        mix_share: float = 0.0,
        kl_coefficient: float = 0.0,
    ) -> LearnerBatch:
        """The signal of each completion, and only the log-probabilities that the objective needs.

        Args:
            groups: B scored groups, on the host, perhaps of several policies.
            acceptance: key of the draws by which samples are accepted, where the objective rejects at random.
            mix_share: the share of the importance weight, in [0, 1], where the objective mixes.
            kl_coefficient: weight of the KL penalty on token rewards, where the objective has a critic.

        Returns:
            What `update` takes, on the mesh.

        Raises:
            ValueError: a group is of an earlier version, and the objective needs the full model of that version.
        """
        rollouts, objective = groups.rollouts, self.task.objective
        assert isinstance(objective, RolloutObjective), "the objective learns from no rollouts"
        stale_B = (np.asarray(rollouts.version_BG) != self.version).any(axis=1)
        if self.needs.fresh_rollouts and stale_B.any():
            raise ValueError(
                f"{int(stale_B.sum())} of {len(groups)} groups were drawn by an earlier version than {self.version};"
                " loss.bias_mitigation 'practical' and 'mixture' need groups of the present version: use 'base' or"
                " 'retrace', whose weights only read the log-probabilities of the policy that drew"
            )
        size = completion_bucket(int(rollouts.length_BG.max()), self.task.max_completion_tokens)
        arrays = TrainBatch(
            prompt_BP=rollouts.prompt_BP,
            prompt_length_B=rollouts.prompt_length_B,
            tokens_BGC=rollouts.tokens_BGC[..., :size],
            length_BG=rollouts.length_BG,
            forced_BG=rollouts.forced_BG,
            counted_BG=rollouts.counted_BG,
            signal_BG=objective.signal(groups),
            behavior_logprob_BGC=rollouts.behavior_logprob_BGC[..., :size] if self.needs.off_policy else None,
            full_share_BG=rollouts.full_share_BG if self.needs.mixture_density else None,
            acceptance_draw_BGC=self._draw(acceptance, rollouts.tokens_BGC.shape, size),
            mix_share_B=jnp.full(len(groups), mix_share) if self.needs.mix_share else None,
            beta_B=None if self.needs.beta is None else jnp.full(len(groups), self.needs.beta(self.batches)),
        )
        arrays = self._scored(arrays, rollouts.part_BGL)
        if self.needs.values:
            model = self.base.with_parameters(self.state.trainable, self.task.compute_dtype)
            with on_mesh(self.mesh):
                values = _values_and_logprobs(model, arrays, self.task.temperature, self.task.shared_prefix)
            arrays = dataclasses.replace(arrays, **dict(zip(("old_value_BGC", "old_logprob_BGC"), values, strict=True)))
            # Signals are made of the whole batch, before it is split.
            arrays = self._token_signals(arrays, jnp.float32(kl_coefficient))
        nested = None
        if self.needs.self_distillation:
            # One plan serves the whole batch: it only says which sub-network is taught next.
            nested = replicate(LayerPlan.of_parts(np.asarray(rollouts.part_BGL[0, 0])), self.mesh)
        return LearnerBatch(arrays, UpdatePlans(nested=nested))

    def written_batch(self, arrays: TrainBatch, plan: LayerPlan | None = None) -> LearnerBatch:
        """Completions that no policy sampled, with the log-probabilities that the objective needs.

        Args:
            arrays: the batch.
            plan: the layers that are trained; None is the full model.
        """
        plans = UpdatePlans() if plan is None else UpdatePlans(target=replicate(plan, self.mesh))
        return LearnerBatch(self._scored(arrays), plans)

    def evaluate(self, batch: LearnerBatch) -> LossOutput:
        """The loss of a batch and its parts, as sums; nothing changes.

        Args:
            batch: of `written_batch`.
        """
        with on_mesh(self.mesh):
            return make_loss(self.task)(self.state.trainable, self.base, batch.arrays)

    def _scored(self, arrays: TrainBatch, part_BGL: Any = None) -> TrainBatch:
        """The batch on the mesh, with the log-probabilities that the objective names."""
        # The searcher brought the rollouts to the host. Here they go back to the devices, all fields at once.
        arrays = shard_batch(arrays, self.mesh)
        # Each score costs a forward pass of the whole batch, so only those that the objective names are made.
        score = {
            "old_logprob_BGC": lambda: self._score(self.state.trainable, arrays, None),
            "nested_logprob_BGC": lambda: self._score_under_own_plans(arrays, part_BGL),
            "reference_logprob_BGC": lambda: self._score(self._reference(), arrays, None),
        }
        return dataclasses.replace(arrays, **{name: score[name]() for name in self.needs.logprobs})

    def _draw(self, key: jax.Array | None, shape: tuple[int, ...], size: int) -> Float[Array, "B G C"] | None:
        """The numbers by which tokens are accepted, where the objective asks for them."""
        if not self.needs.acceptance_draw:
            return None
        assert key is not None, "the objective rejects at random, and no key was given"
        # Drawn for the longest completion that there can be, so that the draws do not depend on the cut.
        return jax.random.uniform(key, shape)[..., :size]

    def update(self, batch: LearnerBatch, key: jax.Array | None = None) -> Update:
        """Every pass over a batch. A mini-batch without a token that counts changes nothing, not even momentum; nor
        does an update in which a mask rejects all tokens, or whose loss or gradient is not finite.

        Args:
            batch: what `batch` made of some groups, or demonstrations.
            key: deals the groups to mini-batches, where there are several.
        """
        arrays, before, passes = batch.arrays, self.batches, list[_Pass]()
        teaches_B = self._teaches(arrays)
        if not teaches_B.any():
            return Update(True, 0.0, 0.0, {}, None, None, np.zeros(arrays.tokens_BGC.shape, np.float32))
        parts = self.task.mini_batches
        for rows_KM in deal(len(teaches_B), parts, self.task.updates_per_batch // parts, key):
            taught = [rows_M for rows_M in rows_KM if teaches_B[rows_M].any()]
            passes.append([(rows_M, self._update_rows(arrays, rows_M, batch.plans)) for rows_M in taught])
        every = self.needs.reference_reset_every
        if every and self.batches // every > before // every:
            self.keep_reference()
        return _summary(passes, arrays.tokens_BGC.shape)

    def _teaches(self, arrays: TrainBatch) -> Bool[np.ndarray, " B"]:
        """True at the groups that have something to learn."""
        # A gradient of zero would still move the parameters, by the momentum of earlier updates.
        teaches_BG = arrays.counted_BG & (arrays.forced_BG < arrays.length_BG)
        # Where the signal is NaN there is no reward to learn from.
        teaches_BG &= ~jnp.isnan(arrays.signal_BG)
        if self.needs.signal_is_weight:
            teaches_BG &= arrays.signal_BG != 0
        return np.any(to_host(teaches_BG), axis=1)

    def _update_rows(self, arrays: TrainBatch, rows_M: Int[np.ndarray, " M"], plans: UpdatePlans) -> UpdateResult:
        """One update on some groups of a batch."""
        if len(rows_M) < len(arrays.prompt_BP):
            # The groups come from all devices, and each device gets its share of them again.
            arrays = shard_batch(_groups(arrays, jnp.asarray(rows_M)), self.mesh)
        return self.update_once(LearnerBatch(arrays, plans))

    def update_once(self, batch: LearnerBatch) -> UpdateResult:
        """One update on a whole batch, with its result on the host.

        Args:
            batch: as in `update`, or what `failed` kept.
        """
        # A policy that another thread asks for gets the state before this update or after it.
        with self._taking_turns:
            with on_mesh(self.mesh):
                state, result = self._update(self._own_state(), self.base, batch.arrays, batch.plans)
            self.state, self._rounded = state, None
        result = to_host(result)
        beat()
        self.failed = batch if result.nonfinite else None
        return result

    def _own_state(self) -> TrainState:
        """The state in buffers that an update may take: a copy while a policy that was handed out is in use."""
        # When a model is forgotten depends on the process, and all of them must run the same programs.
        in_use = highest(any(model() is not None for model in self._lent))
        # After this update no lent model shares the buffers of the new state, whichever way it goes.
        self._lent = []
        if not in_use:
            return self.state
        return dataclasses.replace(self.state, trainable=jax.tree.map(jnp.copy, self.state.trainable))

    def _reference(self) -> nnx.State:
        assert self.reference is not None, "keep_reference was not called"
        return self.reference

    def _score(self, parameters: nnx.State, arrays: TrainBatch, plan: LayerPlan | None) -> Float[Array, "B G C"]:
        """log pi of every completion token of a batch, under other parameters or fewer layers."""
        # This model never leaves the method, so it need not be remembered as lent.
        policy = self._as_policy(self.base.with_parameters(parameters, self.task.compute_dtype))
        # The temperature of the phase, which need not be that of the rollouts.
        policy = dataclasses.replace(
            policy, sampling=dataclasses.replace(policy.sampling, temperature=self.task.temperature)
        )
        return policy.logprobs(
            arrays.prompt_BP, arrays.prompt_length_B, arrays.tokens_BGC, plan, self.task.shared_prefix
        )

    def _score_under_own_plans(self, arrays: TrainBatch, part_BGL: Any) -> Float[Array, "B G C"]:
        """log pi of every completion token under the nested policy of its own.

        The whole batch runs once under each plan that occurs in it, because its shape is compiled.
        """
        # Completions of one step share a plan, so a batch of one step takes one pass.
        part_BGL = np.asarray(part_BGL)
        parts_ML, plan_N = np.unique(part_BGL.reshape(-1, part_BGL.shape[-1]), axis=0, return_inverse=True)
        found = None
        for index, part_L in enumerate(parts_ML):
            plan = replicate(LayerPlan.of_parts(part_L), self.mesh)
            logprob_BGC = self._score(self.state.trainable, arrays, plan)
            is_its_BG1 = jnp.asarray(plan_N.reshape(part_BGL.shape[:2]) == index)[..., None]
            found = logprob_BGC if found is None else jnp.where(is_its_BG1, logprob_BGC, found)
        assert found is not None
        return found


def _with_value_head(start: Policy) -> Transformer:
    """The policy's model with a critic's head; both share all other parameters."""
    model = nnx.merge(*nnx.split(start.model))
    model.value_head = ScalarHead(model.config.width)
    nnx.update(model.value_head, place_state(nnx.state(model.value_head), start.mesh))
    return model


@partial(jax.jit, static_argnames=("temperature", "shared_prefix"))
def _values_and_logprobs(
    model: Transformer, arrays: TrainBatch, temperature: float, shared_prefix: int
) -> tuple[Float[Array, "B G C"], Float[Array, "B G C"]]:
    """V and log pi of every completion token, from one pass."""
    valid_BP = valid_mask(arrays.prompt_length_B, arrays.prompt_BP.shape[1])
    hidden_BGCD = model.completion_hidden(arrays.prompt_BP, valid_BP, arrays.tokens_BGC, shared_prefix=shared_prefix)
    return model.values(hidden_BGCD), hidden_logprobs(model, hidden_BGCD, arrays.tokens_BGC, temperature)[0]


# The updates of one pass over a batch: the groups of each, and what it found.
_Pass = list[tuple[np.ndarray, UpdateResult]]


def _summary(passes: Sequence[_Pass], shape: tuple[int, ...]) -> Update:
    """What `Update` says of the updates on one batch; `shape` is that of its tokens."""
    results = [result for each in passes for _, result in each]
    nonfinite = sum(bool(result.nonfinite) for result in results)
    last_finite = max((number for number, result in enumerate(results, 1) if not result.nonfinite), default=0)
    weight_BGC = np.zeros(shape, np.float32)
    if not last_finite:
        latest = results[-1]
        loss, norm = float(latest.loss), float(latest.gradient_norm)
        return Update(False, loss, norm, {}, None, None, weight_BGC, nonfinite=nonfinite, nonfinite_last=nonfinite)
    finite = [[(rows_M, result) for rows_M, result in each if not result.nonfinite] for each in passes]
    *_, last_pass = counted = [each for each in finite if each]
    first, last = counted[0][0][1], [result for _, result in last_pass]
    for rows_M, result in last_pass:
        weight_BGC[rows_M] = result.weight_BGC
    return Update(
        empty=all(bool(result.rejected) for result in results),
        loss=float(np.mean([result.loss for result in last])),
        gradient_norm=float(np.mean([result.gradient_norm for result in last])),
        parts={name: float(np.mean([result.parts[name] for result in last])) for name in last[0].parts},
        health=first.health,
        entropy=None if first.entropy is None else float(first.entropy),
        weight_BGC=weight_BGC,
        bounds={name: [float(bound) for bound in bounds] for name, bounds in (first.bounds or {}).items()},
        nonfinite=nonfinite,
        nonfinite_last=len(results) - last_finite,
    )


@jax.jit
def _groups(arrays: TrainBatch, rows_M: Int[Array, " M"]) -> TrainBatch:
    """Some groups of a batch; one program for all choices of them."""
    return jax.tree.map(lambda x: x[rows_M], arrays)


@jax.jit
def _are_finite(state: Any) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(array).all() for array in jax.tree.leaves(state)]


def completion_bucket(longest: int, limit: int) -> int:
    """The size that completions are cut to for an update: one, two, three or four quarters of the limit.

    Short completions make cheap updates, and four sizes make at most four compilations.

    Args:
        longest: tokens of the longest completion of the batch.
        limit: C, the most tokens that a completion can have.

    Returns:
        In tokens, at least `longest` and at most `limit`.
    """
    # Two negations round up, and the minimum matters where the limit is not a multiple of 4.
    quarter = -(-limit // 4)
    return min(-(-longest // quarter) * quarter, limit)
