"""The tokenizer of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nested_reft.json_files import read_json_object
from nested_reft.tokenizer import SPECIAL_NAMES, Tokenizer
from nested_reft.untrusted import MAX_WHOLE, BadFile, Fields, reading, shown

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def huggingface_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face model directory.

    Stop tokens are all that `generation_config.json`, `config.json` and
    `tokenizer_config.json` name: chat models end a turn with another token than a document.
    What surrounds plain text is what the post-processor of `tokenizer.json` says; as in
    transformers, `add_bos_token` of `tokenizer_config.json` does not change it.

    Args:
        directory: the model's directory; files other than `tokenizer.json` may be absent.

    Raises:
        FileNotFoundError: the directory has no `tokenizer.json`.
        BadFile: a file cannot be parsed, or names a token that the vocabulary lacks.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' does not exist; a model directory needs it: older SentencePiece tokenizers are"
            " converted by transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    with reading(f"model directory '{directory}'"):
        return _tokenizer(directory, path)


def _tokenizer(directory: Path, path: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadFile(f"'{path}' is not a tokenizer ({error}); fetch it again") from error
    # Where both files name a special token, `tokenizer_config.json` wins, as in transformers.
    settings = read_json_object(directory / "special_tokens_map.json") | read_json_object(
        directory / "tokenizer_config.json"
    )
    fields = Fields(settings, "tokenizer_config.json: ")
    special_tokens = {
        role: added.content for role in SPECIAL_NAMES if (added := _added_token(fields, role, settings.get(role)))
    }
    _add_tokens(backend, fields, read_json_object(directory / "added_tokens.json"))
    stop_ids = [
        stop_id
        for name in ("generation_config.json", "config.json")
        for stop_id in _id_list(read_json_object(directory / name).get("eos_token_id"), directory / name)
    ]
    return Tokenizer(backend, special_tokens, _chat_template(directory, fields), stop_ids)


def _added_token(fields: Fields, name: str, value: Any) -> AddedToken | None:
    """A token as files store it: as its text or as an object with `content`; None where there is none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise ValueError(f"{fields.prefix}{name} is {shown(value)}; allowed is a text or an object with content")
    flags = {flag: value[flag] for flag in _TOKEN_FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{fields.prefix}{name} is {shown(value)}; its flags must be true or false")
    return AddedToken(value["content"], **flags)


def _add_tokens(backend: tokenizers.Tokenizer, fields: Fields, older: Mapping[str, Any]) -> None:
    """Adds the tokens that `tokenizer.json` lacks; without them, the text of one would be split into pieces.

    Args:
        backend: changed in place.
        fields: those of `tokenizer_config.json`.
        older: the contents of `added_tokens.json`: id by text.

    Raises:
        ValueError: a token gets another id than the file says.
    """
    for token_id, token in sorted(_stated_tokens(fields, older).items()):
        # The library gives the next free id, and keeps a token that it has already.
        backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != token_id:
            raise ValueError(
                f"{fields.prefix}added_tokens_decoder gives {shown(token.content)} the id {token_id}; after the tokens"
                f" of tokenizer.json it would be {found}"
            )
    for token in _extra_tokens(fields):
        backend.add_special_tokens([token])


def _stated_tokens(fields: Fields, older: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens by id, of `tokenizer_config.json` or, where it says nothing, of the older `added_tokens.json`."""
    stated = fields.get("added_tokens_decoder")
    if stated is None:
        stated = {str(token_id): {"content": text, "special": False} for text, token_id in older.items()}
    if not isinstance(stated, dict) or not all(token_id.isascii() and token_id.isdecimal() for token_id in stated):
        raise fields.refused("added_tokens_decoder", "allowed is an object of tokens by id")
    tokens = {int(token_id): _added_token(fields, "added_tokens_decoder", value) for token_id, value in stated.items()}
    if empty := [token_id for token_id, token in tokens.items() if token is None]:
        raise ValueError(f"{fields.prefix}added_tokens_decoder has no text for the id {empty[0]}")
    return {token_id: token for token_id, token in tokens.items() if token is not None}


def _extra_tokens(fields: Fields) -> list[AddedToken]:
    """Special tokens without a role, under both of their names."""
    found = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        values = fields.get(name) or []
        values = list(values.values()) if isinstance(values, dict) else values
        if not isinstance(values, list):
            raise fields.refused(name, "allowed is a list of tokens")
        found += [token for value in values if (token := _added_token(fields, name, value))]
    return found


def _chat_template(directory: Path, fields: Fields) -> str | None:
    """The template of `chat_template.jinja`, which wins, or of `tokenizer_config.json`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = fields.get("chat_template")
    # Files may hold several templates by name, as a list or as an object.
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise fields.refused("chat_template", "allowed is a text, or texts by name")
    return template


def _id_list(value: Any, path: Path) -> list[int]:
    """Token ids that a configuration gives as nothing, one integer or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    # True is an int to `isinstance`, but no token id.
    if not all(type(i) is int and 0 <= i <= MAX_WHOLE for i in ids):
        raise ValueError(f"'{path}': eos_token_id is {shown(value)}; allowed is a token id or a list of them")
    return ids
