"""What processes of one run tell each other, with one process and with two."""

import errno
import json
import socket
import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_reft import processes
from nested_reft.processes import ProcessConfig
from nested_reft.sharding import MeshConfig, make_mesh, place, to_host
from tests.process_pairs import free_port, run_together

joins = pytest.mark.skipif(
    not hasattr(jax.config, "jax_enable_preemption_service"), reason="this JAX cannot leave SIGTERM to Python"
)


def test_a_jax_that_would_keep_sigterm_is_refused(monkeypatch):
    """JAX 0.7, as Colab has it, is for one process."""

    def update(name, value):
        raise AttributeError(name)

    monkeypatch.setattr(processes.jax.config, "update", update)
    with pytest.raises(ValueError, match=r"several processes need JAX 0\.8\.1 or newer, .*; this is "):
        processes.start(ProcessConfig("127.0.0.1:1", count=2, index=0))


def test_one_process_talks_to_itself():
    processes.start(ProcessConfig())
    assert (processes.index(), processes.count(), processes.is_writer()) == (0, 1, True)
    assert processes.gather_text("here") == ("here",)
    assert processes.broadcast_text("here") == "here"
    assert processes.gather_rows(np.array([3, 4], np.uint32)).tolist() == [[3, 4]]
    assert processes.agreed(lambda: 5) == 5


def test_a_failure_of_the_only_process_is_raised_as_it_is():
    error = FileNotFoundError("no such file")

    def fail():
        raise error

    with pytest.raises(FileNotFoundError) as found:
        processes.agreed(fail)
    assert found.value is error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "processes is 0; allowed is 1 or more"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "process is 2; allowed are 0 to 1, of 2 processes"),
        ({"count": 2}, "coordinator is not given; give HOST:PORT of process 0"),
        ({"coordinator": "here", "count": 2}, "coordinator is 'here'; allowed is HOST:PORT"),
        ({"coordinator": "here:99999", "count": 2}, "coordinator is 'here:99999'; allowed is HOST:PORT"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        ProcessConfig(**fields)


@joins
def test_an_unreachable_coordinator_is_named_with_the_limit():
    # While a socket has the port and does not listen, nobody else can listen there.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        code = f"""
from nested_reft import processes
try: processes.start(processes.ProcessConfig("{address}", 2, 1, connect_seconds=1))
except processes.LateError as error: print(error)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (
        f"process 1 could not reach process 0 at coordinator '{address}' within 1 s: Connection refused" in done.stdout
    )


@joins
def test_a_first_process_that_nobody_joins_ends_with_a_line():
    address = f"127.0.0.1:{free_port()}"
    code = f"""
from nested_reft import processes
processes.start(processes.ProcessConfig("{address}", 2, 0, connect_seconds=1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 75
    assert f"process 0 waited 1 s at coordinator '{address}', and not all of the 2 processes came" in done.stderr


@joins
def test_an_address_with_another_service_is_told_from_processes_that_did_not_come():
    """The port answers, as that of a web server does, and nobody there knows of the run."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code = f"""
from nested_reft import processes
processes.start(processes.ProcessConfig("{address}", 2, 1, connect_seconds=1))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 75 and "not all of the 2 processes came" not in done.stderr
    assert f"process 1 waited 1 s at coordinator '{address}', and was not let in: the address accepted" in done.stderr


TALK = """
import json, numpy as np
me, found = processes.index(), {}
found["who"] = [me, processes.count(), processes.is_writer()]
found["texts"] = [processes.gather_text(f"{me} says {n}" if n else "") for n in range(3)]
found["broadcast"] = processes.broadcast_text("from 0" if me == 0 else None)
found["rows"] = processes.gather_rows(np.array([me, 7], np.uint32)).tolist()
found["agreed"] = processes.agreed(lambda: me * 10)

def fails_on_1():
    if me == 1:
        raise FileNotFoundError("x.json is not there")

class Own(ValueError):
    pass

def fails_on_both():
    raise Own(f"failure of {me}")

for name, action in (("one", fails_on_1), ("both", fails_on_both)):
    try:
        processes.agreed(action)
    except OSError as error:
        found[name] = [type(error).__name__, str(error)]
    except ValueError as error:
        found[name] = [type(error).__name__, str(error)]
if me == 0:
    # Process 0 holds the service that process 1 speaks through, so it must be the last to end.
    try:
        processes.gather_text("nobody answers", 5)
    except TimeoutError as error:
        found["late"] = str(error)
print(json.dumps(found))
# Process 1 has not counted the exchange that process 0 waited for in vain, so nothing more can be exchanged.
processes.flush_and_end(75)
"""


@pytest.mark.slow
def test_two_processes_talk():
    done = run_together(TALK)
    # Neither waits for the other at its end.
    assert [each.returncode for each in done] == [75, 75], done[0].stderr + done[1].stderr
    zero, one = (json.loads(each.stdout) for each in done)
    assert (zero["who"], one["who"]) == ([0, 2, True], [1, 2, False])
    assert (zero["agreed"], one["agreed"]) == (0, 10)
    assert zero["one"] == ["OSError", "process 1: x.json is not there"]  # the kind that commands tell apart
    assert one["one"] == ["FileNotFoundError", "x.json is not there"]
    # The first that failed is raised by all. Only Python's own kinds cross over.
    assert zero["both"] == ["Own", "failure of 0"]
    assert one["both"] == ["ValueError", "process 0: failure of 0"]
    assert zero["late"] == "process 1 did not answer process 0 within 5 s"
    for found in (zero, one):
        assert found["texts"] == [["", ""], ["0 says 1", "1 says 1"], ["0 says 2", "1 says 2"]]
        assert found["broadcast"] == "from 0"
        assert found["rows"] == [[0, 7], [1, 7]]


DEAD, ALIVE = (
    "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: heartbeat timeout",
    "DEADLINE_EXCEEDED",
)


@pytest.mark.parametrize(
    ("code", "error", "waited", "aborted"),
    [
        (1, None, 37_000, False),  # the others end too
        (1, DEAD, 37_000, True),
        (1, ALIVE, 37_000, False),
        (2, DEAD, 37_000, True),
        (75, DEAD, 10_000, False),  # it was asked to end, whatever became of the others
    ],
)
def test_an_error_waits_until_a_dead_process_would_be_known(code, error, waited, aborted, monkeypatch):
    done, client = [], Mock()
    client.wait_at_barrier.side_effect = None if error is None else jax.errors.JaxRuntimeError(error)
    monkeypatch.setattr(processes, "_heartbeat_seconds", 7)
    monkeypatch.setattr(processes, "_state", lambda: Mock(client=client))
    monkeypatch.setattr(processes.os, "abort", lambda: done.append("abort"))
    monkeypatch.setattr(processes, "flush_and_end", done.append)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("goodbye"))
    processes.end_together(code)
    assert client.wait_at_barrier.call_args.args[1] == waited
    # Where all have come, they say goodbye, so that none is aborted when process 0 ends first.
    assert done == ["goodbye"] * (error is None) + ["abort"] * aborted + [code]


ARRAYS = """
import json, numpy as np, jax.numpy as jnp
from nested_reft.sharding import MeshConfig, make_mesh, place, replicate, shard_batch, to_host
mesh, found = make_mesh(MeshConfig(data=8)), {}
tree = {"float": np.arange(16.0), "int": jnp.arange(8), "bool": np.arange(24).reshape(8, 3) % 2 == 0}
split = shard_batch(tree, mesh)
found["split"] = [[str(x.dtype), x.is_fully_addressable] for x in jax.tree.leaves(split)]
found["host"] = jax.tree.map(lambda x: x.tolist(), to_host(split))
# Arrays of the mesh can be given another partition, there and back.
found["back"] = to_host(shard_batch(replicate(split, mesh), mesh))["float"].tolist()
whole = replicate(np.float32(3), mesh)
mixed = to_host({"split": split["int"], "whole": whole, "local": jnp.ones(2), "host": np.ones(1)})
found["mixed"] = jax.tree.map(lambda x: np.asarray(x).tolist(), mixed)
key = place(jax.random.key(5), mesh)
found["key"] = [key.is_fully_addressable, to_host(jax.jit(jax.random.uniform, static_argnums=1)(key, (3,))).tolist()]
try:
    make_mesh(MeshConfig(data=4))
except ValueError as error:
    found["refusal"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_arrays_go_to_devices_of_two_processes_and_back():
    done = run_together(ARRAYS)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    zero, one = (json.loads(each.stdout) for each in done)
    assert zero == one
    assert zero["split"] == [["bool", False], ["float32", False], ["int32", False]]
    assert zero["host"] == {
        "float": np.arange(16.0).tolist(),
        "int": list(range(8)),
        "bool": (np.arange(24).reshape(8, 3) % 2 == 0).tolist(),
    }
    assert zero["back"] == np.arange(16.0).tolist()
    assert zero["mixed"] == {"split": list(range(8)), "whole": 3.0, "local": [1, 1], "host": [1]}
    assert zero["key"] == [False, jax.random.uniform(jax.random.key(5), (3,)).tolist()]
    assert zero["refusal"] == ("mesh.data 4 is 4 devices; allowed is 8, all devices of the 2 processes")


def test_a_draw_is_the_same_wherever_its_key_lies():
    key = jax.random.key(5)
    placed = place(key, make_mesh(MeshConfig(data=4)))
    assert jnp.array_equal(to_host(jax.random.uniform(placed, (7,))), jax.random.uniform(key, (7,)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_number_of_a_system_error_crosses_over(wrapped, monkeypatch):
    """Without it a full disk would be bad input on all processes but the one that found it."""
    full = OSError(errno.ENOSPC, "No space left on device", "config.json")
    said = []

    def fail():
        if not wrapped:
            raise full
        raise OSError("checkpoint 2 could not be written") from full

    monkeypatch.setattr(processes, "gather_text", lambda text, seconds: said.append(text) or (text,))
    with pytest.raises(OSError):
        processes.agreed(fail)
    monkeypatch.setattr(processes, "gather_text", lambda text, seconds: (said[0], ""))
    monkeypatch.setattr(processes, "index", lambda: 1)
    with pytest.raises(OSError, match=r"^process 0: ") as crossed:
        processes.agreed(lambda: None)
    assert crossed.value.errno == errno.ENOSPC
