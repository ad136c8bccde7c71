"""Text to token ids and back, chat templates, and the tokens that end a completion.

Everything runs on the `tokenizers` library, so a tokenizer saved here is read by it, and by
`transformers.AutoTokenizer`, without further code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from nested_reft.json_files import write_json
from nested_reft.templates.render import render
from nested_reft.untrusted import BadFile, is_panic, reading, shown

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
            backend: the tokenizer; its padding, truncation and dropout are switched off.
            special_tokens: text by role; roles are those of `SPECIAL_NAMES`.
            chat_template: Jinja source of the chat template.
            stop_ids: stop tokens beside `eos_token`.

        Raises:
            ValueError: a special token is not in the vocabulary, or there is no stop token.
        """
        # Batches are padded and prompts are measured elsewhere; a tokenizer that did so too would change both.
        backend.no_padding()
        backend.no_truncation()
        # Merges left out at random would give other ids each time, and a resumed run other prompts.
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        special_ids: dict[str, int] = {}
        for role, token in special_tokens.items():
            special_id = backend.token_to_id(token)
            if special_id is None:
                raise ValueError(f"tokenizer.{role} is '{token}'; it must be in the tokenizer's vocabulary")
            special_ids[role] = special_id
            # A token that stands in the vocabulary alone would be found only as a word of its own.
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if "eos_token" in special_ids:
            stop_ids = (special_ids["eos_token"], *stop_ids)
        if not stop_ids:
            raise ValueError("the tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json")
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        # A dictionary drops repeated ids and keeps their order.
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop_ids))
        # A tokenizer without a padding token fills batches with its stop token.
        self.pad_id: int = special_ids.get("pad_token", self.stop_ids[0])
        # Ids may have gaps, so the largest one decides and not their number.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`.

        Special tokens written out in `text` become their own ids, as chat templates need.

        Args:
            text: any text.
            add_special_tokens: also add what the tokenizer puts around plain text, such as a
                begin-of-text token. Off by default: chat templates write it themselves, and
                answers that continue a prompt must not get one.

        Returns:
            Token ids, not padded and not cut.

        Raises:
            ValueError: the text holds a character that the tokenizer cannot represent.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:  # the library raises nothing narrower
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            known = "".join(sorted(token for token in self._backend.get_vocab() if len(token) == 1))[:100]
            raise BadFile(f"the tokenizer cannot encode {text[:80]!r} ({error}); it knows {known!r}") from error

    def decode(self, token_ids: Iterable[int] | Int[np.ndarray, " T"]) -> str:
        """Text of `token_ids`, special tokens and stop tokens left out.

        Args:
            token_ids: one sequence, padding already cut off.
        """
        ids = [int(i) for i in token_ids]
        # A stop token that is not marked as special would stay in the text.
        with reading("the tokenizer's decoder"):
            return self._backend.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True)

    def decode_completions(
        self, tokens_BGC: Int[np.ndarray, "B G C"], length_BG: Int[np.ndarray, "B G"]
    ) -> tuple[tuple[str, ...], ...]:
        """Text of every completion, `texts[b][g]`, padding and special tokens left out.

        Args:
            tokens_BGC: completions, with padding after their ends.
            length_BG: valid tokens of each.
        """
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
            variables: further template variables, JSON-able, such as Qwen3's `enable_thinking`.

        Returns:
            The text with its special tokens written out, as `encode` reads it.

        Raises:
            ValueError: there is no chat template, or it refuses the messages, or it takes more time or
                memory than rendering may.
        """
        if self.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template; use an instruction-tuned model, or pass plain text to encode"
            )
        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        # Templates ask for these two by name, and what a caller gives wins over what is given here.
        return render(self.chat_template, {"tools": None, "documents": None} | self.special_tokens | variables | given)

    def chat(self, question: str, system: str | None = None) -> list[int]:
        """Token ids of a one-question conversation, up to where the assistant's answer begins.

        Args:
            question: the user's message.
            system: the system message; None leaves it to the chat template.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        return self.encode(self.apply_chat_template([*messages, {"role": "user", "content": question}]))

    @classmethod
    def characters(cls, alphabet: str) -> Tokenizer:
        """One token per character, after an end-of-text token with id 0 (also the padding).

        For small models trained from scratch. Its chat template is the bare message text.

        Args:
            alphabet: every character that texts may hold, each once.

        Raises:
            ValueError: the alphabet is empty or repeats a character.
        """
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ValueError(f"model.alphabet is {alphabet!r}; allowed is one or more characters, each once")
        vocabulary = {END_OF_TEXT: 0} | {character: i for i, character in enumerate(alphabet, start=1)}
        # The unknown token is named but absent, so that a foreign character is refused, not dropped.
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
        # An empty pattern matches between all characters, so each becomes a word of its own.
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        # Without it, decoding would put a space between characters.
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return cls(backend, {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, template)

    def reads_as(self, other: Tokenizer) -> bool:
        """Whether ids mean the same to both: every token, and the one that ends an answer.

        Args:
            other: the tokenizer to compare with.
        """
        own, others = (each._backend.get_vocab(with_added_tokens=True) for each in (self, other))
        return own == others and self.stop_ids[0] == other.stop_ids[0]

    def fingerprint(self) -> str:
        """A hash of what decides how texts are read: every token's id, the stop tokens, special tokens, chat template.

        Merges are left out, because the library may write them in another form from one version to the next.
        """
        vocabulary = sorted(self._backend.get_vocab(with_added_tokens=True).items())
        read = [vocabulary, self.stop_ids, self.pad_id, sorted(self.special_tokens.items()), self.chat_template]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()

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

        `models.formats.huggingface_tokenizer` and `transformers.AutoTokenizer` read them back.

        Args:
            directory: made where it does not exist.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # transformers would otherwise remove spaces before punctuation, and its texts would differ from ours.
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

    Args:
        model_config: describes the model that is to read the ids.
        tokenizer: produces the ids.

    Raises:
        BadFile: a token or stop token has an id of `model_config.vocab_size` or more.
    """
    # A stop id comes from another file than the vocabulary, and may lie outside of it.
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids)
    if largest >= model_config.vocab_size:
        raise BadFile(
            f"the tokenizer's largest token id is {largest}; the model's vocab_size is {model_config.vocab_size},"
            " so ids must be below that: use the tokenizer that belongs to the model"
        )


def surround_plain_text(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], begins: bool, ends: bool
) -> None:
    """Says which special tokens the tokenizer puts around plain text.

    Args:
        backend: changed in place.
        special_tokens: text by role; a role that is absent adds nothing.
        begins: put `bos_token` before the text.
        ends: put `eos_token` after it.

    Raises:
        ValueError: a token that is to be put there is not in the vocabulary.
    """
    before = [special_tokens["bos_token"]] if begins and "bos_token" in special_tokens else []
    after = [special_tokens["eos_token"]] if ends and "eos_token" in special_tokens else []
    found = [(token, backend.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    if absent := [token for token, token_id in found if token_id is None]:
        raise ValueError(f"the tokenizer puts {shown(absent[0])} around plain text; it must be in its vocabulary")
    # A list and not one string, because a token may hold spaces.
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=found)
