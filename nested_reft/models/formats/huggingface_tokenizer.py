"""The tokenizer of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from nested_reft.json_files import read_json_object
from nested_reft.tokenizer import SPECIAL_NAMES, Tokenizer


def huggingface_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face model directory.

    Stop tokens are all that `generation_config.json`, `config.json` and
    `tokenizer_config.json` name: chat models end a turn with another token than a document.

    Args:
        directory: the model's directory; files other than `tokenizer.json` may be absent.

    Raises:
        FileNotFoundError: the directory has no `tokenizer.json`.
        ValueError: a file cannot be parsed, or names a token that the vocabulary lacks.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' does not exist; a model directory needs it: older SentencePiece tokenizers are"
            " converted by transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"'{path}' is not a tokenizer ({error}); fetch it again") from error
    # Where both files name a special token, `tokenizer_config.json` wins, as in transformers.
    settings = read_json_object(directory / "special_tokens_map.json") | read_json_object(
        directory / "tokenizer_config.json"
    )
    stop_ids = [
        stop_id
        for name in ("generation_config.json", "config.json")
        for stop_id in _id_list(read_json_object(directory / name).get("eos_token_id"), directory / name)
    ]
    return Tokenizer(backend, _special_tokens(settings), _chat_template(directory, settings), stop_ids)


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; a token is stored as its text or as an object with `content`."""
    found = {role: settings.get(role) for role in SPECIAL_NAMES}
    return {role: token["content"] if isinstance(token, dict) else token for role, token in found.items() if token}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of `chat_template.jinja`, which wins, or of `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    # Older files hold several templates by name.
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _id_list(value: Any, path: Path) -> list[int]:
    """Token ids that a configuration gives as nothing, one integer or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    # True is an int to `isinstance`, but no token id.
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"'{path}': eos_token_id is {value!r}; allowed is a token id or a list of them")
    return ids
