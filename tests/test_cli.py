"""The command line: what it refuses, with which exit code, and that refusing leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from nested_reft import command
from nested_reft.checkpoints import CheckpointError
from nested_reft.cli import configs
from nested_reft.cli.main import COMMANDS, main
from nested_reft.command import HUGE_PAGES, TUNABLES
from nested_reft.config_files import config_names

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--data.prompts-per-batch", "4", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "4", "--warm-start.steps", "0"),
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(arguments, capsys) -> str:
    """The message of a refused command; checks that nothing was written."""
    before = sorted(Path.cwd().rglob("*"))
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse and tyro refuse by themselves
        code = stop.code
    assert code == 2
    assert sorted(Path.cwd().rglob("*")) == before
    output = capsys.readouterr()
    return " ".join((output.err + output.out).replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "command 'fly' is unknown; known are train"),
        (["train"], "train needs the name of a configuration"),
        (["train", "nothing"], "configuration 'nothing' is unknown; known are qwen_math_combined"),
        (["train", "missing.py"], "configuration file 'missing.py' does not exist"),
        (["train", "tiny", "--no.such-field", "1"], "no.such-field"),
        (["train", "tiny", "--nesting.skip-ratio", "1.5"], "nesting.skip_ratio is 1.5; allowed is 0 <= skip_ratio < 1"),
        (["train", "tiny", "--nesting.skip-ratio", "high"], "skip-ratio"),
        (["train", "tiny", "--nesting.border", "3"], "nesting.border is 3 and nesting.skip_ratio 0.2"),
        (["train", "tiny", "--data.prompts-per-batch", "0"], "data.prompts_per_batch is 0"),
        (
            ["train", "tiny", "--loss.bias-mitigation", "retrace"],
            "loss.truncate_at is set, but bias_mitigation 'retrace' already limits the weight",
        ),
        (["train", "tiny", "--data.max-prompt-tokens", "4"], "data.max_prompt_tokens is 4"),
        (["train", "tiny", "--data.sources.0.task", "chain_sun"], "did you mean one of: chain_sum"),
        (["train", "smollm2_chain_sum", "--model.name", "gpt-9"], "model is 'gpt-9', which is neither known"),
        (["train", "smollm2_chain_sum", "--model.name", "./weights.gguf"], "weights.gguf' does not exist"),
        (["train", "tiny", "--json", "no/such/dir/file.json"], "cannot write"),
        (["configs", "--json", "no/such/dir/file.json"], "cannot write"),
        (
            ["compile", "smollm2_chain_sum", "--model", "scratch"],
            "--model is 'scratch', but configuration 'smollm2_chain",
        ),
        (["train", "tiny", "--json", "/proc/file.json"], "cannot write '/proc/file.json'"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run directory"),
        (["eval", "nowhere"], "'nowhere' is not a run directory; name the configuration"),
        (["eval", "smollm2-135m", "--config", "nothing"], "configuration 'nothing' is unknown"),
        (["sample", "nowhere", "2 + 2"], "model is 'nowhere'"),
        (["sample", "smollm2-135m", "2 + 2", "--skip-ratio", "1"], "--skip-ratio is 1.0"),
        (["sample", "smollm2-135m", "2 + 2", "--temperature", "-1"], "--temperature is -1.0"),
        (
            ["sample", "smollm2-135m", "2 + 2", "--skip-layers", "30"],
            "--skip-layers names [30]; the model has",
        ),
        (["verify-estimators", "--seed", "-1"], "--seed is -1; allowed is 0 to"),
        (["train", "tiny", "--runs", ""], "--runs is ''; allowed is a directory"),
        (["train", "tiny", "--runs", "/dev/null/runs"], "'/dev/null' is a file"),
        (["export", "nowhere", "out"], "'nowhere' is not a run directory"),
        (["measure-layers", "smollm2-135m", "--config", "tiny", "--out", "x/y.json"], "cannot write 'x/y.json'"),
    ],
)
def test_refuses(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_help_and_version(capsys):
    assert main([]) == 0 and "nested-reft COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == "0.1.0"


def test_help_lists_every_command(capsys):
    main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert list(dict.fromkeys(listed)) == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [(["--help"], {"jax", "tyro", "numpy"}), (["fly"], {"jax", "tyro", "numpy"}), (["configs"], {"jax", "numpy"})],
)
def test_what_needs_no_jax_does_not_wait_for_it(arguments, absent):
    code = f"import sys; from nested_reft.cli.main import main; main({arguments}); print(*sys.modules, file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "nested_reft.cli.main" in result.stderr.split() and not absent & set(result.stderr.split())


def test_configs_lists_what_ships(capsys):
    assert main(["configs", "--json", "configs.json"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["configuration", "time", "what", "it", "is"]
    assert [row.split()[0] for row in rows] == config_names()
    found = {each.pop("name"): each for each in json.loads(Path("configs.json").read_text())}
    assert list(found) == config_names()
    assert all(each["time"] and each["about"].endswith((".", ":")) for each in found.values())
    assert found["tiny"]["time"] == "about two minutes on two cores"
    (row,) = (row for row in rows if row.startswith("tiny "))
    assert "  about two minutes on two cores  " in row and row.endswith(found["tiny"]["about"])


@pytest.mark.parametrize(
    ("text", "time", "about"),
    [
        (
            '"""What.\n\nMore. Time: not a line.\nTime: 2.5 hours on one TPU.\n"""\nraise SystemExit',
            "2.5 hours on one TPU",
            "What.",
        ),
        ('"""Only this line."""', "", "Only this line."),
        ("x = 1", "", ""),
    ],
)
def test_a_configuration_is_described_without_running_it(text, time, about):
    path = Path("mine.py")
    path.write_text(text)
    assert configs.describe(path) == configs.Description("mine", time, about)


def test_configs_without_time_and_what_is_no_python(monkeypatch, capsys):
    path = Path("mine.py")
    monkeypatch.setattr(configs, "shipped_configs", lambda: {"mine": path})
    path.write_text('"""Mine."""')
    assert main(["configs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mine", "-", "Mine."]
    path.write_text("def")
    assert "configuration file 'mine.py' cannot be read: invalid syntax" in refused(["configs"], capsys)
    path.write_bytes(b"\xff")
    assert "configuration file 'mine.py' cannot be read: 'utf-8' codec" in refused(["configs"], capsys)


def test_train_eval_export_sample_and_resume(capsys, tmp_path):
    """One run through every command; then the run refuses another configuration and stays as it is."""
    retrace = ["--loss.bias-mitigation", "retrace", "--loss.truncate-at", "None"]
    assert main(["train", "tiny", *SMALL, *retrace, "--train.steps", "2", "--json", "summary.json"]) == 0
    (run,) = Path("runs").iterdir()
    assert str(run) in capsys.readouterr().out
    assert json.loads(Path("summary.json").read_text()) == json.loads((run / "summary.json").read_text())
    assert json.loads((run / "config.json").read_text())["loss"]["bias_mitigation"] == "retrace"

    assert main(["eval", str(run), "--json", "eval.json"]) == 0
    assert "three_to_six_digits" in json.loads(Path("eval.json").read_text())
    capsys.readouterr()
    assert main(["sample", str(run), "1 + 2 + 3 =", "--max-tokens", "4", "--skip-layers", "2", "3"]) == 0
    shown = capsys.readouterr().out
    assert "full (6 of 6 layers)" in shown and "nested (4 of 6 layers, without layers [2, 3])" in shown
    assert main(["export", str(run), "exported"]) == 0
    assert Path("exported/model.safetensors").is_file()
    assert "exists already" in refused(["export", str(run), "exported"], capsys)

    held = (run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    message = refused(["train", "--resume", str(run), "--optimizer.learning-rate", "0.5"], capsys)
    assert "holds another configuration: optimizer.learning_rate is 0.5, the run has 0.0005" in message
    assert "holds another configuration" in refused(["train", "smollm2_chain_sum", "--resume", str(run)], capsys)
    assert held == ((run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes())
    assert main(["train", "--resume", str(run)]) == 0
    assert f"run '{run}' is complete" in capsys.readouterr().out

    (array,) = (run / "checkpoints" / "2" / "arrays").glob("d/*")
    array.write_bytes(b"")
    before = sorted(run.rglob("*"))
    message = refused(["eval", str(run)], capsys)
    assert "checkpoint 2" in message and f"is damaged: file arrays/d/{array.name} has 0 bytes, and" in message
    assert sorted(run.rglob("*")) == before
    (run / "summary.json").write_text("{")  # not complete, so that it is resumed
    message = refused(["train", "--resume", str(run)], capsys)
    assert "checkpoint 2" in message and "there is no other to continue from" in message


def test_measured_layers_can_be_trained_with(capsys):
    assert main(["measure-layers", "scratch", "--config", "tiny", "--prompts", "4", "--out", "layers.json"]) == 0
    measured = json.loads(Path("layers.json").read_text())
    assert measured["num_layers"] == 6 and all(d >= 0 for d in measured["divergence"])
    arguments = ["--nesting.choice", "measured", "--nesting.divergence-file", "layers.json", "--train.steps", "1"]
    assert main(["train", "tiny", *SMALL, *arguments]) == 0
    wrong = Path("wrong.json")
    wrong.write_text('{"divergence": [1, 2]}')
    arguments[3] = "wrong.json"
    assert "has 2 layers; the model has 6" in refused(["train", "tiny", *SMALL, *arguments], capsys)
    arguments[3] = "runs"
    message = f"nesting.divergence_file is '{Path.cwd() / 'runs'}', which holds no"
    assert message in refused(["train", "tiny", *SMALL, *arguments], capsys)
    arguments[3] = "absent.json"
    assert "does not exist" in refused(["train", "tiny", *SMALL, *arguments], capsys)


def test_a_users_own_configuration_file(capsys):
    Path("mine.py").write_text(
        "import dataclasses\nfrom nested_reft.training.config import load_config\n\n\n"
        "def get_config():\n    return dataclasses.replace(load_config('tiny'), name='mine')\n"
    )
    assert main(["train", "mine.py", *SMALL, "--train.steps", "1"]) == 0
    assert next(Path("runs").iterdir()).name.startswith("mine-")
    Path("broken.py").write_text("x = 1\n")
    assert "has no get_config()" in refused(["train", "broken.py"], capsys)


def test_a_signal_while_train_is_imported_is_not_lost(monkeypatch, capsys):
    """Raised within an import, an interrupt may be swallowed; as a request it waits for the command."""
    began = []

    def imported(name):
        signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(run=began.append)

    monkeypatch.setattr("nested_reft.cli.main.importlib.import_module", imported)
    assert main(["train", "tiny"]) == 130
    assert began == [["tiny"]] and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CheckpointError("checkpoint 5 could not be written"), 1, ["error: checkpoint 5 could not", "to continue: "]),
        (
            OSError(28, "No space left on device", "metrics.jsonl"),
            1,
            ["error: [Errno 28] No space", "to continue: "],
        ),
        (KeyboardInterrupt(), 130, ["to continue: nested-reft train --resume ", "interrupted"]),
        (FloatingPointError("step 2: loss is nan"), 1, ["error: step 2: loss is nan"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_what_ends_a_run_is_a_line_and_a_code(error, code, lines, has_checkpoint, monkeypatch, capsys):
    path = Path("runs", "tiny-1")
    path.mkdir(parents=True)
    if has_checkpoint:
        (path / "checkpoints" / "4").mkdir(parents=True)
        (path / "checkpoints" / "4" / "file").write_text("")
    fake = SimpleNamespace(run_directory=SimpleNamespace(path=path), run=Mock(side_effect=error))
    monkeypatch.setattr("nested_reft.cli.train.open_trainer", lambda *_: fake)
    try:
        found = main(["train", "tiny"])
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr().err.strip().splitlines()
    if not has_checkpoint:
        lines = ["the run ended before its first" if line.startswith("to continue") else line for line in lines]
    assert found == code and len(printed) == len(lines)
    assert all(text.startswith(start) for text, start in zip(printed, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_resumes(number, tmp_path):
    """SIGTERM ends it after the step, with a checkpoint; SIGKILL at once, and the last checkpoint holds."""
    command = [sys.executable, "-m", "nested_reft.command", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    fast = [*SMALL, "--train.checkpoint-every", "2"]
    process = subprocess.Popen([*command, "tiny", *fast, "--train.steps", "3000"], env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(tmp_path.glob("runs/*/checkpoints/[1-9]*")):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=120) == (130 if number == signal.SIGTERM else -number)
    (run,) = (tmp_path / "runs").iterdir()
    stopped_at = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    process = subprocess.Popen([*command, "--resume", str(run)], env=environment, cwd=tmp_path)
    while time.monotonic() < deadline + 120:
        steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
        if steps and max(steps) > stopped_at:
            break
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged)) and max(logged) > stopped_at


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
@pytest.mark.parametrize(("already", "expected"), [({}, HUGE_PAGES), ({TUNABLES: "glibc.malloc.tcache_count=7"}, "7")])
def test_command_restarts_itself_with_huge_pages_unless_tunables_are_set(already, expected):
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES} | already
    code = f"""
import os, sys
print("process", os.getpid())
from nested_reft.command import restart_with_huge_pages
restart_with_huge_pages()
print(os.environ["{TUNABLES}"], sys.argv[1], "jax" in sys.modules)
"""
    started = [sys.executable, "-u", "-c", code, "an argument"]
    printed = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    *processes, result = printed.splitlines()
    assert len(processes) == (1 if already else 2) and len(set(processes)) == 1
    assert result.endswith(f"{expected} an argument False")


@pytest.mark.parametrize("program", ["nested-reft", "other"])
def test_only_the_command_itself_restarts(program, monkeypatch):
    restarts = []
    monkeypatch.setattr(command, "restart_with_huge_pages", lambda: restarts.append(program))
    monkeypatch.setattr(sys, "argv", [f"/some/bin/{program}", "train", "nosuch"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert restarts == ["nested-reft"] * (program == "nested-reft")
