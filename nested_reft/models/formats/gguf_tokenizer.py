"""The byte-level BPE tokenizer of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nested_reft.models.formats.gguf_reader import GgufFile, open_gguf
from nested_reft.tokenizer import Tokenizer

# Qwen2 and Llama 3 cut text by the same pattern, but for how many digits make one word.
_NORMAL_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType


def gguf_tokenizer(source: str | Path | GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file.

    Args:
        source: the file's path, or the file already opened.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a GGUF file, or a tokenizer of an unknown kind.
    """
    file = source if isinstance(source, GgufFile) else open_gguf(source)
    tokens = file.require("tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special_ids = {role: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    special_tokens = {role: tokens[i] for role, i in special_ids.items() if i is not None}
    # A chat model ends a turn with another token than a document; both stop a completion.
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stop_ids = [int(i) for i in ends if i is not None]
    template = file.metadata.get("tokenizer.chat_template")
    return Tokenizer(_backend_from_gguf(file, special_tokens.get("bos_token")), special_tokens, template, stop_ids)


def _backend_from_gguf(file: GgufFile, bos_token: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE from a file's tokens and merges."""
    kind = file.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is '{kind}'; allowed is gpt2 (byte-level BPE)")
    pre = file.require("tokenizer.ggml.pre")
    pre_tokenizer = _gguf_pre_tokenizer(pre)
    tokens = file.require("tokenizer.ggml.tokens")
    # Type 1 is that of a normal token.
    types = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    # Unused tokens only fill the vocabulary up to the embedding's size.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]

    # Llama 3 takes a word that is a token as it is, without merging it from pieces.
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
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
    if bos_token is not None and file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, vocabulary[bos_token])]
        )
    return backend


def _gguf_pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
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
    raise ValueError(f"tokenizer.ggml.pre is '{kind}'; allowed are smollm, qwen2, llama-bpe")


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            # The text is cut already, so GPT-2's own pattern is switched off.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
