"""The `nested-reft` command: what must be set before a process starts, then the command line.

XLA's CPU backend takes the temporaries of every call as fresh memory and gives them back. Each call then meets them
page by page; in pages of 2 MB instead of 4 kB that is cheap. glibc asks for such pages only if told at start-up.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from nested_reft.exit_codes import INTERRUPTED
from nested_reft.program_cache import NO_CACHE, cache_directory, drop_old_programs

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
THREADS_PER_DEVICE = 8
_DEVICE_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def restart_with_huge_pages() -> None:
    """Runs this very command again, in this process's place, with huge pages; nothing where tunables are set."""
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLES: HUGE_PAGES})


def keep_compiled_programs(arguments: list[str]) -> None:
    """Lets JAX keep compiled programs in the user's cache directory, unless the user or the environment says otherwise.

    Args:
        arguments: of the command line.
    """
    if NO_CACHE in arguments:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    directory = cache_directory()
    # JAX reads both when it is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # less is not worth a file
    drop_old_programs(directory)


def give_devices_threads(devices: int) -> None:
    """Gives XLA's CPU backend enough threads for programs over several devices of this process.

    A device may meet independent exchanges in another order than its peers, and a thread that waits in one is lost to
    the others. By default there are as many threads as devices, so runs could stand still until XLA ended them. More
    threads let both exchanges wait at once. XLA reads their number from NPROC, which stays as it is if it is set.

    Args:
        devices: how many CPU devices the process has.
    """
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))


def asked_devices() -> int:
    """How many CPU devices the environment asks JAX for."""
    flag = _DEVICE_FLAG.search(os.environ.get("XLA_FLAGS", ""))
    asked = os.environ.get("JAX_NUM_CPU_DEVICES") or (flag[1] if flag else "1")
    return int(asked) if asked.isdecimal() else 1


def environment_of(devices: int) -> dict[str, str]:
    """The environment of another process on this machine that is to have CPU devices, which may join a group.

    Args:
        devices: how many.
    """
    # A proxy would be asked for the coordinator's address.
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "NPROC": str(THREADS_PER_DEVICE * devices),
        # JAX refuses two numbers of devices. The other flags hold for this process too.
        "XLA_FLAGS": _DEVICE_FLAG.sub("", os.environ.get("XLA_FLAGS", "")),
    }


def ignore_interrupts() -> None:
    """Nothing is left to stop once a command has ended: another Ctrl-C would only break off how Python closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """The entry point."""
    if Path(sys.argv[0]).name == "nested-reft":  # a program that calls this one must not start over
        restart_with_huge_pages()
    keep_compiled_programs(sys.argv[1:])
    give_devices_threads(asked_devices())
    try:
        from nested_reft.cli.main import main as command_line  # after the restart, so that nothing is imported twice

        code = command_line()
        ignore_interrupts()
        sys.exit(code)
    except KeyboardInterrupt:  # while it was imported
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
