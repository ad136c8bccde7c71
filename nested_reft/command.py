"""The `nested-reft` command: what must be set before a process starts, then the command line.

XLA's CPU backend takes the temporaries of every call as fresh memory and gives them back. Each call then meets them
page by page; in pages of 2 MB instead of 4 kB that is cheap. glibc asks for such pages only if told at start-up.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def restart_with_huge_pages() -> None:
    """Runs this very command again, in this process's place, with huge pages; nothing where tunables are set."""
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLES: HUGE_PAGES})


def main() -> None:
    """The entry point."""
    if Path(sys.argv[0]).name == "nested-reft":  # a program that calls this one must not start over
        restart_with_huge_pages()
    try:
        from nested_reft.cli.main import main as command_line  # after the restart, so that nothing is imported twice

        sys.exit(command_line())
    except KeyboardInterrupt:  # while it was imported
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
