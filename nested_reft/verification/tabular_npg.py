"""Natural policy gradient with a KL penalty, exactly, on a tree of tokens: a reference for what learning should reach.

Every state s is a prefix of at most H - 1 tokens, and every whole text y of H tokens has a reward r(y). The objective

    E_{y ~ pi}[ r(y) - lambda log(pi(y) / pi_ref(y)) ]

has its maximum at pi*(y) proportional to pi_ref(y) exp(r(y) / lambda). A step of natural policy gradient solves, for
each state alone,

    pi_{t+1}(. | s) = argmin_p  < -Q(s, .), p > + lambda KL(p || pi_ref) + (1 / eta) KL(p || pi_t)

which has the closed form

    pi_{t+1} proportional to pi_ref^{eta lambda / (1 + eta lambda)} pi_t^{1 / (1 + eta lambda)}
                             exp(eta Q / (1 + eta lambda))

Source: DR-PO (arXiv 2404.08495, section 4), whose theory takes this step with Q fitted to rollouts that start inside
reference answers. Here Q is exact, so that only the step itself is at work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

Tree = list[Float[Array, "..."]]
"""Log-probabilities of the next token after every prefix; entry d holds those of d tokens, `[V, ..., V]`."""


def npg_step(
    logprob: Float[Array, "*states V"],
    reference_logprob: Float[Array, "*states V"],
    q: Float[Array, "*states V"],
    kl_coefficient: float,
    step_size: float,
) -> Float[Array, "*states V"]:
    """The policy after one step, in every state; see the module.

    Args:
        logprob: log pi_t.
        reference_logprob: log pi_ref.
        q: Q of each action, without the penalty that the action itself costs.
        kl_coefficient: lambda, 0 or more; 0 leaves the reference out.
        step_size: eta, more than 0. With infinity the step ends at pi_ref exp(Q / lambda), normalised.

    Returns:
        log pi_{t+1}.

    Raises:
        ValueError: the step has no solution, or a coefficient is out of its range.
    """
    if not (kl_coefficient >= 0 and math.isfinite(kl_coefficient)):
        raise ValueError(f"kl_coefficient is {kl_coefficient}; allowed is a finite number, 0 or more")
    if not step_size > 0 or (math.isinf(step_size) and kl_coefficient == 0):
        raise ValueError(
            f"step_size is {step_size} and kl_coefficient {kl_coefficient}; allowed is a step of more than 0, and an"
            " infinite one with a penalty alone: nothing else would keep the policy from one action"
        )
    # Divided by 1 / eta + lambda instead of multiplied by eta, so that an infinite step is no special case.
    scale = 1 / step_size + kl_coefficient
    unnormalised = (kl_coefficient * reference_logprob + logprob / step_size + q) / scale
    return unnormalised - logsumexp(unnormalised, axis=-1, keepdims=True)


def action_values(policy: Tree, reference: Tree, reward: Float[Array, "*texts"], kl_coefficient: float) -> Tree:
    """Q of every token after every prefix: the expected reward less the penalty of all later tokens.

        Q_d(s, a) = sum_a' pi(a' | s a) [ Q_{d+1}(s a, a') - lambda log(pi / pi_ref)(a' | s a) ],    Q_{H-1} = r

    Args:
        policy: log pi.
        reference: log pi_ref.
        reward: r of each whole text, `[V, ..., V]` with H axes.
        kl_coefficient: lambda.
    """
    values = [reward]
    for logprob, reference_logprob in zip(policy[:0:-1], reference[:0:-1], strict=True):
        soft = values[0] - kl_coefficient * (logprob - reference_logprob)
        values.insert(0, (jnp.exp(logprob) * soft).sum(axis=-1))
    return values


def text_logprobs(policy: Tree) -> Float[Array, "*texts"]:
    """log pi of every whole text.

    Args:
        policy: log pi of the next token after every prefix.
    """
    total = policy[0]
    for logprob in policy[1:]:
        total = total[..., None] + logprob
    return total


def npg_iterates(
    reference: Tree, reward: Float[Array, "*texts"], kl_coefficient: float, step_size: float, steps: int
) -> Sequence[Tree]:
    """The policies of `steps` steps from the reference, itself first; Q is exact before each of them.

    Args:
        reference: log pi_ref, where learning starts.
        reward: r of each whole text.
        kl_coefficient: lambda.
        step_size: eta.
        steps: 0 or more.
    """
    policies = [reference]
    for _ in range(steps):
        q = action_values(policies[-1], reference, reward, kl_coefficient)
        parts = zip(policies[-1], reference, q, strict=True)
        policies.append([npg_step(*part, kl_coefficient, step_size) for part in parts])
    return policies
