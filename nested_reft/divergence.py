"""How far plans are from the full model, and so how much each layer matters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from nested_reft.estimators.kl import exact_kl
from nested_reft.json_files import write_json
from nested_reft.layer_plan import LayerPlan, Part
from nested_reft.models.transformer import Transformer
from nested_reft.rollout.logprobs import over_position_blocks
from nested_reft.rollout.sampling import tempered
from nested_reft.types import Rollouts, Weighted, valid_mask

MAX_FILE_BYTES = 10**7
Texts = tuple[Int[Array, "B P"], Int[Array, " B"], Int[Array, "B G C"], Int[Array, "B G"]]


@jax.jit
def completion_hidden(model: Transformer, texts: Texts, plan: LayerPlan | None = None) -> Float[Array, "B G C D"]:
    """Final hidden states that predict every completion token, under a plan.

    Args:
        model: the full model.
        texts: what `texts_of` returned.
        plan: layers to run; None is the full model.
    """
    prompt_BP, prompt_length_B, tokens_BGC, _ = texts
    return model.completion_hidden(prompt_BP, valid_mask(prompt_length_B, prompt_BP.shape[1]), tokens_BGC, plan)


@partial(jax.jit, static_argnames="temperature")
def mean_divergence(
    model: Transformer, full_BGCD: Float[Array, "B G C D"], texts: Texts, temperature: float, plan: LayerPlan
) -> Float[Array, ""]:
    """KL(full || plan) per completion token, in nats: exact over the vocabulary, mean over tokens.

    Args:
        model: the full model.
        full_BGCD: its states, from `completion_hidden` without a plan.
        texts: what `texts_of` returned.
        temperature: the sampling temperature of both policies.
        plan: layers of the nested policy.

    Returns:
        The divergence, 0 or more but for rounding; 0 where no token counts.
    """

    # Hidden states are kept and not logits, which are wider by the factor V / D.
    def block(full: Array, nested: Array) -> Array:
        return exact_kl(*(tempered(model.logits(hidden), temperature) for hidden in (full, nested)))

    nested_BGCD = completion_hidden(model, texts, plan)
    kl_BGC = over_position_blocks(block, model.config.vocab_size, full_BGCD, nested_BGCD)
    mask_BGC = valid_mask(texts[3], kl_BGC.shape[-1])
    # `Weighted.mean` is 0 where no token counts.
    return Weighted(jnp.where(mask_BGC, kl_BGC, 0.0).sum(), mask_BGC.sum().astype(jnp.float32)).mean()


def texts_of(rollouts: Rollouts, prompts: int | None = None, completions: int | None = None) -> Texts:
    """What a measurement reads of rollouts: all of them, or the first of each kind.

    The plan is left out, so that rollouts under plans of another size compile nothing.

    Args:
        rollouts: what is measured on.
        prompts: how many, from the first; None takes all.
        completions: how many of each prompt, from the first; None takes all.
    """
    # `slice(None)` takes everything.
    some = (slice(prompts), slice(completions))
    # Rollouts may lie on the host; they go to the devices once, because every plan reads them.
    return (
        jnp.asarray(rollouts.prompt_BP[some[0]]),
        jnp.asarray(rollouts.prompt_length_B[some[0]]),
        jnp.asarray(rollouts.tokens_BGC[some]),
        jnp.asarray(rollouts.length_BG[some]),
    )


def measure_plan_divergence(
    model: Transformer, texts: Texts, temperature: float, plans: Sequence[LayerPlan], description: str
) -> Float[np.ndarray, " plans"]:
    """KL(full || plan) per completion token, in nats, for each plan; one compilation per plan size.

    Args:
        model: the full model.
        texts: the prompts and completions whose tokens the mean is over.
        temperature: the sampling temperature of both policies.
        plans: the nested policies.
        description: for the progress bar.
    """
    # The full model runs once, and every plan is compared with it.
    full_BGCD = completion_hidden(model, texts)
    progress = tqdm(plans, desc=description, unit="plan", leave=False)
    return np.array([float(mean_divergence(model, full_BGCD, texts, temperature, plan)) for plan in progress])


def measure_layer_divergence(
    model: Transformer, texts: Texts, temperature: float, part: Part = Part.SKIP
) -> Float[np.ndarray, " L"]:
    """KL(full || full with only a part of layer l) per token, in nats, for each layer l.

    Divergence adds up roughly over layers, so the ranking of single layers says which sets of
    layers are cheap to skip. On completions of the full model this is the divergence where the
    target goes; on nested ones, where the rollouts go.

    Args:
        model: the full model.
        texts: the prompts and completions whose tokens the mean is over.
        temperature: the sampling temperature of both policies.
        part: what is left of the layer.

    Returns:
        One value per layer, as `draw_plan` reads them.
    """
    num_layers = model.config.num_layers
    plans = [LayerPlan.skipping(num_layers, [layer], part) for layer in range(num_layers)]
    return measure_plan_divergence(model, texts, temperature, plans, "measuring layers")


def save_divergence(path: Path, measured: Mapping[str, Float[np.ndarray, " L"]], about: dict[str, object]) -> None:
    """Writes measurements as JSON, with `about` saying what they were measured on.

    Args:
        path: the JSON file to write; it is replaced where it exists.
        measured: nats per token, one value per layer, by what is left out: "layer", "attention", "mlp", or "bridge"
            for a layer that its bridge stands in for.
        about: further entries, such as the model's name.
    """
    # Five decimals are far below what another set of texts would change.
    rounded = {name: [round(float(d), 5) for d in values] for name, values in measured.items()}
    num_layers = len(next(iter(rounded.values())))
    # Whole layers have the name that files had before there were parts.
    whole = {"divergence": rounded.pop("layer")} if "layer" in rounded else {}
    parts = {"parts": rounded} if rounded else {}
    write_json(path, about | {"num_layers": num_layers} | whole | parts)


def load_divergence(path: Path, num_layers: int, left_out: str = "layer") -> Float[np.ndarray, " L"]:
    """Reads what `save_divergence` wrote.

    Args:
        path: a JSON file that `save_divergence` wrote.
        num_layers: L of the model that is to use it.
        left_out: of which measurement, as `nesting.leave_out` names it.

    Returns:
        Nats per token, one value per layer.

    Raises:
        ValueError: the file is missing, is not such a file, lacks this measurement, or is of a model of another depth.
    """
    # A device has no end, and a measurement of many layers is small.
    if path.exists() and (not path.is_file() or path.stat().st_size > MAX_FILE_BYTES):
        raise ValueError(
            f"nesting.divergence_file is '{path}', which holds no layer divergences; allowed is a file of at most"
            f" {MAX_FILE_BYTES} bytes"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = content["divergence"] if left_out == "layer" else content.get("parts", {}).get(left_out)
        if values is None:
            raise ValueError(f"it has none for '{left_out}'")
        divergence_L = np.array(values, dtype=np.float64)
    # FileNotFoundError is an OSError, so it has to be caught first.
    except FileNotFoundError:
        raise ValueError(
            f"nesting.divergence_file is '{path}', which does not exist; write it with 'nested-reft measure-layers'"
        ) from None
    except (AttributeError, KeyError, TypeError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"nesting.divergence_file is '{path}', which holds no layer divergences ({error!r}); allowed is what"
            f" 'nested-reft measure-layers --parts {left_out}' writes"
        ) from None
    if divergence_L.shape != (num_layers,):
        raise ValueError(f"nesting.divergence_file '{path}' has {divergence_L.size} layers; the model has {num_layers}")
    if not all(math.isfinite(value) for value in divergence_L):
        raise ValueError(f"nesting.divergence_file '{path}' holds a value that is not finite")
    return divergence_L
