"""What JAX does with several processes: `python scripts/process_facts.py` prints a line per fact.

It starts 2 processes with 4 virtual CPU devices each, which form one mesh of 8. They place, gather, draw, agree and
write checkpoints. Further pairs are killed in different ways, to see how long the survivor takes and how it ends.
`--skip-endings` leaves those out.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PROCESSES, DEVICES = 2, 4
_LIMIT_SECONDS, _HEARTBEAT_SECONDS = 90, 10


def main() -> int:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-endings", action="store_true", help="kill no process")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _child(*arguments.child)
        return 0
    with tempfile.TemporaryDirectory() as directory:
        status = _pair("facts", directory)
        if not arguments.skip_endings:
            for ending in ("handler", "sigterm", "kill_1", "kill_0", "raises", "leaves"):
                _pair(ending, directory)
            _report("unreachable coordinator, limit of 5 s", _unreachable)
    return status


def _pair(name: str, directory: str) -> int:
    """Runs two processes and reports how each of them ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    processes = [_start(name, address, index, directory) for index in range(PROCESSES)]
    started = time.monotonic()
    ends: dict[int, str] = {}
    while len(ends) < PROCESSES and time.monotonic() - started < _LIMIT_SECONDS:
        for index, process in enumerate(processes):
            if index not in ends and process.poll() is not None:
                ends[index] = f"process {index} after {time.monotonic() - started:.1f} s with {process.returncode}"
        time.sleep(0.1)
    for index, process in enumerate(processes):
        if process.poll() is None:
            process.kill()
            ends[index] = f"process {index} NEVER (limit {_LIMIT_SECONDS} s)"
    print(f"end of '{name}': {'; '.join(ends.values())}", flush=True)
    return max(abs(process.wait()) for process in processes)


def _start(name: str, address: str, index: int, directory: str) -> subprocess.Popen[bytes]:
    # A proxy would be asked for the coordinator's address.
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    words = [sys.executable, __file__, "--child", name, address, str(index), directory]
    return subprocess.Popen(words, env=environment)


def _child(name: str, address: str, index: str, directory: str) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", name == "sigterm")
    signal.signal(signal.SIGTERM, lambda *_: print("  Python's handler of SIGTERM was called", flush=True))
    jax.distributed.initialize(address, PROCESSES, int(index), heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    if name == "facts":
        _facts(mesh, Path(directory))
    else:
        _end(name, mesh)


def _report(text: str, action: Callable[[], Any]) -> None:
    started = time.monotonic()
    try:
        found = action()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(f"{text}: {str(found).splitlines()[0][:160]} ({time.monotonic() - started:.3f} s)", flush=True)


def _facts(mesh: Mesh, directory: Path) -> None:
    from jax.experimental import multihost_utils

    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def placed(values: np.ndarray, sharding: NamedSharding = split) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    def global_key() -> jax.Array:
        return jax.random.wrap_key_data(placed(np.asarray(jax.random.key_data(jax.random.key(3))), whole))

    _report("devices", lambda: f"{jax.device_count()} of {jax.process_count()} processes, jax {jax.__version__}")
    numbers_N = placed(np.arange(16, dtype=np.float32))
    _report("callback array of float32", lambda: numbers_N.sharding)
    _report("callback array of bool", lambda: placed(np.arange(16) % 2 == 0).dtype)
    _report(
        "callback array of typed keys",
        lambda: jax.make_array_from_callback((), whole, lambda part: jax.random.key(3)).dtype,
    )
    _report("typed key from placed key data", lambda: global_key().sharding)
    _report("eager fold_in on a global key", lambda: jax.random.fold_in(global_key(), 1).is_fully_replicated)
    _report("eager jnp.copy keeps the split", lambda: jnp.copy(numbers_N).sharding == split)
    _report("eager zeros_like keeps the split", lambda: jnp.zeros_like(numbers_N).sharding)
    _report("jit of global and NumPy", lambda: jax.jit(jnp.add)(numbers_N, np.ones(16, np.float32)).sharding)
    _report("jit of global and uncommitted", lambda: jax.jit(jnp.add)(numbers_N, jnp.ones(16)).sharding)
    _report("jit of global and committed to one", lambda: jax.jit(jnp.add)(numbers_N, _committed()).sharding)
    _report("device_put of NumPy, first", lambda: jax.device_put(np.arange(24.0), split).shape)
    _report("device_put of NumPy, second", lambda: jax.device_put(np.arange(24.0), split).shape)
    _report("device_put of a committed local array", lambda: jax.device_put(_committed(), split).shape)
    _report("device_get of a split array", lambda: jax.device_get(numbers_N).sum())
    _report("device_get of a replicated array", lambda: jax.device_get(placed(np.arange(4), whole)).sum())
    _report("bool() of a replicated scalar", lambda: bool(jax.jit(jnp.all)(numbers_N >= 0)))
    _report("bool() of an eager result of a split", lambda: bool((numbers_N >= 0).all()))
    gathered = jax.jit(lambda tree: tree, out_shardings=whole)
    _report("one jitted gather, first", lambda: np.asarray(gathered(numbers_N).addressable_data(0)).sum())
    _report("one jitted gather, second", lambda: np.asarray(gathered(numbers_N).addressable_data(0)).sum())
    _report(
        "process_allgather(tiled) of a split array",
        lambda: multihost_utils.process_allgather(numbers_N, tiled=True).sum(),
    )
    row = np.full(8, jax.process_index(), np.uint32)
    _report("agreement of 32 bytes, first", lambda: multihost_utils.process_allgather(row).max())
    _report(
        "agreement of 32 bytes, mean of 20",
        lambda: f"{_seconds(lambda: multihost_utils.process_allgather(row)) * 1000:.2f} ms",
    )
    tokens = jax.jit(lambda key: jax.random.categorical(key, jnp.zeros((16, 50))), out_shardings=split)
    local = np.asarray(jax.random.categorical(jax.random.key(3), jnp.zeros((16, 50))))
    _report(
        "draws of a global key are those of a local one", lambda: bool(np.all(_whole(tokens(global_key())) == local))
    )
    with jax.set_mesh(mesh):
        _report("abstract mesh in set_mesh", lambda: jax.sharding.get_abstract_mesh())
    client = _client()
    _report("coordination service, allgather of text", lambda: _exchange(client, "a"))
    _report("coordination service, mean of 20", lambda: f"{_mean_exchange(client):.2f} ms")
    _report("coordination service, barrier", lambda: client.wait_at_barrier("facts", 10_000))
    if jax.process_index() == 0:
        # Process 1 never comes to this barrier.
        _report("barrier that nobody else reaches, 2 s", lambda: client.wait_at_barrier("alone", 2_000))
    _report("barrier after both", lambda: client.wait_at_barrier("after", 30_000))
    _checkpoints(mesh, numbers_N, directory)


def _checkpoints(mesh: Mesh, numbers_N: jax.Array, directory: Path) -> None:
    import orbax.checkpoint as ocp

    whole = NamedSharding(mesh, PartitionSpec())
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    names = ("arrays", "host")
    started = time.monotonic()
    manager = ocp.CheckpointManager(directory / "orbax", options=options, item_names=names)
    _report("orbax: constructor", lambda: f"{time.monotonic() - started:.3f} s")

    def save(number: int) -> Any:
        arrays = ocp.args.StandardSave({"numbers": numbers_N})
        # Only the writer's JSON lands in the file.
        host = ocp.args.JsonSave({"process": jax.process_index()})
        return manager.save(number, args=ocp.args.Composite(arrays=arrays, host=host))

    _report("orbax: save", lambda: save(1))
    _report("orbax: is_saving_in_progress", manager.is_saving_in_progress)
    # A device program between the save and its end: background barriers must not mix with it.
    _report("device program while saving", lambda: bool(jax.jit(jnp.all)(numbers_N >= 0)))
    _report("orbax: wait_until_finished", manager.wait_until_finished)
    like = jax.ShapeDtypeStruct(numbers_N.shape, numbers_N.dtype, sharding=whole)
    arguments = ocp.args.Composite(arrays=ocp.args.StandardRestore({"numbers": like}), host=ocp.args.JsonRestore())
    _report("orbax: restore, replicated", lambda: manager.restore(1, args=arguments)["arrays"]["numbers"].sharding)
    _report("orbax: host part", lambda: manager.restore(1, args=arguments)["host"])
    _report("orbax: files", lambda: sorted(path.name for path in (directory / "orbax" / "1" / "arrays").iterdir()))
    _report("orbax: close", manager.close)

    def alone() -> Any:
        multi = ocp.options.MultiprocessingOptions(primary_host=0, active_processes=set(range(PROCESSES)))
        with ocp.CheckpointManager(
            directory / "orbax",
            options=ocp.CheckpointManagerOptions(create=False, multiprocessing_options=multi),
            item_names=names,
        ) as manager:
            return manager.restore(1, args=arguments)["host"]

    _report("orbax: active_processes of all, create=False", alone)


def _end(name: str, mesh: Mesh) -> None:
    index, whole = jax.process_index(), NamedSharding(mesh, PartitionSpec())
    values_N = jax.make_array_from_callback((8,), whole, lambda part: np.zeros(8, np.float32)[part])
    step = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("data"))).sum() + x)
    for number in range(40):
        values_N = step(values_N)
        values_N.block_until_ready()
        if number == 5 and index == 1:
            if name in ("handler", "sigterm", "kill_1"):
                os.kill(os.getpid(), signal.SIGKILL if name == "kill_1" else signal.SIGTERM)
            if name == "raises":
                raise ValueError("an error of process 1")
            if name == "leaves":
                os._exit(75)
        if number == 5 and index == 0 and name == "kill_0":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "sigterm":
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(number):
                print(f"  process {index}: the service names step {number} as its sync point", flush=True)
                return
        time.sleep(0.1)


def _unreachable() -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    code = (
        "import jax\n"
        "try: jax.distributed.initialize('127.0.0.1:1', 2, 1, initialization_timeout=5)\n"
        "except Exception as error: print('  raises', type(error).__name__, str(error)[:120])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return f"code {done.returncode}; {done.stdout.strip()} {done.stderr.strip().splitlines()[-1:]}"


def _committed() -> jax.Array:
    return jax.device_put(np.arange(16.0, dtype=np.float32), jax.local_devices()[0])


def _whole(array: jax.Array) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _seconds(action: Callable[[], Any]) -> float:
    started = time.monotonic()
    for _ in range(20):
        action()
    return (time.monotonic() - started) / 20


def _client() -> Any:
    from jax._src.distributed import global_state

    return global_state.client


def _exchange(client: Any, name: str) -> list[str]:
    client.key_value_set(f"{name}/{jax.process_index()}", f"text of {jax.process_index()}")
    return [client.blocking_key_value_get(f"{name}/{index}", 10_000) for index in range(PROCESSES)]


def _mean_exchange(client: Any) -> float:
    numbers = iter(range(100))
    return _seconds(lambda: _exchange(client, f"b{next(numbers)}")) * 1000


if __name__ == "__main__":
    sys.exit(main())
