"""How much each layer matters: the divergence that skipping it alone causes."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from nested_reft.layer_skip import LayerPlan
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.sampling import tempered
from nested_reft.types import Rollouts, Weighted, valid_mask


@partial(jax.jit, static_argnames="temperature")
def completion_distributions(
    model: Transformer, rollouts: Rollouts, temperature: float, plan: LayerPlan | None = None
) -> Float[Array, "B G C V"]:
    """log pi(. | x, y_<t) over the whole vocabulary at every completion token, under a plan."""
    valid_BP = valid_mask(rollouts.prompt_length_B, rollouts.prompt_BP.shape[1])
    hidden = model.completion_hidden(rollouts.prompt_BP, valid_BP, rollouts.tokens_BGC, plan)
    return jax.nn.log_softmax(tempered(model.logits(hidden), temperature), axis=-1)


@jax.jit
def mean_divergence(
    full_logprob: Float[Array, "B G C V"], nested_logprob: Float[Array, "B G C V"], length_BG: Int[Array, "B G"]
) -> Float[Array, ""]:
    """KL(full || nested) per completion token, in nats: exact over the vocabulary, mean over tokens."""
    kl_BGC = jnp.sum(jnp.exp(full_logprob) * (full_logprob - nested_logprob), axis=-1)
    mask_BGC = valid_mask(length_BG, kl_BGC.shape[-1])
    return Weighted((kl_BGC * mask_BGC).sum(), mask_BGC.sum().astype(jnp.float32)).mean()


def measure_layer_divergence(model: Transformer, rollouts: Rollouts, temperature: float) -> Float[np.ndarray, " L"]:
    """KL(full || full without layer l) per token, in nats, for each layer l.

    Divergence adds up roughly over layers, so the ranking of single layers says which sets of
    layers are cheap to skip.

    Args:
        model: the full model.
        rollouts: of the full model, whose tokens the mean is over.
        temperature: of both policies.
    """
    num_layers = model.config.num_layers
    full = completion_distributions(model, rollouts, temperature)

    def without(layer: int) -> float:
        plan = LayerPlan.skipping(num_layers, [layer])
        nested = completion_distributions(model, rollouts, temperature, plan)
        return float(mean_divergence(full, nested, rollouts.length_BG))

    return np.array([without(layer) for layer in tqdm(range(num_layers), desc="measuring layers", unit="layer")])


def save_divergence(path: Path, divergence_L: Float[np.ndarray, " L"], about: dict[str, object]) -> None:
    """Writes the measurement as JSON, with `about` saying what it was measured on."""
    content = about | {"num_layers": len(divergence_L), "divergence": [round(float(d), 5) for d in divergence_L]}
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial_path, path)


def load_divergence(path: Path, num_layers: int) -> Float[np.ndarray, " L"]:
    """Reads what `save_divergence` wrote.

    Raises:
        ValueError: the file is missing, is not such a file, or is of a model of another depth.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["divergence"]
        divergence_L = np.array(values, dtype=np.float64)
    except FileNotFoundError:
        raise ValueError(
            f"nesting.divergence_file is '{path}', which does not exist; write it with 'nested-reft measure-layers'"
        ) from None
    except (KeyError, TypeError, OSError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"nesting.divergence_file is '{path}', which holds no layer divergences: {error!r}") from None
    if divergence_L.shape != (num_layers,):
        raise ValueError(f"nesting.divergence_file '{path}' has {divergence_L.size} layers; the model has {num_layers}")
    if not all(math.isfinite(value) for value in divergence_L):
        raise ValueError(f"nesting.divergence_file '{path}' holds a value that is not finite")
    return divergence_L
