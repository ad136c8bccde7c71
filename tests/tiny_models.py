"""Small random models that several test files share."""

import jax
import jax.numpy as jnp

from nested_reft.layer_plan import LayerPlan
from nested_reft.models.config import ModelConfig
from nested_reft.models.parameters import initial_parameters
from nested_reft.models.transformer import Transformer

TINY = ModelConfig(
    vocab_size=31, num_layers=5, width=16, hidden_width=24, num_heads=4, num_kv_heads=2, head_size=8, max_positions=64
)


def tiny_model(config: ModelConfig = TINY, seed: int = 0, scale: float = 2.0) -> Transformer:
    """A random model with matrices scaled up, so that its outputs are far from uniform."""
    parameters = initial_parameters(config, jax.random.key(seed))
    return Transformer(config, {name: value if value.ndim < 2 else scale * value for name, value in parameters.items()})


def tiny_prompts() -> tuple[jax.Array, jax.Array]:
    """Three right-padded prompts of different lengths."""
    tokens_BP = jax.random.randint(jax.random.key(7), (3, 9), 0, TINY.vocab_size)
    return tokens_BP, jnp.array([9, 4, 6])


@jax.jit
def forward(model: Transformer, tokens_BT: jax.Array, plan: LayerPlan | None = None, valid_BT: jax.Array | None = None):
    """`model(...)`, compiled once per shape: called without jit it would compile its layer loop each time."""
    return model(tokens_BT, valid_BT, plan)
