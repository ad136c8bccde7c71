"""How a question becomes a prompt: the text that a model reads before it answers."""

from __future__ import annotations

import dataclasses
import re
import string
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PromptTokenizer(Protocol):
    """What writing prompts needs of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: also add what the tokenizer puts around plain text.
        """
        ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat.

        Args:
            messages: turns with `role` and `content`, the oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further variables of the template.
        """
        ...


@runtime_checkable
class Question(Protocol):
    """What a template may name: the question, and any field of the metadata."""

    @property
    def question(self) -> str:
        """What is asked."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """Further fields by name, which differ from source to source."""
        ...

    @property
    def source(self) -> str:
        """Name of the data source, for messages."""
        ...


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes a prompt.

    Attributes:
        template: the user's message, with `{question}` and any field of the example's metadata in braces.
        chat: apply the tokenizer's chat template; otherwise the message is the prompt.
        system: the chat's system message; None leaves it to the chat template.
        demonstrations: earlier turns of the chat that show how to answer: pairs of a user's message
            and the reply to it, word for word.
        variables: of the chat template, by name, such as `(("enable_thinking", False),)`.
    """

    template: str = "{question}"
    chat: bool = True
    system: str | None = None
    demonstrations: tuple[tuple[str, str], ...] = ()
    variables: tuple[tuple[str, bool | int | str], ...] = ()

    def __post_init__(self):
        for name in ("system", "demonstrations", "variables"):
            if (value := getattr(self, name)) and not self.chat:
                raise ValueError(
                    f"data.prompt.{name} is {value!r}, but data.prompt.chat is False; plain text has no turns"
                )
        # The braces themselves are read when the template is filled.
        if "{" not in self.template:
            raise ValueError(
                f"data.prompt.template is {self.template!r}, so all prompts would be alike; it needs a field such as"
                " {question}"
            )
        names = [name for name, _ in self.variables]
        # These two are what a prompt is made of.
        if len(set(names)) < len(names) or {"messages", "add_generation_prompt"} & set(names):
            raise ValueError(
                f"data.prompt.variables is {self.variables!r}; each name must be there once, and messages and"
                " add_generation_prompt are given already"
            )

    def with_chat(self, chat: bool) -> PromptFormat:
        """The same format with the chat template applied or not; plain text keeps the template alone."""
        # The constructor refuses a system message without chat, so plain text starts from a new format.
        return dataclasses.replace(self, chat=True) if chat else PromptFormat(self.template, chat=False)

    def write(self, message: str, tokenizer: PromptTokenizer) -> str:
        """The prompt of one user's message, up to where the answer begins.

        Args:
            message: the user's, as `fill` gives it.
            tokenizer: gives the chat template.

        Returns:
            The text that the model reads.
        """
        if not self.chat:
            return message
        # Without a system message of ours, many chat templates put in their own.
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, reply in self.demonstrations:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        turns.append({"role": "user", "content": message})
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **dict(self.variables))

    def encode(self, text: str, tokenizer: PromptTokenizer) -> list[int]:
        """Token ids of a prompt.

        A chat template writes the special tokens itself. Plain text gets those that the tokenizer
        puts around text, such as a begin-of-text token.

        Args:
            text: what `write` gave.
            tokenizer: the model's.
        """
        return tokenizer.encode(text, add_special_tokens=not self.chat)

    def fill(self, example: Question, field: str = "data.prompt") -> str:
        """The user's message of one example; `field` is where the format stands in the configuration.

        Args:
            example: gives the question and the other fields.
            field: name of this format in the configuration, for messages.

        Raises:
            ValueError: the template names a field that the example does not have.
        """
        # The question wins over a field of the metadata that has its name.
        fields = {**example.metadata, "question": example.question}
        try:
            _check_widths(self.template)
            return self.template.format_map(fields)
        # These are what a format string raises for unknown names, places, formats, attributes and parts.
        except (KeyError, IndexError, ValueError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{field}.template is {self.template!r}, which cannot be filled for source '{example.source}'"
                f" ({error!r}); allowed fields are {', '.join(sorted(fields))}"
            ) from None


def _check_widths(template: str) -> None:
    """Refuses formats such as `{question:9999999}`, which would fill the memory with spaces.

    Raises:
        ValueError: a width or precision is too large or is a field itself, or the braces do not match.
    """
    for _, _, spec, _ in string.Formatter().parse(template):
        if spec and re.search(r"[0-9]{4}|\{", spec):
            raise ValueError(f"the format '{spec}' has a width; allowed is a number up to 999")
