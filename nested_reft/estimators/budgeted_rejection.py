"""Budgeted rejection: drop samples at random, the more likely the less the target likes them.

With rho = pi / pi_b of a token or completion and a budget lambda > 0, a sample is accepted with probability

    a(y) = min(1, rho(y) / lambda)

so accepted samples come from q'(y) = pi_b(y) a(y) / Z = min(pi_b, pi / lambda)(y) / Z, where Z = E[a] is the accepted
share. Of all distributions that accept this share, q' has the least divergence from pi. At lambda <= min rho nothing
is rejected; at lambda >= max rho, q' is pi and Z is 1 / lambda. The tilt is corrected by

    h = rho / a = max(rho, lambda)    where accepted,    0    where rejected

whose mean over the draw of acceptance is rho. What is rejected therefore has to stay in the divisor, and then the
estimator has exactly the expectation of the weight rho, without knowing Z. If instead only accepted samples are
counted, as when rollouts are drawn until enough are accepted, the weight is Z max(rho, lambda), between lambda Z and
Z max rho.

Rejecting at random adds variance to an estimator of a given number of samples: E[h^2] = E[rho max(rho, lambda)] is
never less than E[rho^2]. Among those accepted, weights differ by less. Rejected samples need no backward pass, but this
saves no work yet: rho is known after the forward pass of the update itself, whose program has one shape.

Source: optimal budgeted rejection sampling (Verine et al., 2024, arXiv 2311.00460), for rollouts: Jackpot (arXiv
2602.06107), which applies it token by token, takes Z from the most likely tokens, and trains the behavior policy as
well. Departure: rejected samples count in the divisor, so that Z is not needed.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def is_accepted(
    log_ratio: Float[Array, "*rows"], draw: Float[Array, "*rows"], obrs_lambda: float
) -> Bool[Array, "*rows"]:
    """Which samples are accepted: those with draw < min(1, rho / lambda).

    Args:
        log_ratio: log rho of what is accepted as a whole, in nats.
        draw: uniform in [0, 1), independent of the sample.
        obrs_lambda: lambda, more than 0.
    """
    # In logs rho / lambda cannot overflow. NaN means a broken model; it fails the comparison and would vanish, so what
    # is asked is whether the draw lies beyond the bound.
    return ~(draw >= jnp.exp(jnp.minimum(log_ratio - math.log(obrs_lambda), 0.0)))


def accepted_log_weight(log_ratio: Float[Array, "*rows"], obrs_lambda: float) -> Float[Array, "*rows"]:
    """log max(rho, lambda), which corrects the tilt of accepted samples; rejected ones have weight 0.

    Args:
        log_ratio: log rho of what is accepted as a whole, in nats.
        obrs_lambda: lambda, more than 0.

    Returns:
        Nats. The weight counts in a divisor of all samples; its mean over the draw is rho.
    """
    return jnp.maximum(log_ratio, math.log(obrs_lambda))
