"""What `mkdocs` does beside its own work: pages from outside `docs/` join the site, and links follow them.

    make docs

README, CONTRIBUTING, CHANGELOG and the pages of results stay where people look for them in a checkout. Their links are
relative to their own place, so in the site each link is pointed anew. A link to what the site does not have, such as a
module, becomes plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = "experiments/results"
# What is not under docs/, by its place in the checkout and in the site.
TOP_PAGES = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# `[text](target)` and `![text](target)`; text may hold code in backticks and one pair of brackets.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def pages_of_the_checkout(root: Path = ROOT) -> dict[str, str]:
    """Every file that the site shows: its place in the checkout -> its place in the site.

    Args:
        root: of the checkout.
    """
    found = dict(TOP_PAGES)
    for path in sorted((root / RESULTS).iterdir()):
        if path.suffix in (".md", ".png", ".svg"):
            found[f"{RESULTS}/{path.name}"] = f"results/{'index.md' if path.name == 'README.md' else path.name}"
    for path in sorted((root / "docs").rglob("*")):
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.relative_to(root / "docs").as_posix()
    return found


def links(text: str) -> list[str]:
    """The targets of a page's links, without those in code.

    Args:
        text: of the page, as Markdown.
    """
    # In parts of the split, code is every second one. A link's own text may be code, so inline code stays a letter.
    shown = "".join(part if index % 2 == 0 else "x" for index, part in enumerate(CODE.split(text)))
    return [target for _, _, target in LINK.findall(shown)]


def is_relative(target: str) -> bool:
    """Whether a link leads to a file of the checkout.

    Args:
        target: of the link.
    """
    return not target.startswith("#") and re.match(r"[a-z][a-z+.-]*:", target) is None


def turned(text: str, place: str, pages: dict[str, str]) -> str:
    """The text of a page with its links pointed at the site.

    Args:
        text: of the page, as Markdown.
        place: of the page in the checkout.
        pages: as `pages_of_the_checkout` gives them.
    """

    def point(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if not is_relative(target):
            return match[0]
        path, _, anchor = target.partition("#")
        there = pages.get(posixpath.normpath(posixpath.join(posixpath.dirname(place), path)))
        if there is None:
            return label
        link = posixpath.relpath(there, posixpath.dirname(pages[place]) or ".")
        return f"{image}[{label}]({link}{'#' + anchor if anchor else ''})"

    # Blocks of code stay as they are. A label may hold inline code, so only blocks are set apart.
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if index % 2 else LINK.sub(point, part) for index, part in enumerate(parts))


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside `docs/`.

    Args:
        files: of the site.
        config: of MkDocs.
    """
    # MkDocs is there when it calls this, and not where the tests read links.
    from mkdocs.structure.files import File, InclusionLevel  # pyright: ignore[reportMissingImports]

    for place, there in pages_of_the_checkout().items():
        if not place.startswith("docs/"):
            inclusion = InclusionLevel.NOT_IN_NAV if there.startswith("results/") else InclusionLevel.INCLUDED
            files.append(File.generated(config, there, abs_src_path=os.fspath(ROOT / place), inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points the links of a page at the site.

    Args:
        markdown: the text of the page.
        page: says where it stands.
        config, files: of MkDocs.
    """
    pages = pages_of_the_checkout()
    place = next(place for place, there in pages.items() if there == page.file.src_uri)
    # Python-Markdown takes a table right behind a comment for a part of it.
    return re.sub(r"^<!--.*?-->\n", "", turned(markdown, place, pages), flags=re.MULTILINE)
