"""Hugging Face model directories, in and out: Llama, Qwen2 and Qwen3.

A directory holds `config.json` and safetensors, whole or in shards. Pickled weights are not read.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nested_reft.json_files import read_json_object, write_json
from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.huggingface_config import config_from_huggingface, config_to_huggingface
from nested_reft.models.formats.huggingface_tokenizer import huggingface_tokenizer
from nested_reft.models.formats.stacking import check_tensors, stack_parameters
from nested_reft.models.heads import HeadParam, ScalarHead
from nested_reft.models.lora import merge_lora
from nested_reft.models.transformer import Transformer
from nested_reft.sharding import place
from nested_reft.tokenizer import Tokenizer
from nested_reft.untrusted import BadFile, reading, shown

logger = logging.getLogger(__name__)

TENSOR_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers/query": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/key": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/value": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/output": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/down": "model.layers.{layer}.mlp.down_proj.weight",
    "layers/query_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "layers/key_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "layers/value_bias": "model.layers.{layer}.self_attn.v_proj.bias",
    "layers/query_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "layers/key_norm": "model.layers.{layer}.self_attn.k_norm.weight",
}
SCORE = "score.weight"  # of a reward model, as transformers' sequence classifiers name it
# A directory holds some of these; those that are there are copied with an export.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# These are safetensors' own names of the types.
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# Of positions and masks that old exports store beside the weights.
_BUFFER_TYPES = ("I64", "BOOL")
_ROWS = 4096
_MAX_NAME_CHARACTERS = 200


# In.


def load_huggingface(directory: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Transformer:
    """The model in a Hugging Face directory.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards and their index.
        dtype: dtype of the parameters; the file's may be another.
        mesh: where they are placed; None is one device.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        BadFile: an unsupported model, a damaged file, or tensors that do not fit.
    """
    stated = read_config(directory)
    with _open_weights(Path(directory)) as tensors:
        config = _checked_config(stated, directory, tensors)
        if config.tied_embeddings != stated.tied_embeddings:
            logger.warning(
                "model directory '%s': config.json ties the head to the embedding, but the file holds another head,"
                " which is used",
                directory,
            )

        def read(name: str) -> np.ndarray:
            return tensors[name].get_tensor(name)

        model = Transformer(config, stack_parameters(config, TENSOR_NAMES, read, dtype, mesh))
        if SCORE in tensors:
            model.value_head = ScalarHead(config.width)
            weight_D = np.asarray(tensors[SCORE].get_tensor(SCORE), np.float32)[0]
            model.value_head.weight = HeadParam(jnp.asarray(weight_D) if mesh is None else place(weight_D, mesh))
        return model


def check_huggingface(directory: str | Path) -> ModelConfig:
    """Everything that `load_huggingface` checks; of the weights, only a second head is read.

    Args:
        directory: as for `load_huggingface`.

    Returns:
        The configuration of the model that `load_huggingface` would give.

    Raises:
        FileNotFoundError, BadFile: as `load_huggingface`.
    """
    config = read_config(directory)
    with _open_weights(Path(directory)) as tensors:
        return _checked_config(config, directory, tensors)


def read_config(directory: str | Path) -> ModelConfig:
    """The model's shape from a directory's `config.json`.

    Args:
        directory: the model's.

    Raises:
        FileNotFoundError: the directory has no `config.json`.
        BadFile: the file is damaged or describes a model that is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"model directory '{directory}' does not exist")
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; give a directory as transformers' save_pretrained writes it")
    with reading(f"model directory '{directory}'"):
        return config_from_huggingface(read_json_object(path))


def _checked_config(config: ModelConfig, directory: str | Path, tensors: Mapping[str, Any]) -> ModelConfig:
    """The configuration after its tensors were checked, untied where the file has a head of its own."""
    with reading(f"model directory '{directory}'"):
        # A slice knows shape and type without reading the data.
        slices = {name: file.get_slice(name) for name, file in tensors.items()}
        _refuse_types(slices)
        if config.tied_embeddings and _has_own_head(slices):
            # transformers, too, keeps a head that differs; dropping it would give wrong logits.
            config = dataclasses.replace(config, tied_embeddings=False)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        check_tensors(config, TENSOR_NAMES, shapes, lambda name: _is_ignored(name, slices[name], config))
    return config


def _refuse_types(slices: Mapping[str, Any]) -> None:
    for name, part in slices.items():
        # A buffer of integers, such as positions, is no weight.
        if name.endswith((".weight", ".bias")) and part.get_dtype() not in _FLOAT_TYPES:
            raise ValueError(
                f"tensor '{name}' has type {part.get_dtype()}; allowed are {', '.join(_FLOAT_TYPES)}"
                " (quantized weights are not read)"
            )


def _is_ignored(name: str, part: Any, config: ModelConfig) -> bool:
    """Whether a tensor may be there that is no parameter."""
    # Old exports repeat the tied head, and store the rotary frequencies and positions that we compute.
    return (
        name.endswith("rotary_emb.inv_freq")
        or part.get_dtype() in _BUFFER_TYPES
        or (name == TENSOR_NAMES["head"] and config.tied_embeddings)
        # A classifier of one label is a reward model; other classifiers are not supported.
        or (name == SCORE and tuple(part.get_shape()) == (1, config.width))
    )


def _has_own_head(slices: Mapping[str, Any]) -> bool:
    """Whether there is a head that differs from the embedding."""
    embedding, head = (slices.get(TENSOR_NAMES[name]) for name in ("embedding", "head"))
    if embedding is None or head is None:
        return False
    if embedding.get_shape() != head.get_shape():
        return True
    rows = embedding.get_shape()[0]
    # Blocks of rows, so that two large matrices are never in memory together.
    blocks = (slice(row, min(row + _ROWS, rows)) for row in range(0, rows, _ROWS))
    return any(
        not np.array_equal(embedding[block].astype(np.float32), head[block].astype(np.float32)) for block in blocks
    )


@contextmanager
def _open_weights(directory: Path) -> Iterator[dict[str, Any]]:
    """The open safetensors file that holds each tensor, by tensor name."""
    with ExitStack() as stack:
        files = [stack.enter_context(_open_safetensors(path)) for path in _weight_files(directory)]
        # Tensors are read from the open files later, so these close only when the caller is done.
        yield {name: file for file in files for name in list(file.keys())}


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise BadFile(f"'{index}' has no weight_map from tensors to files; fetch it again")
        # Only names, so that an index cannot reach outside its directory.
        files = sorted({Path(name).name for name in names})
        if strange := [name for name in files if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS]:
            raise BadFile(f"'{index}' names the file {shown(strange[0])}; fetch it again")
        return [directory / name for name in files]
    whole = directory / "model.safetensors"
    if not whole.is_file():
        raise FileNotFoundError(
            f"'{directory}' holds neither model.safetensors nor model.safetensors.index.json;"
            " other formats, such as pytorch_model.bin, are not read: save the model as safetensors"
        )
    return [whole]


def _open_safetensors(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist, but the index beside it names it; fetch it again")
    try:
        return safe_open(str(path), framework="numpy")
    except SafetensorError as error:
        raise BadFile(
            f"'{path}' is cut off or damaged ({error}); it has {path.stat().st_size} bytes: compare with"
            " its source and fetch it again"
        ) from error


# Out.


def save_huggingface(
    model: Transformer,
    directory: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    overwrite: bool = False,
    scores: bool = False,
) -> None:
    """Writes a directory that `transformers.AutoModelForCausalLM` and `AutoTokenizer` load.

    LoRA adapters are merged into the weights. Everything is written to a temporary directory
    beside the target and renamed at the end: a failure leaves what was there as it was.

    Args:
        model: the model; its parameters keep their dtype.
        directory: where to write.
        tokenizer: a tokenizer to write, or a directory whose tokenizer files are copied, or None.
        overwrite: replace `directory` where it exists and is not empty.
        scores: the model is a reward model: `AutoModelForSequenceClassification` loads it, with one label.

    Raises:
        FileExistsError: `directory` is not empty and `overwrite` is False, or it is a file.
        FileNotFoundError: the tokenizer's directory has no `tokenizer.json`.
        ValueError: the configuration has no Hugging Face counterpart.
    """
    directory = Path(directory).absolute()
    _check_target(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A rename is only atomic within one file system, so the temporary directory lies beside the target.
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's directories are private; an export is not
        # The tokenizer goes first, because config.json repeats its special ids.
        ids = _write_tokenizer(tokenizer, temporary)
        _write_model(model, temporary, ids, scores)
        _replace(directory, temporary)
    finally:
        # After a success there is nothing left to remove; after a failure the half-written export goes.
        shutil.rmtree(temporary, ignore_errors=True)


def _check_target(directory: Path, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"'{directory}' is a file; give a directory to export to")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise FileExistsError(f"'{directory}' is not empty; give another directory, or allow overwriting it")


def _write_tokenizer(tokenizer: Tokenizer | str | Path | None, directory: Path) -> dict[str, Any]:
    """Writes the tokenizer's files, `generation_config.json` among them, and returns its special ids."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(directory)
        return tokenizer.token_ids()
    ids = huggingface_tokenizer(tokenizer).token_ids()
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copyfile(Path(tokenizer) / name, directory / name)
    if not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", ids)
    return ids


def _write_model(model: Transformer, directory: Path, ids: dict[str, Any], scores: bool) -> None:
    # transformers' classes know no adapters, so they are added into the weights.
    parameters = merge_lora(model)
    settings = config_to_huggingface(model.config, parameters["embedding"].dtype) | ids
    tensors: dict[str, np.ndarray] = {}
    if scores:
        assert model.value_head is not None
        (causal,) = settings["architectures"]
        settings |= {"architectures": [causal.replace("CausalLM", "SequenceClassification")]}
        settings |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        # Their classifiers have no bias, and a difference of rewards has none either.
        tensors[SCORE] = np.asarray(model.value_head.weight[...])[None]
    write_json(directory / "config.json", settings)
    for name, value in parameters.items():
        host = np.asarray(value)
        if not name.startswith("layers/"):
            tensors[TENSOR_NAMES[name]] = np.ascontiguousarray(host)
            continue
        for layer in range(model.config.num_layers):
            tensors[TENSOR_NAMES[name].format(layer=layer)] = np.ascontiguousarray(host[layer])
    # transformers refuses a file whose metadata do not name a format.
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def _replace(directory: Path, temporary: Path) -> None:
    """Moves `temporary` to `directory`; an earlier directory is put back if that fails."""
    if not directory.exists():
        temporary.rename(directory)
        return
    previous = temporary.with_name(temporary.name + "-previous")
    directory.rename(previous)
    try:
        temporary.rename(directory)
    except OSError:
        previous.rename(directory)
        raise
    shutil.rmtree(previous)
