"""The flags and variables by which a command joins other processes."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nested_reft import processes
from nested_reft.cli import joining
from nested_reft.cli.joining import join, take_flags
from nested_reft.cli.main import main
from nested_reft.exit_codes import LateError

ROOT = Path(__file__).parents[1]


def test_flags_are_taken_out_of_the_other_arguments_and_win_over_the_environment():
    arguments = ["tiny", "--coordinator", "a:1", "--train.steps", "2", "--processes=4"]
    environment = {"NESTED_REFT_PROCESSES": "8", "NESTED_REFT_PROCESS": "3", "HOME": "/"}
    rest, values = take_flags(arguments, environment)
    assert rest == ["tiny", "--train.steps", "2"]
    assert values == {"--coordinator": "a:1", "--processes": "4", "--process": "3"}
    assert take_flags(["tiny"], {}) == (["tiny"], {})


def test_values_become_the_place_among_the_processes(monkeypatch):
    """Without any nothing is joined."""
    found = []
    monkeypatch.setattr(processes, "start", found.append)
    join({})
    assert not found
    place = {"--coordinator": "a:1", "--processes": "4", "--process": "3"}
    join(place | {"--local-devices": "0,2"})
    join(place | {"--heartbeat-seconds": "7"})
    assert found == [
        processes.ProcessConfig("a:1", 4, 3, (0, 2)),
        processes.ProcessConfig("a:1", 4, 3, heartbeat_seconds=7),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator"], "--coordinator needs a value"),
        (["--processes", "two"], "--processes is 'two'; allowed is a whole number, 1 or more"),
        (["--processes", "0"], "--processes is '0'; allowed is a whole number, 1 or more"),
        (["--process", "-1"], "--process is '-1'; allowed is a whole number, 0 or more"),
        (["--process", "٣"], "--process is '٣'; allowed is a whole number, 0 or more"),
        (["--processes", "9" * 5000], "allowed is a whole number, 1 or more"),
        (["--processes", "2"], "coordinator is not given; give HOST:PORT of process 0"),
        (["--coordinator", "here", "--processes", "2"], "coordinator is 'here'; allowed is HOST:PORT"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "process is 2; allowed are 0 to 1"),
        (
            ["--coordinator", "a:1", "--processes", "2"],
            "--process is not given, and --processes is 2; give each process its own number, 0 to 1",
        ),
        (["--coordinator", "a:1", "--process", "1"], "--coordinator is given, but --processes is 1"),
        (["--processes", "2", "--coordinator", "a:1", "--local-devices", "0,0"], "is 0,0; allowed is each device once"),
        (["--local-devices", "0,x"], "--local-devices is 'x'; allowed is a whole number"),
        (
            ["--heartbeat-seconds", "0", "--coordinator", "a:1", "--processes", "2"],
            "heartbeat-seconds is '0'; allowed is a whole number, 1 or more",
        ),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["train", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_all_but_the_first_process_are_silent(monkeypatch):
    monkeypatch.setattr(processes, "start", lambda config: None)
    monkeypatch.setattr(processes, "is_writer", lambda: False)
    monkeypatch.setattr(joining.sys, "stdout", sys.stdout)
    monkeypatch.setattr(os, "environ", {})
    disabled = []
    monkeypatch.setattr(joining.logging, "disable", disabled.append)
    join({"--coordinator": "a:1", "--processes": "2", "--process": "1"})
    assert sys.stdout.name == os.devnull and os.environ["TQDM_DISABLE"] == "1" and disabled == [logging.WARNING]
    sys.stdout.close()


def test_an_unreachable_coordinator_is_one_line(monkeypatch, capsys):
    def start(config):
        raise LateError(f"process {config.index} could not reach\nprocess 0 at '{config.coordinator}'")

    monkeypatch.setattr(processes, "start", start)
    assert main(["train", "tiny", "--coordinator", "a:1", "--processes", "2", "--process", "1"]) == 75
    assert capsys.readouterr().err == "error: process 1 could not reach process 0 at 'a:1'\n"


def test_detection_without_a_cluster_says_what_to_give():
    code = (
        "import sys; from nested_reft.cli.main import main; sys.exit(main(['train', 'tiny', '--coordinator', 'auto']))"
    )
    clusters = ("SLURM", "OMPI", "TPU", "KUBERNETES", "JAX_COORDINATOR")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(clusters)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 2 and "no cluster was detected" in ended.stderr and "give HOST:PORT" in ended.stderr


@pytest.mark.parametrize(
    ("visible", "devices", "message"),
    [
        ("0,1", "0,9", "local-devices is 0,9; allowed are 0 to 1, the GPUs that are here"),
        ("", "0", "local-devices is 0; it chooses GPUs, and none are here"),
        ("-1", "0", "it chooses GPUs, and none are here"),
    ],
)
def test_devices_that_are_not_here_are_refused_before_joining(visible, devices, message, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    place = ["--coordinator", "a:1", "--processes", "2", "--process", "1", "--local-devices", devices]
    assert main(["train", "tiny", *place]) == 2
    assert message in capsys.readouterr().err


def test_devices_that_are_here_or_cannot_be_counted_are_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert processes.visible_gpus() == 2
    monkeypatch.setattr(processes, "_configure_jax", lambda seconds: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *given, **named: None)
    for devices, gpus in (((0, 1), 2), ((9,), None), (None, 0)):
        monkeypatch.setattr(processes, "visible_gpus", lambda gpus=gpus: gpus)
        processes.start(processes.ProcessConfig("a:1", 2, 0, devices))


@pytest.mark.parametrize(
    "words",
    [
        ["--coordinator", "127.0.0.1:PORT", "--processes", "2", "--process", "0"],
        ["--coordinator", "127.0.0.1:PORT", "--processes", "2", "--process", "1"],
        ["--coordinator", "auto"],
    ],
)
def test_a_process_that_comes_late_ends_the_others_with_one_code(words, monkeypatch, capsys):
    """Whoever waits ends with 75: process 0, another one, and one whose cluster is detected."""
    codes = []

    def waits(*given, **limits):
        assert limits["initialization_timeout"] > 60  # of JAX, which would abort
        for _ in range(1000):
            if codes:
                raise SystemExit  # where the process would have ended
            time.sleep(0.01)

    monkeypatch.setattr(processes.jax.distributed, "initialize", waits)
    monkeypatch.setattr(processes, "_configure_jax", lambda seconds: None)
    monkeypatch.setattr(processes, "flush_and_end", codes.append)
    monkeypatch.setattr(processes, "is_writer", lambda: True)
    monkeypatch.setattr(joining, "CONNECT_SECONDS", 1)
    with socket.socket() as found:  # a port that nobody listens at
        found.bind(("127.0.0.1", 0))
        words = [word.replace("PORT", str(found.getsockname()[1])) for word in words]
        code = main(["train", "nothing", *words])
    assert (codes or [code]) == [75]
    said = capsys.readouterr().err
    assert "not all of" in said or "could not reach process 0" in said


@pytest.mark.parametrize(("said", "kind"), [("DEADLINE_EXCEEDED: x", LateError), ("UNAVAILABLE: x", TimeoutError)])
def test_an_answer_that_does_not_come_is_late_unless_the_process_is_gone(said, kind, monkeypatch):
    class Client:
        def blocking_key_value_get(self, *_):
            raise processes.jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(processes, "_state", lambda: SimpleNamespace(client=Client(), process_id=0))
    with pytest.raises(TimeoutError, match="did not answer") as error:
        processes._read(0, 1, 1.0)
    assert type(error.value) is kind
