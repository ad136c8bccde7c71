"""The command line: what it refuses, with which exit code, and that refusing leaves nothing behind."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from nested_reft import command, exit_codes
from nested_reft.api import open_trainer
from nested_reft.checkpoints import CheckpointError, newest_checkpoint
from nested_reft.cli import configs, sample
from nested_reft.cli.main import COMMANDS, main
from nested_reft.cli.overrides import field_options, override
from nested_reft.command import HUGE_PAGES, TUNABLES
from nested_reft.config_files import config_names
from nested_reft.exit_codes import LateError
from nested_reft.json_files import write_json
from nested_reft.layer_skip import NestingConfig, PlanRule
from nested_reft.prompt_format import PromptFormat
from nested_reft.run_directory import read_log
from nested_reft.tokenizer import Tokenizer
from nested_reft.training.config import load_config
from nested_reft.training.interrupts import Preempted
from nested_reft.training.phases import last_checkpoint
from nested_reft.training.search_pool import SearchError
from nested_reft.training.setup import initial_policy

ROOT = Path(__file__).parents[1]


def made(**changes: Any) -> str:
    """A run directory that holds its configuration alone."""
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(load_config("tiny", **changes).to_json()))
    return "run"


@pytest.mark.parametrize("command", ["train --resume run", "eval run", "export run out"])
def test_a_file_in_the_place_of_checkpoints_is_named(command, capsys):
    made()
    Path("run/checkpoints").write_text("")
    assert "'run/checkpoints' is a file; it must be the directory" in refused(command.split(), capsys)


@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model"])
def test_a_run_of_another_objective_is_continued_by_train(command, capsys):
    made()
    message = refused([command, "--resume", "run"], capsys)
    assert "run 'run' trains loss.kind 'policy_gradient', and" in message
    assert message.endswith("to continue it: nested-reft train --resume run")


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ([], "run/summary.json\n"),
        (["--mesh.data", "8"], "; --mesh.data has no effect, because there is nothing left to compute"),
        (["--runs", "x", "--mesh.data=8"], "; --mesh.data, --runs have no effect, because"),
    ],
)
def test_a_complete_run_says_what_has_no_effect(options, end, capsys):
    made(train={"steps": 3})
    (Path("run/checkpoints") / str(last_checkpoint(load_config("tiny", train={"steps": 3})))).mkdir(parents=True)
    next(Path("run/checkpoints").iterdir()).joinpath("file").write_text("")
    Path("run/summary.json").write_text('{"steps": 3}')
    assert main(["train", "--resume", "run", *options]) == 0
    (said,) = capsys.readouterr().out.splitlines(keepends=True)
    assert said.startswith("run 'run' is complete: run/summary.json") and end in said


SMALL = [
    *("--data.prompts-per-batch", "4", "--rollout.group-size", "4", "--evaluation.samples-per-prompt", "0"),
    *("--data.sources.0.train-size", "20", "--data.sources.0.heldout-size", "4", "--warm-start.steps", "0"),
    *("--train.keep-checkpoints", "1"),
]


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(arguments, capsys) -> str:
    """The message of a refused command; checks that nothing was written."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "command 'fly' is unknown; known are train"),
        (["train"], "train needs the name of a configuration"),
        (["dpo"], "dpo needs the name of a configuration"),
        (["reward-model", "tiny"], "train rows cannot be learnt from: 3000 with an empty answer or none"),
        (["sft", "tiny", "--loss.beta", "0.1"], "loss.beta is no option of the command"),
        (
            ["reward-model", "tiny_preferences", "--loss.preset", "grpo"],
            "loss.kind is 'policy_gradient', and `nested-reft reward-model` trains 'bradley_terry'",
        ),
        (["sft", "tiny_preferences", "--loss.kind", "dpo", "--loss.beta", "1"], "`nested-reft sft` trains 'sft'"),
        (["train", "tiny", "--loss.kind", "trajectory_balance"], "loss.beta is missing and has no default"),
        (["train", "tiny", "--loss.kind", "trajectory_balance", "--loss.beta", "0"], "loss.beta is 0.0; allowed is"),
        (["dpo", "tiny_preferences", "--loss.beta", "0"], "loss.beta is 0.0; allowed is more than 0"),
        (["dpo", "tiny_preferences", "--reset.share", "1"], "which samples nothing, and reset.share is set"),
        (["train", "smollm2_hh"], "reward.checker is 'model', but reward.model is empty"),
        (["train", "tiny_preferences", "--reward.model", "there"], "there', which has no reward_model.json"),
        (["train", "nothing"], "configuration 'nothing' is unknown; known are qwen_hh"),
        (["train", "missing.py"], "configuration file 'missing.py' does not exist"),
        (["train", "tiny", "--no.such-field", "1"], "no.such-field"),
        (["train", "tiny", "--nesting.skip-ratio", "1.5"], "nesting.skip_ratio is 1.5; allowed is 0 <= skip_ratio < 1"),
        (["train", "tiny", "--nesting.skip-ratio", "high"], "nesting.skip_ratio is 'high'; allowed is a number"),
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
        (["sample", "smollm2-135m", "2 + 2", "--skip-ratio", "1"], "--skip-ratio is 1.0; allowed is 0 or more"),
        (["sample", "smollm2-135m", "2 + 2", "--temperature", "-1"], "--temperature is -1.0; allowed is 0 (greedy)"),
        (
            ["sample", "smollm2-135m", "2 + 2", "--skip-layers", "30"],
            "--skip-layers names [30]; the model has",
        ),
        (
            ["verify-estimators", "--figure", "x.png", "--json", "x.png"],
            "--figure and --json are both 'x.png'; allowed are",
        ),
        (["verify-estimators", "--seed", "-1"], "--seed is -1; allowed is a whole number from 0 to"),
        (["train", "tiny", "--runs", ""], "--runs is ''; allowed is a directory"),
        (["train", "tiny", "--runs", "/dev/null/runs"], "'/dev/null' is a file"),
        (["export", "nowhere", "out"], "'nowhere' is not a run directory"),
        (["measure-layers", "smollm2-135m", "--config", "tiny", "--out", "x/y.json"], "cannot write 'x/y.json'"),
        (["train", "tiny", "--mesh.data", "abc"], "mesh.data is 'abc'; allowed is auto or a whole number"),
        (["train", "gs://b/config.py"], "the configuration is 'gs://b/config.py'; allowed is a local path"),
        (["train", "tiny", "--runs", "GS://bucket/runs"], "'GS://bucket/runs' cannot be used; allowed are local paths"),
        (["train", "tiny", "--runs", "s3:/bucket/runs"], "'s3:/bucket/runs' cannot be used"),
        (["train", "tiny", "--runs", "gs:bucket"], "'gs:bucket' cannot be used; allowed are local paths and gs://B"),
        (["train", "--resume", ""], "the run is ''; allowed is a run directory, or gs://"),
        (["samples", ""], "the run is ''; allowed is a run directory, or gs://"),
        (["train", "tiny", "--json", ""], "--json is ''; allowed is a local path"),
        (["train", "tiny", "--model.name", "gs://nosuch"], "so give --model.shape None too"),
        (["train", "tiny", "--model.shape", "None"], "'scratch' and model.shape is None; a model from scratch needs a"),
    ],
)
def test_refuses(arguments, message, capsys):
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny", "--train.seed", str(2**64)], f"train.seed is {2**64}; allowed is a whole number of at most"),
        (["train", "tiny", "--train.steps", "True"], "train.steps is 'True'; allowed is a whole number"),
        (["train", "tiny", "--train.steps"], "train.steps is given no value; allowed is a whole number"),
        (["train", "tiny", "--train.steps", "1", "2"], "train.steps is '1 2', which are 2 words; allowed is a whole"),
        (["train", "tiny", "--train.stepz", "1"], "no field of the configuration; did you mean --train.steps"),
        (["train", "tiny", "--loss.mixture-alpha", "1"], "did you mean --rollout.mixture-alpha?"),
        (["train", "tiny", "--loss.level", "word"], "loss.level is 'word'; allowed are token, prefix, sequence, geom"),
        (["train", "tiny", "--train", "1"], "train has fields of its own; allowed are --train.steps,"),
        (["train", "tiny", "--data.sources", "1"], "data.sources has fields of its own; allowed are --data.sources.0"),
        (["train", "tiny", "--data.sources.5.seed", "1"], "did you mean --data.sources.0.seed"),
        (["train", "tiny", "words"], "'words' is no option of the command"),
        (["train", "tiny", "--train.remat", "maybe"], "train.remat is 'maybe'; allowed are none, dots, full"),
        (
            ["train", "tiny", "--optimizer.learning-rate", "1e999"],
            "optimizer.learning_rate is inf; allowed is a finite n",
        ),
        (["train", "tiny", "--data.prompt.demonstrations", "a"], "allowed are 2 words for each entry"),
        (["sample", "m"], "the following arguments are required: prompt"),
        (["sample", "m", "p", "--seed", "x"], "--seed is 'x'; allowed is a whole number from 0 to 2147483647"),
        (["sample", "m", "p", "--chats"], "unrecognized arguments: --chats; allowed are -h, --help"),
        (["sample", "m", "p", "--temperature", "1e-30"], "--temperature is 1e-30; allowed is 0 (greedy), or 0.001 to"),
        (["sample", "smollm2-135m", "p", "--skip-ratio", "0.01"], "--skip-ratio is 0.01, which of 30 layers is 0"),
        (["sample", "smollm2-135m", "p", "--samples", "99999999"], "--samples is 99999999; allowed is 1 to"),
        (["sample", "elsewhere/tiny-20260101-120000", "p"], "there is no such run or model"),
        (["eval", "smollm2-135m", "--config", "tiny", "--train.steps", "1"], "--train.steps changes nothing that eval"),
        (["eval", "smollm2-135m", "--config", "tiny", "--mesh.data", "64"], "mesh.data"),
        (["train", "tiny", "--name", "\x1b[31m\n"], "name is '\\x1b[31m\\n'; allowed are letters"),
        (["fly\x1b[31m"], "command 'fly\\x1b[31m' is unknown"),
    ],
)
def test_refuses_in_one_clear_line(arguments, message, capsys):
    assert message in refused(arguments, capsys)


def test_a_run_that_is_not_there_is_no_model_of_the_hub(capsys):
    Path("runs").mkdir()
    assert "'runs/typo', and there is no such run or model" in refused(["sample", "runs/typo", "p"], capsys)


def test_errors_of_the_system_name_their_file(capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(30, "Read-only file system", "runs/tiny")

    monkeypatch.setattr("nested_reft.cli.train.open_trainer", fail)
    assert refused(["train", "tiny"], capsys) == "error: 'runs/tiny' cannot be used: Read-only file system"


def test_a_device_that_is_not_here_is_one_line(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Unable to initialize backend 'cuda':\nno such device")

    monkeypatch.setattr("nested_reft.cli.train.open_trainer", fail)
    assert "JAX finds no device: Unable to initialize backend 'cuda': no such" in refused(["train", "tiny"], capsys)


def test_a_reader_that_goes_away_is_no_error():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m nested_reft.command --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) in (("141", ""), ("0", ""))


def test_every_option_that_is_listed_is_taken():
    """A value that no field takes shows that the field was found."""
    config = load_config("smollm2_chain_sum")
    options = list(field_options(config))
    assert len(options) > 100
    for option in options:
        try:
            override(config, [f"--{option}", "\0", "\0", "\0"])
        except ValueError as error:
            assert "no field" not in str(error) and option.rpartition(".")[2].replace("-", "_") in str(error)


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


def check_benchmark(run, tmp_path, capsys):
    """A file of questions, answered by a run, then once more from its records, and refused after a change."""
    questions = tmp_path / "sums.jsonl"
    questions.write_text(
        '{"problem": "1 + 2 =", "answer": 3}\n{"problem": "4 + 4 ="}\n{"problem": "2 + 2 =", "answer": 4}\n'
    )
    command = ["eval", str(run), "--benchmark", str(questions), "--records", "records.jsonl", "--data.prompt.template"]
    command += ["{question}", "--rollout.max-completion-tokens", "3", "--wrong", "1", "--json", "benchmark.json"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "row 2 has no field 'answer'" in shown.err and "1 rows that are left out and 2 questions" in shown.err
    assert "(2 questions): greedy" in shown.out and "question | 1 + 2 =" in shown.out
    results, records = Path("benchmark.json").read_bytes(), Path("records.jsonl").read_bytes()
    assert main(command) == 0
    assert "2 of 2 questions have a record" in capsys.readouterr().out
    assert (results, records) == (Path("benchmark.json").read_bytes(), Path("records.jsonl").read_bytes())
    assert "samples: 1 there, 2 now" in refused([*command, "--k", "2"], capsys)
    assert "--k is 2, and --temperature 0" in refused([*command, "--k", "2", "--temperature", "0"], capsys)
    assert "--rollout.group-size changes nothing" in refused([*command, "--rollout.group-size", "2"], capsys)
    questions.write_text('{"problem": "1 + 3 =", "answer": 4}\n')
    assert "holds another question 0 of 'sums'" in refused(command, capsys)
    assert Path("records.jsonl").read_bytes() == records
    assert "--k is given without --benchmark" in refused(["eval", str(run), "--k", "2"], capsys)


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
    check_benchmark(run, tmp_path, capsys)
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


def test_a_run_whose_updates_are_all_rejected_stops_when_told_to(capsys):
    """Its checkpoint is from before the last of them; the count goes on from there, so a resumed run stops as well."""
    mask = ["--loss.reject-by", "sequence_k3", "--loss.reject-above", "1e-12", "--train.checkpoint-every", "1"]
    assert main(["train", "tiny", *SMALL, *mask, "--train.steps", "4", "--train.stop-after-empty-updates", "2"]) == 1
    (run,) = Path("runs").iterdir()
    for arguments in ([], ["train", "--resume", str(run)]):
        assert not arguments or main(arguments) == 1
        (message,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert "error: step 2: 2 updates in a row changed nothing, which is train.stop_after_empty_updates" in message
        assert "reject_above 1e-12; reject_below None and reject_above 0" in message and "Widen the bounds" in message
        assert newest_checkpoint(run / "checkpoints") == 1 and not (run / "summary.json").exists()
        assert [line.get("empty") for line in read_log(run / "metrics.jsonl")] == [None, True, True]


def test_a_finished_run_is_extended_and_evaluated_otherwise(capsys):
    """The longer run is that of the same seed with more steps from the start: its schedule is constant."""
    constant = ["--optimizer.schedule", "constant", "--optimizer.warmup-steps", "0", "--evaluation.every-steps", "2"]
    assert main(["train", "tiny", *SMALL, *constant, "--train.steps", "1", "--runs", "short"]) == 0
    assert "devices: 1 of 8 are used; --mesh.data" in capsys.readouterr().out
    (run,) = Path("short").iterdir()
    assert main(["train", "--resume", str(run), "--train.steps", "2", "--json", "out.json"]) == 0
    printed = capsys.readouterr().out
    assert "continuing after step 1 of 2" in printed
    assert "\nstep 2: held-out accuracy three_to_six_digits 0." in printed
    seconds = json.loads(Path("out.json").read_text())["seconds"]
    assert sum(value for name, value in seconds.items() if name != "total") == pytest.approx(seconds["total"])
    assert seconds["training"] > 0 and seconds["evaluation"] > 0
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 2
    assert json.loads(Path("out.json").read_text())["steps"] == 2
    assert main(["train", "tiny", *SMALL, *constant, "--train.steps", "2", "--runs", "long"]) == 0
    (other,) = Path("long").iterdir()
    found, expected = ([line["loss"] for line in read_log(path / "metrics.jsonl")[1:]] for path in (run, other))
    assert found == expected and len(found) == 2

    message = refused(["train", "--resume", str(run), "--train.steps", "1"], capsys)
    assert "train.steps is 1, the run has 2" in message and "only --train.steps may be raised" in message
    assert "leave out 'tiny'" in refused(["train", "tiny", "--resume", str(run)], capsys)
    # A run that is complete still writes what was asked for.
    Path("out.json").unlink()
    assert main(["train", "--resume", str(run), "--json", "out.json"]) == 0
    assert json.loads(Path("out.json").read_text()) == json.loads((run / "summary.json").read_text())

    options = ["--prompts", "3", "--evaluation.batch-size", "2", "--evaluation.samples-per-prompt", "2"]
    words = [*options, "--evaluation.pass-k", "2", "--completions", "texts.jsonl", "--json", "eval.json"]
    message = refused(["eval", str(run), "--model.shape.rope-theta", "10"], capsys)
    assert "allowed is the model that was trained" in message
    assert main(["eval", str(run), *words, "--rollout.max-completion-tokens", "3", "--mesh.data", "2"]) == 0
    assert json.loads(Path("eval.json").read_text())["three_to_six_digits"]["prompts"] == 3
    lines = [json.loads(line) for line in Path("texts.jsonl").read_text().splitlines()]
    assert [line["greedy"] for line in lines] == [True] * 3 + [False] * 6
    assert all(line["right"] in (True, False) and len(line["text"]) <= 3 for line in lines)
    assert lines[0]["question"] == lines[3]["question"] == lines[4]["question"] != lines[1]["question"]


def test_sample_follows_the_run_and_nests_a_model_by_one_layer(capsys, monkeypatch):
    policy = initial_policy(load_config("tiny"))

    def loads(plans: PlanRule | None) -> None:
        monkeypatch.setattr(sample.Policy, "load", lambda _: dataclasses.replace(policy, plans=plans))

    loads(PlanRule(NestingConfig(skip_ratio=0.2), np.zeros(6), 1))
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2"]) == 0
    assert "nested (5 of 6 layers, without layers [" in capsys.readouterr().out  # 0.2 of 6 layers is one
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2", "--skip-ratio", "0.5"]) == 0
    assert "nested (3 of 6 layers, without layers [" in capsys.readouterr().out

    loads(PlanRule(NestingConfig(choice="fixed", layers=(2, 4)), np.zeros(6), 2))
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2"]) == 0
    assert "nested (4 of 6 layers, without layers [2, 4])" in capsys.readouterr().out

    # The controller has gone on to two layers, and those that cost least were measured.
    measured = NestingConfig(skip_ratio=0.2, choice="measured", divergence_temperature=0.0, remeasure_every=2)
    loads(PlanRule(measured, np.array([9, 3, 1, 4, 2, 9.0]), 2))
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2"]) == 0
    assert "nested (4 of 6 layers, without layers [2, 4])" in capsys.readouterr().out

    loads(PlanRule(measured, np.zeros(6), 2, nests=False))
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "nested (" not in shown and "the run has not fitted its bridges yet; to see a nested model" in shown

    loads(PlanRule(NestingConfig(), np.zeros(6), 0))
    assert main(["sample", "run", "1 + 2 =", "--max-tokens", "2"]) == 0
    assert "the run skips no layers" in capsys.readouterr().out

    loads(None)
    assert main(["sample", "model", "1 + 2 =", "--max-tokens", "2"]) == 0
    assert "nested (5 of 6 layers, without layers [" in capsys.readouterr().out


def test_sample_of_a_base_model_asks_for_no_chat(capsys, monkeypatch):
    policy = initial_policy(load_config("tiny"))
    base = Tokenizer.characters("0123456789+= ")
    base.chat_template = None
    policy = dataclasses.replace(policy, tokenizer=base, prompt=PromptFormat())
    monkeypatch.setattr(sample.Policy, "load", lambda _: policy)
    assert "'base' has no chat template, as base models have none; give --no-chat" in refused(
        ["sample", "base", "1 + 2 ="], capsys
    )
    assert main(["sample", "base", "1 + 2 =", "--no-chat", "--max-tokens", "2"]) == 0


def test_measured_layers_can_be_trained_with(capsys):
    assert main(["measure-layers", "scratch", "--config", "tiny", "--prompts", "4", "--out", "layers.json"]) == 0
    measured = json.loads(Path("layers.json").read_text())
    assert measured["num_layers"] == 6 and all(d >= 0 for d in measured["divergence"]) and "parts" not in measured
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


def test_parts_of_layers_are_measured_and_trained_with(capsys):
    measuring = ["measure-layers", "scratch", "--config", "tiny", "--prompts", "64", "--out", "layers.json"]
    assert main([*measuring, "--parts", "layer", "attention", "bridge"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["layer", "layer", "attention", "bridge"]
    measured = json.loads(Path("layers.json").read_text())
    assert sorted(measured["parts"]) == ["attention", "bridge"] and len(measured["parts"]["bridge"]) == 6
    assert measured["parts"]["attention"] != measured["divergence"]
    arguments = ["--nesting.choice", "measured", "--nesting.divergence-file", "layers.json", "--train.steps", "1"]
    assert main(["train", "tiny", *SMALL, *arguments, "--nesting.leave-out", "attention"]) == 0
    message = refused(["train", "tiny", *SMALL, *arguments, "--nesting.leave-out", "mlp"], capsys)
    assert "it has none for 'mlp'" in message and "measure-layers --parts mlp" in message
    message = refused([*measuring[:5], "1", *measuring[6:], "--parts", "bridge"], capsys)
    assert "--prompts is 1; bridges are fitted on one half" in message
    message = refused([*measuring[:5], "2", *measuring[6:], "--parts", "bridge"], capsys)
    assert "tokens of answers to fit bridges on; a bridge of full rank needs 128 or more: raise --prompts" in message


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


def test_the_help_names_every_exit_code(capsys):
    main(["--help"])
    _, _, printed = capsys.readouterr().out.partition("Exit codes:")
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    # Whoever could read of this one has closed the output.
    del codes["BROKEN_PIPE"]
    assert sorted(int(number) for number in re.findall(r"\b(\d+) [a-z]", printed)) == sorted(set(codes.values()))


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CheckpointError("checkpoint 5 could not be written"), 1, ["error: checkpoint 5 could not", "to continue: "]),
        (
            OSError(28, "No space left on device", "metrics.jsonl"),
            1,
            ["error: [Errno 28] No space", "to continue: "],
        ),
        (SearchError("search.max_replacements is 2"), 1, ["error: search.max_replacements is 2", "to continue: "]),
        (TimeoutError("batch 3 was not found"), 1, ["error: batch 3 was not found", "to continue: "]),
        (LateError("process 1 did not answer"), 75, ["to continue: ", "error: process 1 did not answer"]),
        (KeyboardInterrupt(), 130, ["to continue: nested-reft train --resume ", "interrupted"]),
        (Preempted(), 75, ["to continue: nested-reft train --resume ", "pre-empted"]),
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
    monkeypatch.setattr("nested_reft.cli.train.open_trainer", lambda *_, **__: fake)
    try:
        found = main(["train", "tiny"])
    except SystemExit as stop:
        found = stop.code
    printed = capsys.readouterr().err.strip().splitlines()
    if not has_checkpoint:
        lines = ["the run ended before its first" if line.startswith("to continue") else line for line in lines]
    assert found == code and len(printed) == len(lines)
    assert all(text.startswith(start) for text, start in zip(printed, lines, strict=True))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "'x' cannot be used: No space left on device; free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "x"), 1, "'x' cannot be used: Disk quota exceeded; free space"),
        (OSError(errno.EIO, "Input/output error", "x"), 1, "'x' cannot be used: Input/output error"),
        (OSError(errno.ENOENT, "No such file or directory", "x"), 2, "'x' cannot be used: No such file or directory"),
    ],
    ids=["full", "quota", "broken", "missing"],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_device_that_fails_before_the_work_is_no_bad_input(command, error, code, message, monkeypatch, capsys):
    """The same words would work on another disk."""
    where = "train.open_trainer" if command == "train" else "evaluate.check_json"
    monkeypatch.setattr(f"nested_reft.cli.{where}", Mock(side_effect=error))
    try:
        found = main([command, "tiny"])
    except SystemExit as stop:
        found = stop.code
    assert found == code and f"error: {message}" in capsys.readouterr().err


def test_a_full_disk_names_the_file(monkeypatch, tmp_path):
    """What a write itself raises has no name."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", Mock(side_effect=full))
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        write_json(tmp_path / "config.json", {})


@pytest.fixture
def read_only(monkeypatch):
    """Rights stop no administrator, so the trial fails here as it does on a file system that is mounted read-only."""
    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr("nested_reft.json_files.tempfile.NamedTemporaryFile", Mock(side_effect=error))


@pytest.mark.usefixtures("read_only")
def test_runs_that_cannot_be_written_are_refused(capsys):
    message = refused(["train", "tiny", "--runs", "runs"], capsys)
    assert "--runs 'runs' cannot be written in '" in message and "Read-only file system; mount it writable" in message


@pytest.mark.usefixtures("read_only")
def test_a_run_in_a_read_only_place_is_not_blamed_on_its_logs(capsys):
    step = Path("old", "checkpoints", "4")
    step.mkdir(parents=True)
    (step / "file").write_text("")
    with pytest.raises(ValueError, match=r"^run directory 'old' cannot be written: Read-only .* resume the copy$"):
        open_trainer(load_config("tiny"), "runs", resume=Path("old"))


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
    assert process.wait(timeout=120) == (75 if number == signal.SIGTERM else -number)
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


@pytest.mark.parametrize(("options", "enabled"), [([], None), (["--no-compilation-cache"], "false")])
def test_compiled_programs_are_kept_unless_the_user_says_otherwise(options, enabled, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)})
    command.keep_compiled_programs(["train", "tiny", *options])
    assert os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == enabled
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    assert directory is None if options else directory.startswith(str(tmp_path / "nested_reft" / "compiled-"))


def test_a_directory_that_the_environment_names_wins(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": "/elsewhere", "HOME": "/nowhere"})
    command.keep_compiled_programs(["train", "tiny"])
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"JAX_NUM_CPU_DEVICES": "8"}, "64"),
        ({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=4"}, "32"),
        ({"JAX_NUM_CPU_DEVICES": "8", "NPROC": "12"}, "12"),
        ({"JAX_NUM_CPU_DEVICES": "eight"}, None),  # JAX says so itself
    ],
)
def test_several_cpu_devices_get_more_threads_than_devices(environment, threads, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(environment))
    command.give_devices_threads(command.asked_devices())
    assert os.environ.get("NPROC") == threads


@pytest.mark.parametrize("name", ["train", "eval", "sample", "measure-layers"])
def test_commands_that_compile_take_the_option(name, capsys):
    main([name, "--help"])
    assert "--no-compilation-cache" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["nested-reft", "other"])
def test_only_the_command_itself_restarts(program, monkeypatch):
    restarts = []
    monkeypatch.setattr(command, "restart_with_huge_pages", lambda: restarts.append(program))
    monkeypatch.setattr(command, "ignore_interrupts", lambda: None)  # the tests themselves may be interrupted
    monkeypatch.setattr(sys, "argv", [f"/some/bin/{program}", "train", "nosuch"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert restarts == ["nested-reft"] * (program == "nested-reft")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "nested_reft.command", "--help"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert ended.returncode == 1 and ended.stderr == "error: [Errno 28] No space left on device\n"
