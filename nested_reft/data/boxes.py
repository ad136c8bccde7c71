r"""LaTeX boxes, `\boxed{...}`: where mathematical texts put their final answer."""

from __future__ import annotations

import re

# Escaped characters are tokens of their own, so that the braces of `\{1, 2\}` do not count.
_TOKEN = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> list[str]:
    r"""The contents of all `\boxed{...}` and `\fbox{...}` whose braces balance, outermost only, in order.

    One pass over the text, so that no text makes it slow.

    Args:
        text: a completion or a solution; untrusted.
    """
    opened: list[int | None] = []  # where each open brace's content starts; None for a brace that is no box
    found: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text):
        if token.group() == "}":
            # A closing brace too many closes nothing.
            start = opened.pop() if opened else None
            if start is not None:
                # A box that holds earlier ones replaces them, so that only the outermost stay.
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, token.start()))
        elif token.group().endswith("{") and token.group() != "\\{":
            opened.append(None if token.group() == "{" else token.end())
    return [text[start:end].strip() for start, end in found]


def last_boxed(text: str) -> str | None:
    r"""The content of the last box, or None; `\boxed 7`, which TeX allows for one token, counts too.

    Args:
        text: a solution as a dataset gives it.
    """
    # TeX writes `$` after such a token in formulas, so it ends the token here as well.
    contents = boxed(text) or [bare.rstrip(".") for bare in re.findall(r"\\boxed ([^\s$]+)", text)]
    return contents[-1] or None if contents else None
