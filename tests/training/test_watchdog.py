"""The watchdog: what counts as progress, what it leaves behind, and how a command ends."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nested_reft.heartbeat import beat, beats
from nested_reft.run_directory import RunDirectory
from nested_reft.training import watchdog
from nested_reft.training.setup import prepare
from nested_reft.training.trainer import Trainer
from nested_reft.training.watchdog import Watchdog, is_compiling
from tests.training.runs import nano

ROOT = Path(__file__).parents[2]


def watching(path, said, seconds=10.0) -> Watchdog:
    return Watchdog(seconds, path, signs=beats, where=lambda: "nano, step 3, stage 'training'", on_stall=said.append)


def test_a_stall_is_the_limit_without_a_sign(tmp_path):
    said = []
    dog = watching(tmp_path, said)
    for _ in range(9):
        dog.look(1.0)
    beat()
    dog.look(1.0)
    for _ in range(9):
        dog.look(1.0)
    assert not said
    dog.look(1.0)
    (words,) = said
    assert words.startswith("nano, step 3, stage 'training': no progress for 10 seconds (train.stall_seconds 10); ")
    assert f"are in '{tmp_path / 'stalls' / 'process_0.txt'}'" in words
    text = (tmp_path / "stalls" / "process_0.txt").read_text()
    # The stacks name the file and the function in which each thread is.
    assert "nano, step 3, stage 'training'" in text and "in test_a_stall_is_the_limit_without_a_sign" in text
    # It begins to count again, and adds to the file.
    for _ in range(10):
        dog.look(1.0)
    assert len(said) == 2 and (tmp_path / "stalls" / "process_0.txt").read_text().count("no progress") == 2


def test_a_process_that_was_stopped_for_a_while_has_not_stalled(tmp_path):
    said = []
    watching(tmp_path, said).look(1e6)
    assert not said


def test_compiling_is_no_stall(tmp_path):
    """A thread within JAX's module of that name waits for the compiler."""
    go_on, began, said = threading.Event(), threading.Event(), []
    scope = {"began": began, "go_on": go_on}
    source = "def compile_or_get_cached():\n    began.set()\n    go_on.wait(60)\n"
    exec(compile(source, f"/any/where/{watchdog.COMPILER}", "exec"), scope)
    thread = threading.Thread(target=scope["compile_or_get_cached"])
    thread.start()
    began.wait(60)
    dog = watching(tmp_path, said)
    assert is_compiling()
    for _ in range(20):
        dog.look(1.0)
    go_on.set()
    thread.join()
    assert not said and not is_compiling()
    for _ in range(10):
        dog.look(1.0)
    assert len(said) == 1


def test_the_compiler_of_this_jax_has_that_module():
    from jax._src import compiler

    assert compiler.__file__.endswith(watchdog.COMPILER) and hasattr(compiler, "compile_or_get_cached")


def test_stacks_that_cannot_be_written_go_to_the_terminal(tmp_path, capfd):
    (tmp_path / "stalls").write_text("a file in its place")
    said = []
    dog = watching(tmp_path, said)
    for _ in range(10):
        dog.look(1.0)
    assert "could not be written to" in said[0] and "File exists" in said[0]
    assert "in test_stacks_that_cannot_be_written_go_to_the_terminal" in capfd.readouterr().err


def test_the_thread_looks_until_the_block_ends(tmp_path, caplog):
    said, stalled = [], threading.Event()

    def on_stall(words):
        said.append(words)
        stalled.set()

    with Watchdog(0.2, tmp_path, lambda: 0, lambda: "here", on_stall):
        assert any(thread.name == "watchdog" for thread in threading.enumerate())
        assert stalled.wait(60)
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    with Watchdog(None, tmp_path, lambda: 0, lambda: "here", on_stall):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    # Without anybody to tell, it is a warning.
    dog = Watchdog(1.0, tmp_path, lambda: 0, lambda: "here")
    for _ in range(10):
        dog.look(0.2)
    assert "here: no progress for 1 seconds" in caplog.text


def test_a_run_says_stage_and_step_of_its_stall(tmp_path):
    """The second step waits until the watchdog has spoken of it, with the function in which it waits."""
    heard, stacks = threading.Event(), tmp_path / "stalls" / "process_0.txt"

    def on_stall(words):
        # On a slow machine the step may have stalled before.
        if "nano, step 2, stage 'training'" in words and " in hold\n" in stacks.read_text():
            heard.set()

    def hold(found):
        if found.number == 2:
            heard.wait(120)

    config = nano(train__steps=2, train__stall_seconds=0.5, evaluation__samples_per_prompt=0)
    run = Trainer(prepare(config), RunDirectory(tmp_path), hold, on_stall)
    run.open().run()
    assert heard.is_set()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_command_ends_with_a_code_of_its_own(tmp_path):
    code = f"""
import time
from pathlib import Path
from nested_reft.cli.train import _end_stalled
from nested_reft.training.watchdog import Watchdog
with Watchdog(0.2, Path({str(tmp_path)!r}), lambda: 0, lambda: "tiny, step 7, stage 'evaluation'", _end_stalled):
    time.sleep(300)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 76
    assert ended.stderr.strip().splitlines()[-1].startswith("error: tiny, step 7, stage 'evaluation': no progress for")
    assert "with --resume" in ended.stderr
    assert 'File "<string>", line 7 in <module>' in (tmp_path / "stalls" / "process_0.txt").read_text()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_limits_that_mean_nothing_are_refused(seconds):
    with pytest.raises(ValueError, match=r"train.stall_seconds is .*; allowed is more than 0, up to 1e6, or None"):
        nano(train__stall_seconds=seconds)
