"""Text to token ids and back, chat templates, and the tokens that end a completion.

Everything runs on the `tokenizers` library, so a tokenizer saved here is read by it, and by
`transformers.AutoTokenizer`, without further code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
import numpy as np
import tokenizers
from jaxtyping import Int
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nested_reft.gguf_reader import GgufFile, open_gguf

END_OF_TEXT = "<|endoftext|>"
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer with its chat template and stop tokens.

    Attributes:
        stop_ids: every token that ends a completion, `eos_token` (in a chat model, the end of a turn) first.
        pad_id: the token that fills batches. It may be a stop token as well, so masks are built
            from lengths, never from it.
        vocab_size: one more than the largest token id.
        special_tokens: text of the special tokens by role, such as `eos_token`.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: str | None = None,
        stop_ids: Sequence[int] = (),
    ):
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
            backend: the tokenizer; its padding and truncation are switched off.
            special_tokens: text by role; roles are those of `SPECIAL_NAMES`.
            chat_template: Jinja source of the chat template.
            stop_ids: stop tokens beside `eos_token`.

        Raises:
            ValueError: a special token is not in the vocabulary, or there is no stop token.
        """
        backend.no_padding()
        backend.no_truncation()
        special_ids: dict[str, int] = {}
        for role, token in special_tokens.items():
            special_id = backend.token_to_id(token)
            if special_id is None:
                raise ValueError(f"tokenizer.{role} is '{token}'; it must be in the tokenizer's vocabulary")
            special_ids[role] = special_id
        if "eos_token" in special_ids:
            stop_ids = (special_ids["eos_token"], *stop_ids)
        if not stop_ids:
            raise ValueError("the tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json")
        self._backend = backend
        self._compiled_template: jinja2.Template | None = None
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop_ids))
        self.pad_id: int = special_ids.get("pad_token", self.stop_ids[0])
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        Special tokens written out in `text` become their own ids, as chat templates need.

        Args:
            text: any text.
            add_special_tokens: also add what the tokenizer puts around plain text, such as a
                begin-of-text token. Off by default: chat templates write it themselves, and
                answers that continue a prompt must not get one.

        Raises:
            ValueError: the text holds a character that the tokenizer cannot represent.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises nothing narrower
            known = "".join(sorted(token for token in self._backend.get_vocab() if len(token) == 1))[:100]
            raise ValueError(f"the tokenizer cannot encode {text[:80]!r} ({error}); it knows {known!r}") from error

    def decode(self, token_ids: Iterable[int] | Int[np.ndarray, " T"]) -> str:
        """Text of `token_ids`, special tokens and stop tokens left out."""
        ids = [int(i) for i in token_ids]
        return self._backend.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True)

    def decode_completions(
        self, tokens_BGC: Int[np.ndarray, "B G C"], length_BG: Int[np.ndarray, "B G"]
    ) -> tuple[tuple[str, ...], ...]:
        """Text of every completion, `texts[b][g]`, padding and special tokens left out."""
        return tuple(
            tuple(self.decode(tokens_C[:length]) for tokens_C, length in zip(tokens_GC, length_G, strict=True))
            for tokens_GC, length_G in zip(tokens_BGC, length_BG, strict=True)
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders a conversation as the text that the model reads.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further template variables, such as Qwen3's `enable_thinking`.

        Raises:
            ValueError: there is no chat template, or it refuses the messages.
        """
        try:
            return self._template().render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None} | self.special_tokens | variables,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def chat(self, question: str, system: str | None = None) -> list[int]:
        """Token ids of a one-question conversation, up to where the assistant's answer begins."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encode(self.apply_chat_template([*messages, {"role": "user", "content": question}]))

    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; use an instruction-tuned model, or pass plain text to encode"
            )
        if self._compiled_template is None:
            self._compiled_template = _template_environment().from_string(self.chat_template)
        return self._compiled_template

    @classmethod
    def from_huggingface(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer in a Hugging Face model directory.

        Stop tokens are all that `generation_config.json`, `config.json` and
        `tokenizer_config.json` name: chat models end a turn with another token than a document.

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
        settings = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
        stop_ids = [
            stop_id
            for name in ("generation_config.json", "config.json")
            for stop_id in _id_list(read_json(directory / name).get("eos_token_id"), directory / name)
        ]
        return cls(backend, _special_tokens(settings), _chat_template(directory, settings), stop_ids)

    @classmethod
    def from_gguf(cls, source: str | Path | GgufFile) -> Tokenizer:
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
        ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        stop_ids = [int(i) for i in ends if i is not None]
        template = file.metadata.get("tokenizer.chat_template")
        return cls(_backend_from_gguf(file, special_tokens.get("bos_token")), special_tokens, template, stop_ids)

    @classmethod
    def characters(cls, alphabet: str) -> Tokenizer:
        """One token per character, after an end-of-text token with id 0 (also the padding).

        For small models trained from scratch. Its chat template is the bare message text.

        Raises:
            ValueError: the alphabet is empty or repeats a character.
        """
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"model.alphabet is {alphabet!r}; allowed is one or more characters, each once")
        vocabulary = {END_OF_TEXT: 0} | {character: i for i, character in enumerate(alphabet, start=1)}
        # The unknown token is named but absent, so that a foreign character is refused, not dropped.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return cls(backend, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, template)

    def token_ids(self) -> dict[str, Any]:
        """What Hugging Face configurations name: `eos_token_id` (every stop token), `pad_token_id`, `bos_token_id`."""
        ids: dict[str, Any] = {"eos_token_id": self.stop_ids[0] if len(self.stop_ids) == 1 else list(self.stop_ids)}
        ids["pad_token_id"] = self.pad_id
        if "bos_token" in self.special_tokens:
            ids["bos_token_id"] = self._backend.token_to_id(self.special_tokens["bos_token"])
        return ids

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and, where there is none, the
        `generation_config.json` that holds all stop tokens.

        `from_huggingface` and `transformers.AutoTokenizer` read them back.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", settings)
        if not (directory / "generation_config.json").exists():
            write_json(directory / "generation_config.json", self.token_ids())


@runtime_checkable
class HasVocabulary(Protocol):
    """What `check_tokenizer` needs of a model's configuration."""

    @property
    def vocab_size(self) -> int: ...


def check_tokenizer(model_config: HasVocabulary, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that can give the model an id it has no embedding for.

    Raises:
        ValueError: a token or stop token has an id of `model_config.vocab_size` or more.
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids)
    if largest >= model_config.vocab_size:
        raise ValueError(
            f"the tokenizer's largest token id is {largest}; the model's vocab_size is {model_config.vocab_size},"
            " so ids must be below that: use the tokenizer that belongs to the model"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a JSON {type(value).__name__}; it must hold an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object for people and programs to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What Hugging Face directories say about special tokens.


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
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _id_list(value: Any, path: Path) -> list[int]:
    """Token ids that a configuration gives as nothing, one integer or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"'{path}': eos_token_id is {value!r}; allowed is a token id or a list of them")
    return ids


# GGUF tokenizers.

_NORMAL_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


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


def _backend_from_gguf(file: GgufFile, bos_token: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE from a file's tokens and merges."""
    kind = file.require("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is '{kind}'; allowed is gpt2 (byte-level BPE)")
    pre = file.require("tokenizer.ggml.pre")
    pre_tokenizer = _gguf_pre_tokenizer(pre)
    tokens = file.require("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    # Unused tokens only fill the vocabulary up to the embedding's size.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]

    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
    if bos_token is not None and file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, vocabulary[bos_token])]
        )
    return backend


# Chat templates: the Jinja environment that Hugging Face documents for them.


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words in some templates; here it only renders them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it, and declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Sandboxed, because templates come with downloaded models."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML, which models never saw.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
