"""The byte-level BPE tokenizer of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nested_reft.models.formats.gguf_reader import GgufFile, open_gguf
from nested_reft.tokenizer import Tokenizer, surround_plain_text
from nested_reft.untrusted import reading, shown

# Qwen2 and Llama 3 cut text by the same pattern, but for how many digits make one word.
_NORMAL_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


# Texts of tokens that end a turn. Files of chat models often name the end of a document only; other loaders of GGUF
# files know these tokens by their texts too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end_of_turn|>", "<|end|>", "<|eot|>")
# Keys after `tokenizer.ggml.` that are read, or that byte-level BPE has no use for. Ids of tokens come beside them.
_KNOWN_KEYS = (
    *("model", "pre", "tokens", "token_type", "merges", "add_bos_token", "add_eos_token"),
    *("scores", "token_type_count", "add_space_prefix", "remove_extra_whitespaces"),
)


def gguf_tokenizer(source: str | Path | GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file.

    Stop tokens are those that the file names as ends, and control tokens known by their text (`TURN_ENDS`).

    Args:
        source: the file's path, or the file already opened.

    Raises:
        FileNotFoundError: no such file.
        BadFile: not a GGUF file, or a tokenizer of an unknown kind.
    """
    file = source if isinstance(source, GgufFile) else open_gguf(source)
    with reading(f"GGUF file '{file.path}'"):
        return _tokenizer(file)


def _tokenizer(file: GgufFile) -> Tokenizer:
    _refuse_unsupported(file)
    tokens, types = _tokens(file)
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special_ids = {role: _token_id(file, name, len(tokens)) for role, name in roles.items()}
    special_tokens = {role: tokens[i] for role, i in special_ids.items() if i is not None}
    # A chat model ends a turn with another token than a document; both stop a completion.
    ends = [_token_id(file, name, len(tokens)) for name in ("eos", "eot", "eom")]
    stop_ids = [i for i in ends if i is not None]
    known = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _CONTROL}
    stop_ids += [known[text] for text in TURN_ENDS if text in known]
    template = file.fields.text("tokenizer.chat_template")
    return Tokenizer(_backend_from_gguf(file, tokens, types, special_tokens), special_tokens, template, stop_ids)


def _refuse_unsupported(file: GgufFile) -> None:
    """Refuses what would split text otherwise; ignoring it would give other ids without a word."""
    prefix = "tokenizer.ggml."
    if (kind := file.require(f"{prefix}model")) != "gpt2":
        raise ValueError(f"{prefix}model is {shown(kind)}; allowed is gpt2 (byte-level BPE)")
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in _KNOWN_KEYS or name.endswith(("_token_id", "_token_ids")):
            continue
        # Zero and false mean that something is off.
        if isinstance(value, (np.ndarray, list)) or value:
            raise ValueError(f"{key} is {shown(value)}; this key is not understood and allowed only as zero or false")


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """Text and type of each token."""
    tokens = file.require("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError(f"tokenizer.ggml.tokens is {shown(tokens)}; allowed is a list of texts")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return tokens, [_NORMAL] * len(tokens)
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type is {shown(types)}; allowed is one number for each token")
    return tokens, types.tolist()


def _token_id(file: GgufFile, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    value = file.fields.whole(key, least=0)
    if value >= num_tokens:
        raise file.fields.refused(key, f"the file has {num_tokens} tokens, so it must be below that")
    return value


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = file.require("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges] if isinstance(merges, list) else []
    if not isinstance(merges, list) or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"tokenizer.ggml.merges is {shown(merges)}; allowed are texts of two tokens each")
    return pairs


def _backend_from_gguf(
    file: GgufFile, tokens: list[str], types: list[int], special_tokens: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """Byte-level BPE from a file's tokens and merges."""
    pre = file.require("tokenizer.ggml.pre")
    pre_tokenizer = _gguf_pre_tokenizer(pre)
    # Unused tokens only fill the vocabulary up to the embedding's size.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    # Llama 3 takes a word that is a token as it is, without merging it from pieces.
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    # Qwen2 brings text into Unicode form C before it is cut.
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, types, strict=True):
        # Control tokens vanish when text is decoded; tokens that a user defined stay in it.
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    # Files that do not say get what llama.cpp does: only Llama 3 begins with a begin-of-text token.
    begins = file.fields.flag("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    ends = file.fields.flag("tokenizer.ggml.add_eos_token", False)
    surround_plain_text(backend, special_tokens, begins, ends)
    return backend


def _gguf_pre_tokenizer(kind: Any) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words before BPE, by GGUF's name for it.

    Raises:
        ValueError: an unknown name.
    """
    if kind == "smollm":
        # Digits one by one, then GPT-2's own pattern.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "qwen2":
        return _split_then_bytes(_NORMAL_SPLIT % "")
    if kind == "llama-bpe":
        return _split_then_bytes(_NORMAL_SPLIT % "{1,3}")
    raise ValueError(f"tokenizer.ggml.pre is {shown(kind)}; allowed are smollm, qwen2, llama-bpe")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            # The text is cut already, so GPT-2's own pattern is switched off.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
