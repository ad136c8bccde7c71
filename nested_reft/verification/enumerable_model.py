"""A model so small that all its completions can be listed, and its policies at several depths and ages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import completion_logprobs
from nested_reft.types import valid_mask

STOP_ID = 0
MAX_COMPLETION_TOKENS = 3
# Every completion runs under every plan, so the model is small.
MODEL = ModelConfig(
    vocab_size=3, num_layers=4, width=8, hidden_width=16, num_heads=2, num_kv_heads=1, head_size=4, max_positions=16
)


# Length of one update, relative to that of all parameters: one moves pi by 0.01 nats a completion, four by 0.09.
UPDATE_LENGTH = 5e-4


@dataclass(frozen=True)
class Scenario:
    """Where the policies stand: which plans sample, and how many updates the target is ahead of them.

    Attributes:
        depth: of the nesting, as the table shows it.
        plans: skipped layers of each plan; one of the plans is drawn per batch, uniformly.
        updates: between theta_old, which sampled, and theta: steps along the true gradient, of `UPDATE_LENGTH`.
    """

    depth: str
    plans: tuple[tuple[int, ...], ...]
    updates: int

    @property
    def name(self) -> str:
        """Both in words."""
        return f"{self.depth}, {self.updates} update{'' if self.updates == 1 else 's'} old"


@dataclass(frozen=True)
class Completions:
    """All completions, with two prompts of two tokens and a reward for each pair.

    The reward has four values: 1 for a right answer plus 1/4 for ending with the stop token. With two
    values and one prompt, dividing by the standard deviation would be a pure scale on-policy.
    """

    prompt_XP: Int[np.ndarray, "X P"]
    tokens_YC: Int[np.ndarray, "Y C"]
    length_Y: Int[np.ndarray, " Y"]
    reward_XY: Float[np.ndarray, "X Y"]

    @classmethod
    def of_model(cls, max_tokens: int = MAX_COMPLETION_TOKENS) -> Completions:
        """All completions that `MODEL` can give to either prompt.

        Args:
            max_tokens: C; at most 14 tokens have a position behind the prompts.
        """
        tokens_YC, length_Y = all_completions(MODEL.vocab_size, STOP_ID, max_tokens)
        prompt_XP = np.array([[1, 2], [2, 2]], np.int32)
        # Any rule will do that makes rewards differ between completions and between prompts.
        answer_Y = tokens_YC.sum(axis=1) % 3
        finished_Y = (tokens_YC == STOP_ID)[np.arange(len(length_Y)), length_Y - 1]
        right_XY = answer_Y == np.array([[1], [2]])
        return cls(prompt_XP, tokens_YC, length_Y, (right_XY + 0.25 * finished_Y).astype(np.float32))


@dataclass(frozen=True)
class EnumeratedPolicies:
    """Log-probabilities of all completions under all policies of a scenario, and the true gradients.

    Axes: X prompts, Y completions, Z plans, M parameters (flattened), R = Y * C rows of the Jacobian of
    the target's log-probabilities; `gram_XRR` holds the inner products of these rows.
    """

    completions: Completions
    target_logprob_XYC: Float[Array, "X Y C"]
    old_logprob_XYC: Float[Array, "X Y C"]
    reference_logprob_XYC: Float[Array, "X Y C"]
    nested_logprob_ZXYC: Float[Array, "Z X Y C"]
    jacobian_XRM: Float[np.ndarray, "X R M"]
    gram_XRR: Float[np.ndarray, "X R R"]
    reward_gradient_M: Float[np.ndarray, " M"]
    kl_gradient_M: Float[np.ndarray, " M"]

    @property
    def kl_per_token(self) -> float:
        """E[log pi_b - log pi] per sampled token, in nats, as training logs it: over prompts and plans."""
        target_XY = np.asarray(self.target_logprob_XYC, np.float64).sum(axis=-1)
        nested_ZXY = np.asarray(self.nested_logprob_ZXYC, np.float64).sum(axis=-1)
        probability_ZXY = np.exp(nested_ZXY)
        divergence = (probability_ZXY * (nested_ZXY - target_XY)).sum()
        return float(divergence / (probability_ZXY * self.completions.length_Y).sum())


def all_completions(
    vocab_size: int, stop_id: int, max_tokens: int
) -> tuple[Int[np.ndarray, "Y C"], Int[np.ndarray, " Y"]]:
    """Every completion that a rollout can end with: stopped, or cut off at `max_tokens`; zero-padded.

    Args:
        vocab_size: V.
        stop_id: the token that ends a completion.
        max_tokens: C.

    Returns:
        Token ids and lengths, the shortest completions first.
    """
    rows, lengths = [], []
    for size in range(1, max_tokens + 1):
        for tokens in itertools.product(range(vocab_size), repeat=size):
            ends = tokens[-1] == stop_id or size == max_tokens
            # Nothing follows a stop token.
            if ends and stop_id not in tokens[:-1]:
                rows.append([*tokens, *[0] * (max_tokens - size)])
                lengths.append(size)
    return np.array(rows, np.int32), np.array(lengths, np.int32)


class TinyModel:
    """The transformer, with its log-probabilities of all completions as compiled functions of flat parameters."""

    def __init__(self, seed: int, max_tokens: int = MAX_COMPLETION_TOKENS):
        """Args:
        seed: of the parameters.
        max_tokens: of a completion. Each token more doubles the number of completions.
        """
        key, reference_key, _ = jax.random.split(jax.random.key(seed), 3)
        # Layers loud and embedding quiet enough for plans to differ by 0.05 to 0.5 nats a completion.
        parameters = {
            name: value if name.endswith("norm") else value * (0.7 if name == "embedding" else 3.0)
            for name, value in initial_parameters(MODEL, key).items()
        }
        # Compiled functions take flat parameters, so that one gradient is one vector.
        self.graph, self.parameters = nnx.split(Transformer(MODEL, parameters))
        self.flat_M, self.unflatten = ravel_pytree(self.parameters)
        self.completions = completions = Completions.of_model(max_tokens)
        num_prompts = len(completions.prompt_XP)
        tokens_XYC = jnp.broadcast_to(completions.tokens_YC, (num_prompts, *completions.tokens_YC.shape))
        mask_YC = valid_mask(jnp.asarray(completions.length_Y), max_tokens)
        prompt_XP = jnp.asarray(completions.prompt_XP)
        prompt_length_X = jnp.full(num_prompts, prompt_XP.shape[1], jnp.int32)

        def logprobs(flat_M: Array, plan: LayerPlan | None = None) -> Array:
            logprob_XYC, _ = completion_logprobs(self.at(flat_M), prompt_XP, prompt_length_X, tokens_XYC, 1.0, plan)
            # Padding has log-probability 0, so it drops out of sums and of the Jacobian.
            return jnp.where(mask_YC, logprob_XYC, 0.0)

        def objective(flat_M: Array, reference_XYC: Array, reward_weight: Array, kl_weight: Array) -> Array:
            """Weighted sum of expected reward and KL to the reference, each a mean over prompts."""
            logprob_XY = logprobs(flat_M).sum(axis=-1)
            log_ratio_XY = logprob_XY - reference_XYC.sum(axis=-1)
            # Two weights let the gradients of reward and KL be taken by one compiled function.
            value_XY = reward_weight * completions.reward_XY + kl_weight * log_ratio_XY
            return (jnp.exp(logprob_XY) * value_XY).sum() / num_prompts

        def jacobian(flat_M: Array) -> Array:
            """d logprobs / d parameters `[X, Y, C, M]`, one backward pass after the other.

            Not `jax.jacrev`: its batch of 90 backward passes comes out wrong (from number 68 on) on CPUs where
            jaxlib 0.10.2 uses YNNPACK; `--xla_cpu_experimental_ynn_fusion_type=` in XLA_FLAGS mends it too.
            """
            logprob_XYC, backward = jax.vjp(logprobs, flat_M)
            # One row of the basis asks for the gradient of one token's log-probability.
            basis = jnp.eye(logprob_XYC.size).reshape(-1, *logprob_XYC.shape)
            rows_RM = jax.lax.map(lambda cotangent: backward(cotangent)[0], basis)
            return rows_RM.reshape(*logprob_XYC.shape, -1)

        self.logprobs = jax.jit(logprobs)
        self.jacobian = jax.jit(jacobian)
        self.objective_gradient = jax.jit(jax.grad(objective))
        # The reference lies away from both theta and theta_old, or a wrong one could go unnoticed.
        self.reference_XYC = self.logprobs(self.flat_M + 0.1 * self.noise(reference_key))
        self._targets = [self.flat_M]

    def at(self, flat_M: Float[Array, " M"]) -> Transformer:
        """The transformer with these parameters.

        Args:
            flat_M: all parameters, in the order of `ravel_pytree`.
        """
        return nnx.merge(self.graph, self.unflatten(flat_M))

    def target(self, updates: int) -> Float[Array, " M"]:
        """Flat parameters of the target policy.

        Args:
            updates: steps along the gradient of the expected reward, from the parameters that sampled.
        """
        zero, one = jnp.zeros(()), jnp.ones(())
        while len(self._targets) <= updates:
            last_M = self._targets[-1]
            gradient_M = self.objective_gradient(last_M, self.reference_XYC, one, zero)
            # Each step has the same length, as Adam's has.
            step = UPDATE_LENGTH * jnp.linalg.norm(self.flat_M) / jnp.linalg.norm(gradient_M)
            self._targets.append(last_M + step * gradient_M)
        return self._targets[updates]

    def noise(self, key: Array) -> Float[Array, " M"]:
        """Normal noise with each parameter array's own root mean square as standard deviation.

        Args:
            key: PRNG key; the same key gives the same direction.
        """
        leaves, tree = jax.tree.flatten(self.parameters)
        keys = jax.random.split(key, len(leaves))
        noise = [jnp.sqrt(jnp.mean(x**2)) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return ravel_pytree(jax.tree.unflatten(tree, noise))[0]


def enumerate_policies(model: TinyModel, scenarios: Sequence[Scenario]) -> list[EnumeratedPolicies]:
    """Runs the tiny transformer on every completion, under every plan, and differentiates the objective.

    Args:
        model: gives parameters and compiled functions.
        scenarios: where the policies stand.
    """
    # A target's Jacobian does not depend on who sampled, so scenarios of one age share it.
    targets = {updates: _differentiated(model, updates) for updates in {scenario.updates for scenario in scenarios}}
    return [
        EnumeratedPolicies(
            completions=model.completions,
            old_logprob_XYC=model.logprobs(model.flat_M),
            reference_logprob_XYC=model.reference_XYC,
            nested_logprob_ZXYC=jnp.stack(
                [
                    model.logprobs(model.flat_M, LayerPlan.skipping(MODEL.num_layers, skipped))
                    for skipped in scenario.plans
                ]
            ),
            **targets[scenario.updates],
        )
        for scenario in scenarios
    ]


def _differentiated(model: TinyModel, updates: int) -> dict[str, Any]:
    """What `EnumeratedPolicies` holds of one target."""
    target_M = model.target(updates)
    jacobian_M = np.asarray(model.jacobian(target_M), np.float64)
    jacobian_XRM = jacobian_M.reshape(len(model.completions.prompt_XP), -1, target_M.size)
    zero, one = jnp.zeros(()), jnp.ones(())
    return {
        "target_logprob_XYC": model.logprobs(target_M),
        "jacobian_XRM": jacobian_XRM,
        "gram_XRR": jacobian_XRM @ jacobian_XRM.swapaxes(1, 2),
        "reward_gradient_M": np.asarray(model.objective_gradient(target_M, model.reference_XYC, one, zero), np.float64),
        "kl_gradient_M": np.asarray(model.objective_gradient(target_M, model.reference_XYC, zero, one), np.float64),
    }
