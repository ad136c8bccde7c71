"""Trains five steps on several layouts of devices and processes, and compares each with one device.

    python scripts/layouts.py                                    # everything, about a quarter of an hour of one core
    python scripts/layouts.py --variants nested ppo --layouts "8 devices"
    python scripts/layouts.py --keep FOLDER                      # takes up again what is there: for pieces

Sampled tokens must be identical, and every metric of every step equal to float32's rounding of sums in another order:
a thousandth, or 1e-5 near zero. The table says how much of that the metric uses which is furthest off. The exit code is
1 where a layout differs. `tests/training/test_meshes.py` has a part of the same matrix.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nested_reft import processes  # noqa: E402
from nested_reft.command import THREADS_PER_DEVICE  # noqa: E402
from nested_reft.program_cache import cache_directory  # noqa: E402
from nested_reft.reports.tables import table  # noqa: E402
from nested_reft.sharding import MeshConfig  # noqa: E402
from tests.training.mesh_runs import ONE, SPREAD, STORED, VARIANTS, distances, taken_steps  # noqa: E402

DEVICES = 8  # of all processes together
ALONE = "1 device"
# How many processes share the mesh. That of the pair splits the batch between them, and all else within each.
LAYOUTS: dict[str, tuple[int, MeshConfig]] = {
    ALONE: (1, ONE),
    "2x4 devices": (1, SPREAD),
    "8 devices": (1, STORED),
    "2 processes x 4": (2, STORED),
}
LIMIT_SECONDS = 3600
# On CPUs a process must not come to a program 30 seconds later than another, as on an overloaded machine, where both
# compile. What has been compiled is kept, so the next attempt gets further.
TOO_SLOW, ATTEMPTS = "Gloo context initialization failed", 5
RUNS = "runs"  # what the steps leave


def results(layout: str, variants: list[str], directory: Path) -> dict[str, Any]:
    """The steps of each variant on a layout, read where they are kept.

    Args:
        layout: one of `LAYOUTS`.
        variants: some of `VARIANTS`.
        directory: where they are kept.
    """
    count, _ = LAYOUTS[layout]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    missing = [variant for variant in variants if not kept_at(directory, layout, variant).exists()]
    if missing:
        shutil.rmtree(directory / RUNS, ignore_errors=True)
        arguments = ["--child", layout, address, str(directory), "--variants", *missing]
        for _ in range(ATTEMPTS):
            codes, said = _together([[*arguments, "--process", str(index)] for index in range(count)], DEVICES // count)
            if not any(codes) or TOO_SLOW not in said:
                break
        if any(codes):
            raise SystemExit(f"{layout}: the processes ended with {codes}: {said[-3000:]}")
    return {variant: json.loads(kept_at(directory, layout, variant).read_text()) for variant in variants}


def _together(commands: list[list[str]], devices: int) -> tuple[list[int], str]:
    """Exit codes of the processes of a layout, and what they said."""
    with tempfile.TemporaryFile("w+") as said:
        running = [_start(arguments, devices, said) for arguments in commands]
        try:
            codes = [process.wait(LIMIT_SECONDS) for process in running]
        finally:
            for process in running:
                process.kill()
        said.seek(0)
        return codes, said.read()


def kept_at(directory: Path, layout: str, variant: str) -> Path:
    """The file of a variant's steps."""
    return directory / f"{variant}, {layout}.json"


def _start(arguments: list[str], devices: int, said: IO[str]) -> subprocess.Popen[bytes]:
    """A process of a layout."""
    # A proxy would be asked for the coordinator's address, and flags of XLA may name other devices.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache_directory()),
        "NPROC": str(THREADS_PER_DEVICE * devices),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)


def child(layout: str, address: str, directory: Path, variants: list[str], index: int) -> None:
    """A process of a layout: takes the steps, and the first one keeps them."""
    count, mesh = LAYOUTS[layout]
    processes.start(processes.ProcessConfig(address, count, index))
    for variant in variants:
        steps = taken_steps(variant, mesh, directory / RUNS)
        if processes.is_writer():
            kept_at(directory, layout, variant).write_text(json.dumps(steps))
    if count > 1:
        processes.end_together(0)


def compare(variants: list[str], layouts: list[str], directory: Path) -> int:
    """Takes what steps are missing and prints the table; 1 where a layout differs.

    Args:
        variants, layouts: which.
        directory: where steps are kept.
    """
    alone = results(ALONE, variants, directory)
    rows, wrong = [], []
    for layout in layouts:
        for variant, steps in results(layout, variants, directory).items():
            far = distances(alone[variant], steps)
            furthest = max(far, key=lambda name: far[name])
            same = all(not distance for name, distance in far.items() if name.endswith("tokens"))
            rows.append([layout, variant, "identical" if same else "differ", f"{far[furthest]:.2g}", furthest])
            wrong += [f"{layout}, {variant}, {name}: {far[name]:.2g}" for name in far if far[name] > 1]
    print(table(["layout", "variant", "tokens", "of the tolerance", "by"], rows))
    print("\n".join([*wrong[:20], f"{len(wrong)} values of {len(rows)} runs are beyond it"]))
    return int(bool(wrong))


def main() -> int:
    """Compares, or is a process of a layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    layouts = [name for name in LAYOUTS if name != ALONE]
    parser.add_argument("--layouts", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--keep", type=Path, help="folder of the steps; those that are there are not taken again")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.child:
        layout, address, directory = known.child
        child(layout, address, Path(directory), known.variants, known.process)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = known.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        return compare(known.variants, known.layouts, directory)


if __name__ == "__main__":
    sys.exit(main())
